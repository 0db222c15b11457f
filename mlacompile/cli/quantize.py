"""`mlacompile quantize`: a checkpoint in DeepSeek's FP8 format, or back."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn


def quantize(
    source: Annotated[Path, typer.Argument(metavar="DIR", help="A Hugging Face folder with safetensors.")],
    out: Annotated[Path, typer.Option(help="The folder to make. It appears when it is whole.")],
    dequantize: Annotated[bool, typer.Option("--dequantize", help="From FP8 to bfloat16.")] = False,
    keep: Annotated[
        list[str] | None, typer.Option(help="A pattern of layers that stay as they are, such as '*.kv_b_proj'.")
    ] = None,
    partial_blocks: Annotated[
        bool, typer.Option("--partial-blocks", help="Weights too that 128 × 128 does not divide, as DeepSeek does.")
    ] = False,
    max_shard_gb: Annotated[float, typer.Option(min=0.001, help="Largest file, in gigabytes.")] = 5.0,
) -> None:
    """Write the weights of linear layers and experts in FP8, with a scale for every block of 128 × 128.

    transformers and serving engines load the result as it is. An interrupted run goes on where it stopped when the
    same command is given again.
    """
    from mlacompile.checkpoint import fp8

    console = Console(soft_wrap=True)
    columns = (TextColumn("writing"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    shard = int(max_shard_gb * 1e9)
    choices: dict[str, Any] = {"keep": keep or (), "partial_blocks": partial_blocks}
    try:
        with Progress(*columns, console=console, transient=True) as progress:
            task = progress.add_task("", total=None)

            def say(text: str) -> None:
                progress.console.print(escape(text), highlight=False)

            def advance(done: int, total: int) -> None:
                progress.update(task, completed=done, total=total)

            if dequantize:
                result = fp8.dequantize(source, out, max_shard_bytes=shard, say=say, advance=advance)
            else:
                result = fp8.quantize(source, out, **choices, max_shard_bytes=shard, say=say, advance=advance)
    except KeyboardInterrupt:
        console.print(f"[yellow]Interrupted.[/] The same command goes on where this one stopped ({out}.partial).")
        raise typer.Exit(130) from None
    before, after = result.bytes_before, result.bytes_after
    console.print(f"{escape(str(out))}: {after / 1e9:.3f} GB, {after / before:.2f} of {before / 1e9:.3f} GB")
