"""The shortest use: compile a model, run one step, look at what was rewritten. No GPU and no download needed."""

import torch
from transformers import StaticCache

import mlacompile
from mlacompile.testing import models

model = models.tiny_model("deepseek_v3")  # or AutoModelForCausalLM.from_pretrained(...)
cache = StaticCache(config=model.config, max_cache_len=64)

with torch.no_grad():
    prompt = torch.tensor([[11, 12, 13, 14]])
    token = model(input_ids=prompt, past_key_values=cache).logits[:, -1:].argmax(-1)

    compiled = torch.compile(model, backend="mlacompile")
    for _ in range(8):
        token = compiled(input_ids=token, past_key_values=cache).logits.argmax(-1)

print(mlacompile.last_report())
