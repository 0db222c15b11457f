"""Load the result as a user would, and compare it with its source: logits, greedy continuations.

One model at a time is in memory, in float32: what is compared is the conversion, not the rounding of a narrow dtype.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mlacompile.convert.source import Source
from mlacompile.convert.stream import load_float32
from mlacompile.errors import UnsupportedInputError

#: Deep models lose about 1e-5 of their largest logit to float32; a lossless conversion stays below ten times that.
LOSSLESS_TOLERANCE = 1e-4
_PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a small village by the sea,",
    "To bake a simple loaf of bread, you need",
)
_RANDOM_SHAPE = (2, 64)


@dataclass(frozen=True)
class Check:
    """How far the result is from its source, on random tokens and on prompts."""

    max_logit: float  #: largest logit of the source
    max_error: float  #: largest difference of a logit
    mean_kl: float  #: KL divergence of the next token, nats, mean over positions
    same_argmax: float  #: share of positions with the same most likely token
    same_text: bool  #: greedy continuations agree, token by token
    continuations: list[dict[str, str]]  #: prompt, source's and result's text; token ids where there is no tokenizer

    @property
    def lossless(self) -> bool:
        """Whether the difference is rounding."""
        return self.max_error <= LOSSLESS_TOLERANCE * self.max_logit

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"lossless": self.lossless}


def check(source: Source, result: Path, *, remote_code: bool, new_tokens: int = 40, seed: int = 0) -> Check:
    """Run both models on the same tokens.

    Args:
        source: the original.
        result: the folder of the conversion, loaded with ``from_pretrained``.
        remote_code: allow the modeling file in ``result``, where there is one.
        new_tokens: length of the greedy continuations.
        seed: of the random tokens.
    """
    tokenizer = _tokenizer(source.weights.folder)
    generator = torch.Generator().manual_seed(seed)
    random = torch.randint(source.model.vocab, _RANDOM_SHAPE, generator=generator)
    if tokenizer is None:
        prompts = list(random[:, :8].split(1))
    else:
        prompts = [torch.tensor([tokenizer(prompt)["input_ids"]]) for prompt in _PROMPTS]
    wanted, texts = _run(load_float32(source), random, prompts, new_tokens)
    got, texts_got = _run(_load_result(result, remote_code), random, prompts, new_tokens)
    shown = [_show(tokenizer, *row) for row in zip(prompts, texts, texts_got)]
    log_p, log_q = wanted.double().log_softmax(-1), got.double().log_softmax(-1)
    return Check(
        max_logit=wanted.abs().max().item(),
        max_error=(got - wanted).abs().max().item(),
        mean_kl=(log_p.exp() * (log_p - log_q)).sum(-1).mean().item(),
        same_argmax=(wanted.argmax(-1) == got.argmax(-1)).double().mean().item(),
        same_text=all(torch.equal(a, b) for a, b in zip(texts, texts_got)),
        continuations=shown,
    )


def _load_result(folder: Path, remote_code: bool) -> Any:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        str(folder), dtype=torch.float32, trust_remote_code=remote_code, local_files_only=True
    )
    return model.eval().requires_grad_(False)


def _run(model: Any, random: Tensor, prompts: list[Tensor], new_tokens: int) -> tuple[Tensor, list[Tensor]]:
    with torch.no_grad():
        logits = model(input_ids=random).logits.float()
        texts = [
            model.generate(
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=new_tokens,
                do_sample=False,
                pad_token_id=model.config.pad_token_id or 0,
            )[0]
            for prompt in prompts
        ]
    if not torch.isfinite(logits).all():
        raise UnsupportedInputError(f"{type(model).__name__} gives logits that are not finite, on random tokens")
    return logits, texts


def _tokenizer(folder: Path) -> Any:
    """The tokenizer beside the weights, or None."""
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        return None
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)


def _show(tokenizer: Any, prompt: Tensor, source: Tensor, result: Tensor) -> dict[str, str]:
    def text(tokens: Tensor) -> str:
        return str(tokens.tolist()) if tokenizer is None else str(tokenizer.decode(tokens))

    length = prompt.shape[1]
    return {"prompt": text(prompt[0]), "source": text(source[length:]), "result": text(result[length:])}
