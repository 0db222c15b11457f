"""`mlacompile convert`: a model with grouped-query attention becomes one with latent attention, on disk."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

if TYPE_CHECKING:
    from mlacompile.convert.check import Check


class Target(StrEnum):
    """What is going to load the result."""

    transformers = "transformers"
    vllm = "vllm"


class DType(StrEnum):
    """Element type of the result."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Effort(StrEnum):
    """How much work compressing may be."""

    fast = "fast"
    full = "full"


def convert(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="A Hugging Face folder, or a .safetensors file.")],
    out: Annotated[Path, typer.Option(help="The folder to make. It appears when it is whole.")],
    from_gqa: Annotated[bool, typer.Option("--from-gqa", help="From grouped queries, the only choice.")] = True,
    config: Annotated[Path | None, typer.Option(help="A config.json, for a file that has none beside it.")] = None,
    target: Annotated[Target, typer.Option(help="What has to load the result.")] = Target.transformers,
    dtype: Annotated[DType, typer.Option(help="Of the result; auto is the source's.")] = DType.auto,
    lossless: Annotated[bool, typer.Option("--lossless", help="Lose nothing, which needs no text.")] = False,
    kv_budget: Annotated[float | None, typer.Option(help="Share of the cache to keep, over 0, at most 1.")] = None,
    kv_lora_rank: Annotated[int | None, typer.Option(help="Width of the latent, instead of a share.")] = None,
    rope_dim: Annotated[int | None, typer.Option(help="Rotary lanes; by default by the budget.")] = None,
    calibrate: Annotated[
        Path | None,
        typer.Option(metavar="TEXT", help="The text to fit to (UTF-8, .jsonl, .parquet); half of the cache is kept."),
    ] = None,
    effort: Annotated[
        Effort, typer.Option(help="Fast, or full: more text, and more that is tried, for about twice the time.")
    ] = Effort.fast,
    evaluate: Annotated[
        list[Path] | None,
        typer.Option(metavar="TEXT", help="A text to report the loss on, and nothing else. May be given again."),
    ] = None,
    heal: Annotated[float, typer.Option(metavar="MINUTES", help="Distil that long after compressing.")] = 0.0,
    heal_steps: Annotated[int, typer.Option(metavar="N", help="So many steps instead: the same each time.")] = 0,
    seed: Annotated[int, typer.Option(help="Of the sample of the text.")] = 0,
    device: Annotated[str, typer.Option(help="Where layers are fitted: cpu, cuda.")] = "cpu",
    check: Annotated[
        bool,
        typer.Option("--check", help="Compare the result with SRC; if it is there already, do only that."),
    ] = False,
    max_shard_gb: Annotated[float, typer.Option(min=0.001, help="Largest file, in gigabytes.")] = 5.0,
    head_dim: Annotated[int | None, typer.Option(min=2, help="Width of a head, if there is no config.json.")] = None,
    rope_theta: Annotated[float | None, typer.Option(min=1, help="Rotary base, if there is no config.json.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print conversion.json instead of a table.")] = False,
) -> None:
    """Give a model with grouped-query attention (Llama, Mistral, SmolLM, Qwen, Gemma 2) latent attention.

    Without a budget or a text nothing is lost: the result computes the same, and its cache is as large. With
    --calibrate TEXT the cache shrinks to --kv-budget, and the report says what that cost. An interrupted run goes on
    where it stopped when the same command is given again.
    """
    from mlacompile.convert import check_conversion
    from mlacompile.convert import convert as run

    console = Console(stderr=as_json, soft_wrap=True)
    bare: dict[str, Any] = {"config": config, "head_dim": head_dim, "rope_theta": rope_theta}
    _quiet_transformers()
    if check and out.exists():
        found, must_be_lossless = check_conversion(source, out, **bare)
        if as_json:
            print_json(found.to_json())
        else:
            _show_check(console, found)
        raise typer.Exit(1 if must_be_lossless and not found.lossless else 0)
    try:
        with _progress(console) as progress:
            task = progress.add_task("reading", total=None)
            done = run(
                source,
                out,
                target=target.value,
                dtype=dtype.value,
                lossless=lossless,
                kv_budget=kv_budget,
                kv_lora_rank=kv_lora_rank,
                rope_dim=rope_dim,
                calibrate=calibrate,
                effort=effort.value,
                evaluate=evaluate or (),
                heal=heal,
                heal_steps=heal_steps,
                seed=seed,
                device=device,
                check_result=check,
                max_shard_bytes=int(max_shard_gb * 1e9),
                say=lambda text: progress.console.print(escape(text)),
                advance=lambda completed, total, what: progress.update(
                    task, completed=completed, total=total, description=what
                ),
                **bare,
            )
    except KeyboardInterrupt:
        console.print(f"[yellow]Interrupted.[/] The same command goes on where this one stopped ({out}.partial).")
        raise typer.Exit(130) from None
    if as_json:
        print_json(done.report)
    else:
        _show(console, out, done.report)


def print_json(value: Any) -> None:
    import json

    print(json.dumps(value, indent=2, ensure_ascii=False))


def _progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True)


def _show(console: Console, out: Path, report: dict[str, Any]) -> None:
    source, result, cache = report["source"], report["result"], report["cache"]
    table = Table("", "source", "result", title=escape(source["name"]), title_justify="left")
    table.add_row("model", source["model_type"], f"{result['model_type']} ({result['architecture']})")
    table.add_row("dtype", source["dtype"], result["dtype"])
    table.add_row("parameters", f"{source['parameters']:,}", f"{result['parameters']:,}")
    table.add_row("cache, bytes a token", *(f"{cache['bytes_per_token'][side]:,}" for side in ("source", "result")))
    for loss in report["losses"]:
        table.add_row(f"perplexity, {escape(loss['text'])}", *(f"{x:.2f}" for x in loss["perplexity"].values()))
    console.print(table)
    if report["check"] is not None:
        from mlacompile.convert.check import Check

        _show_check(console, Check(**{key: value for key, value in report["check"].items() if key != "lossless"}))
    console.print(f"{report['seconds']} s. Everything is in {escape(str(out))}; the report is conversion.html there.")


def _show_check(console: Console, found: Check) -> None:
    table = Table("compared with the source", "", title_justify="left")
    table.add_row("largest difference of a logit", f"{found.max_error:.2e} (largest logit {found.max_logit:.3g})")
    table.add_row("KL divergence of the next token", f"{found.mean_kl:.2e} nats")
    table.add_row("same most likely token", f"{found.same_argmax:.1%} of positions")
    table.add_row("greedy continuations", "the same" if found.same_text else "differ")
    console.print(table)
    for row in found.continuations:
        console.print(f"[bold]{escape(row['prompt'])}[/][green]{escape(row['result'])}[/]")
    console.print("[green]Only rounding separates the two.[/]" if found.lossless else "[yellow]More than rounding.[/]")


def _quiet_transformers() -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
