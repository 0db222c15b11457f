"""`mlacompile explain`: what would be rewritten in a model, and why not the rest, from its configuration alone.

The model and its cache are built on the meta device, where tensors have shapes and no values: a 671B configuration
needs neither its weights nor their memory. Layers of one kind are alike, so a short model tells as much as a long one.
"""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from mlacompile.errors import UnsupportedInputError

if TYPE_CHECKING:
    from mlacompile.report import Report


class Phase(StrEnum):
    """What the model is asked to do: one new token on a full cache, or a whole prompt on an empty one."""

    decode = "decode"
    prefill = "prefill"


class Attention(StrEnum):
    """How transformers spells attention."""

    sdpa = "sdpa"
    eager = "eager"


class DType(StrEnum):
    """Element type of weights and cache."""

    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"


def explain(
    model: Annotated[Path, typer.Argument(help="A folder with a config.json, or the file itself. No weights needed.")],
    batch: Annotated[int, typer.Option(min=1, help="Sequences.")] = 1,
    context: Annotated[
        int, typer.Option(min=2, help="Tokens in the cache (decode) or in the prompt (prefill).")
    ] = 4096,
    phase: Annotated[Phase, typer.Option(help="One new token on a full cache, or a whole prompt.")] = Phase.decode,
    attn: Annotated[Attention, typer.Option(help="The attention implementation of transformers.")] = Attention.sdpa,
    dtype: Annotated[DType, typer.Option(help="Of weights and cache.")] = DType.bfloat16,
    layers: Annotated[
        int | None, typer.Option(min=1, help="How many layers to build; default: until every kind has been seen.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    html: Annotated[Path | None, typer.Option(help="Also write the report as an HTML page.")] = None,
    strict: Annotated[bool, typer.Option(help="Exit with 1 if any attention was refused.")] = False,
    queries: Annotated[
        int | None,
        typer.Option(min=1, help="New tokens in one call, on a cache of --context tokens; overrides --phase."),
    ] = None,
    hardware: Annotated[
        str | None, typer.Option(help="Whose rates to reckon with: h200, h100, a100, cpu or a TOML file.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Also draw the roofline and where the forms cross, as a PNG.")
    ] = None,
) -> None:
    """Show what mlacompile would rewrite in a model, site by site, and the reason for every site it would not."""
    from mlacompile.testing import models

    _quiet_transformers()
    config = models.load_config(model)
    total, kept = models.shorten(config, layers)
    queries = queries or (1 if phase is Phase.decode else context)
    if queries > context:
        raise UnsupportedInputError(f"--queries {queries}: they do not fit into a cache of --context {context} tokens")
    report = _report(config, batch, context, queries, attn, dtype, hardware)
    if html is not None:
        html.write_text(report.to_html())
    if plot is not None:
        _draw(report, plot, batch, context, dtype, hardware)
    if as_json:
        about = {"model_type": config.model_type, "layers": total, "layers_built": kept, "batch": batch}
        about |= {
            "context": context,
            "queries": queries,
            "phase": phase.value,
            "attn": attn.value,
            "dtype": dtype.value,
        }
        print(json.dumps({**about, "report": _plain(report.to_json())}, indent=2))
    else:
        _show(Console(), config, report, total, kept)
    rewritten = report.absorbed + report.expanded
    if not rewritten or (strict and report.refused):
        raise typer.Exit(1)


def _report(
    config: Any, batch: int, context: int, queries: int, attn: Attention, dtype: DType, hardware: str | None
) -> Report:
    import torch

    import mlacompile
    from mlacompile.testing import models

    model = models.build_model(config, attn=attn.value, dtype=getattr(torch, dtype.value), device="meta")
    cache = models.static_cache(model, batch, context)
    tokens = torch.zeros(batch, queries, dtype=torch.long, device="meta")
    with torch.no_grad():
        return mlacompile.explain(model, input_ids=tokens, past_key_values=cache, options={"hardware": hardware})


def _draw(report: Report, target: Path, batch: int, context: int, dtype: DType, hardware: str | None) -> None:
    """One picture of the first latent attention; the others of a model are alike."""
    import torch

    from mlacompile.cost import find_hardware
    from mlacompile.cost.plot import draw

    geometry = next((site.geometry for site in report.sites if site.geometry is not None), None)
    if geometry is None:
        raise UnsupportedInputError("--plot: there is no latent attention in this model to draw")
    rates = find_hardware(torch.device("meta"), hardware)
    contexts = sorted({max(2, context // 8), context})
    draw(geometry, target, batch=batch, contexts=contexts, dtype=dtype.value, hardware=rates)


def _show(console: Console, config: Any, report: Report, total: int, kept: int) -> None:
    if kept < total:
        console.print(
            f"{escape(config.model_type)}: the first {kept} of {total} layers were built, which has one of every kind "
            f"(--layers {total} builds all)."
        )
    console.print(report.render())
    _show_costs(console, report)
    if not report.sites:
        console.print("[yellow]No attention was found in this model.[/]")
    elif not report.absorbed + report.expanded:
        console.print("[yellow]No latent attention was found: the model would run as it is, compiled by Inductor.[/]")


def _show_costs(console: Console, report: Report) -> None:
    """Where the forms of each kind of attention cross, counting FLOPs alone."""
    from mlacompile.cost.border import flops_border, flops_border_of, long_context_border

    geometries = dict.fromkeys(site.geometry for site in report.sites if site.geometry is not None)
    if not geometries:
        return
    border, limit = flops_border(), long_context_border()
    console.print(
        f"Both forms need the same FLOPs at S = {border} queries, on a long context {limit}:", highlight=False
    )
    for geometry in geometries:
        console.print(f"  {geometry}: {flops_border_of(geometry):.4g}", highlight=False)


def _plain(found: Any) -> Any:
    return json.loads(found) if isinstance(found, str) else found


def _quiet_transformers() -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()
