"""A model without a latent is left exactly as it is, and the report says why, line by line."""

import torch

import mlacompile
from mlacompile.testing import models

model = models.tiny_model("llama")
cache = models.static_cache(model, batch=1, max_cache_len=64)

report = mlacompile.explain(model, input_ids=torch.tensor([[5]]), past_key_values=cache)
print(report)
for site in report.sites:
    print(f"{site.source}: {site.status}: {site.reason}")
