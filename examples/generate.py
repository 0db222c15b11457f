"""Hugging Face generate(): prefill runs as it is, every decode step runs on the latent cache."""

import torch
from transformers import CompileConfig

import mlacompile
from mlacompile.testing import models

device = "cuda" if torch.cuda.is_available() else "cpu"
model = models.tiny_model("deepseek_v3", device=device)  # or AutoModelForCausalLM.from_pretrained(...)

# mode=None, because generate() fills in a mode otherwise and torch.compile takes a mode or options, not both.
config = CompileConfig(backend="mlacompile", mode=None, options={"strict": True})
config._compile_all_devices = True  # transformers compiles on GPUs only, unless told otherwise

prompt = torch.tensor([[11, 12, 13, 14]], device=device)
tokens = model.generate(
    prompt, max_new_tokens=16, do_sample=False, cache_implementation="static", compile_config=config
)
print(tokens.tolist())
print(mlacompile.last_report())
