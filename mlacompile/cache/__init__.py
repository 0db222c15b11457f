"""Where latents are kept between steps: layouts in memory, written and read by plain PyTorch, for any caller.

``store.py`` knows tensors and bytes only; what Hugging Face expects of a cache is in ``integrations/transformers.py``.
"""
