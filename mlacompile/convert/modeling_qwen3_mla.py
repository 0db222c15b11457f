"""Qwen3 with latent attention, written by ``mlacompile convert``: needs transformers alone, and trust_remote_code=True.

Everything but the attention is the stock model. ``config.latent`` holds the widths of the attention: what is cached
for a token is the latent ``c_kv`` [R] and the rotated ``k_pe`` [P], which all heads share.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Qwen3Config
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen3.modeling_qwen3 import Qwen3ForCausalLM, Qwen3RMSNorm, eager_attention_forward


class Qwen3LatentConfig(Qwen3Config):
    """The stock configuration, with ``head_dim`` the rotary width P, and ``latent``."""

    model_type = "qwen3_mla"
    latent: dict[str, Any] | None = None


class LatentAttention(nn.Module):
    """Attention over a latent, H heads: N lanes of a key come from the latent, P are rotated and shared."""

    def __init__(self, config: Qwen3LatentConfig, layer_idx: int) -> None:
        super().__init__()
        latent = config.latent or {}
        self.config, self.layer_idx, self.is_causal = config, layer_idx, True
        self.heads, self.num_key_value_groups = config.num_attention_heads, 1
        self.nope, self.rope, self.value = latent["nope"], latent["rope"], latent["value"]
        self.rank, self.scaling = latent["ranks"][layer_idx], latent["scale"]
        self.groups = latent["normalized_groups"]
        windowed = getattr(config, "layer_types", None) is None or config.layer_types[layer_idx] == "sliding_attention"
        self.sliding_window = getattr(config, "sliding_window", None) if windowed else None
        self.softcap = getattr(config, "attn_logit_softcapping", None)
        query_width = self.rope // self.groups if self.groups else self.nope + self.rope
        bias = latent["bias"]
        self.q_proj = nn.Linear(config.hidden_size, self.heads * query_width, bias=bias)
        self.kv_a_proj_with_mqa = nn.Linear(config.hidden_size, self.rank + self.rope, bias=bias)
        self.kv_b_proj = nn.Linear(self.rank, self.heads * (self.nope + self.value), bias=False)
        self.o_proj = nn.Linear(self.heads * self.value, config.hidden_size, bias=bias)
        if self.groups:
            self.q_norm = Qwen3RMSNorm(query_width, eps=config.rms_norm_eps)
            self.k_norm = Qwen3RMSNorm(query_width, eps=config.rms_norm_eps)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        batch, length, _ = hidden_states.shape
        q_nope, q_pe = self.queries(hidden_states).transpose(1, 2).split([self.nope, self.rope], dim=-1)
        c_kv, k_pe = self.kv_a_proj_with_mqa(hidden_states).split([self.rank, self.rope], dim=-1)
        if self.groups:
            k_pe = self.k_norm(k_pe.unflatten(-1, (self.groups, -1))).flatten(-2)
        q_pe, k_pe = rotate(q_pe, *position_embeddings), rotate(k_pe[:, None], *position_embeddings)
        c_kv = c_kv[:, None]
        if past_key_values is not None:
            c_kv, k_pe = past_key_values.update(c_kv, k_pe, self.layer_idx)
        expanded = self.kv_b_proj(c_kv[:, 0]).unflatten(-1, (self.heads, self.nope + self.value)).transpose(1, 2)
        k_nope, v = expanded.split([self.nope, self.value], dim=-1)
        q = torch.cat([q_nope, q_pe], dim=-1)
        k = torch.cat([k_nope, k_pe.expand(-1, self.heads, -1, -1)], dim=-1)
        if self.softcap is not None:
            kwargs["softcap"] = self.softcap
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        out, weights = attend(
            self, q, k, v, attention_mask, scaling=self.scaling, sliding_window=self.sliding_window, **kwargs
        )
        return self.o_proj(out.reshape(batch, length, -1).contiguous()), weights

    def queries(self, hidden_states: Tensor) -> Tensor:
        """[B, S, H, N + P]. Heads that are normalized have the width of one group, and zeros in the lanes of others."""
        q = self.q_proj(hidden_states).unflatten(-1, (self.heads, -1))
        if not self.groups:
            return q
        q = self.q_norm(q).unflatten(2, (self.groups, -1))
        own = torch.eye(self.groups, dtype=q.dtype, device=q.device)[:, None, :, None]
        return nn.functional.pad((q.unsqueeze(-2) * own).flatten(-2).flatten(2, 3), (self.nope, 0))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn neighbouring lanes (2i, 2i + 1) of x [B, H, S, P]. The result has the even lanes first."""
    pairs = x.shape[-1] // 2
    cos, sin = cos[:, None, :, :pairs], sin[:, None, :, :pairs]
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.cat([even * cos - odd * sin, odd * cos + even * sin], dim=-1)


class Qwen3LatentForCausalLM(Qwen3ForCausalLM):
    """The stock model with every attention replaced."""

    config_class = Qwen3LatentConfig

    def __init__(self, config: Qwen3LatentConfig) -> None:
        super().__init__(config)
        for i, layer in enumerate(self.model.layers):
            layer.self_attn = LatentAttention(config, i)
        self.post_init()
