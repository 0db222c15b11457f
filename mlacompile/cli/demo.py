"""`mlacompile demo`: the whole claim on one small model, in under three minutes on two cores, nothing downloaded.

A DeepSeek-V3 of random weights generates on a static cache; then one decode step is timed at growing contexts under
eager, stock torch.compile and mlacompile, and the logits of all three are compared.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    import torch
    from torch import nn

RUNNERS = ("eager", "torch.compile", "mlacompile")

#: Real proportions (rank 512, rope 64), few and narrow layers: one dense, the others with experts.
_SIZES: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "moe_intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "kv_lora_rank": 512,
    "q_lora_rank": 256,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 64,
    "v_head_dim": 64,
    "max_position_embeddings": 1 << 17,
}


@dataclass(frozen=True)
class Step:
    """One decode step at a context: milliseconds by runner, and the error of the logits against eager."""

    context: int
    ms: dict[str, float]
    error: float


def demo(
    contexts: Annotated[str, typer.Option(help="Cache lengths to time, separated by commas.")] = "512,2048,8192",
    tokens: Annotated[int, typer.Option(min=2, help="Tokens to generate.")] = 32,
    device: Annotated[str, typer.Option(help="cpu or cuda; auto takes a GPU if there is one.")] = "auto",
    out: Annotated[Path, typer.Option(help="Where the plot goes.")] = Path("mlacompile-demo.png"),
) -> None:
    """Build a small random DeepSeek-V3, rewrite it, check it, time it, plot it."""
    # Read when torch is imported. Threads that spin long (the default) make every runner crawl where cores are shared.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    import torch

    from mlacompile.errors import UnsupportedInputError
    from mlacompile.testing import models
    from mlacompile.testing.registration import ensure_registered

    try:
        lengths = sorted({int(part) for part in contexts.split(",")})
    except ValueError:
        raise UnsupportedInputError(f"--contexts {contexts!r}: expected whole numbers with commas between") from None
    if lengths[0] < 2:
        raise UnsupportedInputError(f"--contexts {contexts!r}: expected lengths of at least 2")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    ensure_registered()
    console = Console()
    model = models.tiny_model("deepseek_v3", dtype=dtype, device=device, **_SIZES)
    _introduce(console, model, device, dtype)
    _generate(console, model, tokens)
    steps = [_time_step(console, model, length) for length in lengths]
    console.print(_table(steps))
    if _plot(steps, out, device):
        console.print(f"Plot: {out}")
    else:
        console.print("No plot: matplotlib is not installed.")


def _introduce(console: Console, model: nn.Module, device: str, dtype: torch.dtype) -> None:
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    config: Any = model.config
    console.print(
        f"DeepSeek-V3 architecture, {config.num_hidden_layers} layers, {config.num_attention_heads} heads, latent rank "
        f"{config.kv_lora_rank}, {parameters:.0f} M random parameters, {dtype} on {device}.",
        highlight=False,
    )


def _generate(console: Console, model: Any, tokens: int) -> None:
    """generate() with a static cache, untouched and through the backend; prints what was rewritten and the parity."""
    from transformers import CompileConfig
    from transformers.utils import logging

    import mlacompile
    from mlacompile.testing import models

    logging.set_verbosity_error()
    prompt = models.random_tokens(model.config, 1, 24, device=model.device)
    settings = {
        "max_new_tokens": tokens,
        "min_new_tokens": tokens,
        "do_sample": False,
        "cache_implementation": "static",
    }
    settings |= {"return_dict_in_generate": True, "output_logits": True}
    compiled = CompileConfig(backend="mlacompile", mode=None, options={})
    compiled._compile_all_devices = True  # transformers compiles for GPUs only, unless told otherwise
    with console.status("generate() with a static cache, untouched …"):
        plain = model.generate(prompt, disable_compile=True, **settings)
    with console.status("generate() with a static cache, compiled by mlacompile …"):
        fast = model.generate(prompt, compile_config=compiled, **settings)
    console.print(mlacompile.last_report().render())
    same = int((plain.sequences == fast.sequences)[0, prompt.shape[1] :].sum())
    error = max(relative_error(a, b) for a, b in zip(fast.logits, plain.logits, strict=True))
    console.print(
        f"generate(): {same} of {tokens} greedy tokens equal to the untouched model's; logits differ by at most "
        f"{error:.1e} of the largest.",
        highlight=False,
    )


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, as a fraction of the largest expected value."""
    expected = expected.double()
    return float((got.double() - expected).abs().max() / expected.abs().max())


def _time_step(console: Console, model: Any, context: int) -> Step:
    import torch

    from mlacompile.testing import models
    from mlacompile.testing.timing import free_memory, measure

    cache = models.static_cache(model, 1, context, random=True)
    token = models.random_tokens(model.config, 1, 1, device=model.device)
    ms, logits = {}, {}
    for runner in RUNNERS:
        with console.status(f"context {context}: {runner} …"):
            free_memory()
            run = _compiled(model, runner)

            def step(run: Callable[..., Any] = run) -> torch.Tensor:
                models.set_length(cache, context - 1)
                with torch.no_grad():
                    return run(input_ids=token, past_key_values=cache).logits

            logits[runner] = step().clone()
            ms[runner] = measure(step, device=model.device, calls=5, max_calls=50, budget_s=1.5).median
    return Step(context, ms, relative_error(logits["mlacompile"], logits["eager"]))


def _compiled(model: nn.Module, runner: str) -> Any:
    import torch

    if runner == "eager":
        return model
    return torch.compile(model, backend="mlacompile" if runner == "mlacompile" else "inductor")


def _table(steps: list[Step]) -> Table:
    table = Table(title="One decode step, batch 1, ms a token (speedup: over torch.compile)", title_justify="left")
    table.add_column("context", justify="right")
    for runner in RUNNERS:
        table.add_column(runner, justify="right")
    table.add_column("speedup", justify="right")
    table.add_column("logits vs. eager", justify="right")
    for step in steps:
        speedup = step.ms["torch.compile"] / step.ms["mlacompile"]
        times = [f"{step.ms[runner]:.2f}" for runner in RUNNERS]
        table.add_row(str(step.context), *times, f"{speedup:.1f} ×", f"{step.error:.1e}")
    return table


def _plot(steps: list[Step], out: Path, device: str) -> bool:
    """Write the plot; False if matplotlib is missing."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    contexts = [step.context for step in steps]
    for runner in RUNNERS:
        axes.plot(contexts, [step.ms[runner] for step in steps], marker="o", label=runner)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(contexts, [str(context) for context in contexts])
    axes.set_xlabel("tokens in the cache")
    axes.set_ylabel("ms a token")
    axes.set_title(f"Small DeepSeek-V3, one decode step, batch 1, {device}")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(out, dpi=130)
    pyplot.close(figure)
    return True
