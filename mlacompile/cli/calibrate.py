"""`mlacompile calibrate`: where FP8 is safe, measured on text, and a file that says so."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from mlacompile.cli.convert import DType, _quiet_transformers

if TYPE_CHECKING:
    from mlacompile.calibration import Calibration


def calibrate(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A Hugging Face folder.")],
    data: Annotated[Path, typer.Option(help="A text: UTF-8, .jsonl or .parquet.")],
    held_back: Annotated[
        Path | None, typer.Option(help="Another text, on which the choice is measured and not made.")
    ] = None,
    out: Annotated[Path, typer.Option(help='The file to write, for options={"fp8": "fp8.json"}.')] = Path("fp8.json"),
    budget: Annotated[float, typer.Option(help="By how much perplexity may rise; 0.01 is one percent.")] = 0.01,
    windows: Annotated[int, typer.Option(min=1, help="Windows of the text, spread evenly.")] = 12,
    length: Annotated[int, typer.Option(min=2, help="Tokens of a window.")] = 1024,
    site_tokens: Annotated[int, typer.Option(min=2, help="Tokens on which sites are measured one by one.")] = 512,
    turns: Annotated[int, typer.Option(min=1, help="Also in so many turns on a cache.")] = 10,
    cache: Annotated[
        str, typer.Option(help='dtype of that cache, such as "fp8_e4m3"; "none": the model\'s own.')
    ] = "fp8_e4m3",
    keep: Annotated[list[str] | None, typer.Option(help="A pattern of layers that stay as they are.")] = None,
    device: Annotated[str, typer.Option(help="Where to run: cpu, cuda.")] = "cpu",
    dtype: Annotated[
        DType, typer.Option(help="What to compute in; auto is the model's own, whose rounding hides small differences.")
    ] = DType.float32,
) -> None:
    """Measure, product by product, the error that FP8 adds to outputs and to logits, and write which are safe.

    Ends with 1 when not even all of the sites left keep to the budget.
    """
    from mlacompile.calibration import calibrate as run
    from mlacompile.convert.evaluate import spread_windows
    from mlacompile.convert.texts import tokenize

    console = Console(soft_wrap=True)
    _quiet_transformers()
    loaded, tokenizer = _load(model, device, dtype.value)

    def read(text: Path) -> Any:
        ids = tokenize(tokenizer, text, at_least=windows * length)
        return spread_windows(ids, length=length, count=windows).to(device)

    ids, other = read(data), None if held_back is None else read(held_back)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("site by site", total=None)
        found = run(
            loaded,
            ids,
            held_back=other,
            budget=budget,
            site_tokens=site_tokens,
            turns=turns,
            cache=None if cache == "none" else cache,
            keep=keep or (),
            name=model.name,
            say=lambda text: progress.console.print(escape(text)),
            advance=lambda done, total: progress.update(task, completed=done, total=total),
        )
    found.write(out)
    _show(console, found)
    console.print(f"written to {escape(str(out))}")
    raise typer.Exit(0 if found.rise <= budget else 1)


def _load(folder: Path, device: str, dtype: str) -> tuple:  # type: ignore[type-arg]
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from mlacompile.errors import UnsupportedInputError

    if not (folder / "config.json").is_file():
        raise UnsupportedInputError(f"{folder}: expected a Hugging Face folder with a config.json, found none")
    try:
        model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=dtype, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError) as error:
        raise UnsupportedInputError(f"{folder}: transformers cannot load it: {error}") from error
    return model.to(device).eval().requires_grad_(False), tokenizer


def _show(console: Console, found: Calibration) -> None:
    table = Table("site", "kind", "error of its output", "divergence of the logits", "", title="the ten worst sites")
    for site in sorted(found.sites, key=lambda s: -s.divergence)[:10]:
        table.add_row(
            site.path, site.kind, f"{site.output_error:.2e}", f"{site.divergence:.2e}", "" if site.safe else "kept"
        )
    console.print(table)
    for name, rise in found.rises.items():
        perplexities = (math.exp(found.losses[n]) for n in (name.replace("fp8", "original", 1), name))
        console.print("perplexity {}: {:.3f} → {:.3f} ({:+.2%})".format(name, *perplexities, rise))
    safe = sum(site.safe for site in found.sites)
    console.print(f"{safe} of {len(found.sites)} sites are safe")
