"""The reference attention of both forms is what transformers computes."""

from __future__ import annotations

import torch

from mlacompile.convert.attend import gqa_attention
from mlacompile.convert.form import GQALayer
from mlacompile.testing.models import tiny_model


def test_grouped_queries_are_llamas() -> None:
    model = tiny_model("llama").float().eval()
    config, attention = model.config, model.model.layers[0].self_attn
    width, hidden = config.head_dim, config.hidden_size
    layer = GQALayer(
        attention.q_proj.weight.view(-1, width, hidden),
        attention.k_proj.weight.view(-1, width, hidden),
        attention.v_proj.weight.view(-1, width, hidden),
        attention.o_proj.weight.view(hidden, -1, width),
        *(None, None, None, None),
        model.model.rotary_emb.inv_freq,
        width**-0.5,
    )
    x = torch.randn(2, 17, hidden)
    position_embeddings = model.model.rotary_emb(x, torch.arange(17)[None])
    expected = attention(x, position_embeddings=position_embeddings, attention_mask=None)[0]
    torch.testing.assert_close(gqa_attention(layer, x), expected, rtol=1e-4, atol=1e-5)
