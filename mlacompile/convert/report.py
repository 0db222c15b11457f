"""What a conversion did, for programs (conversion.json) and for people (conversion.html)."""

from __future__ import annotations

import html
import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

import mlacompile
from mlacompile.checkpoint import dtype_name
from mlacompile.convert import stock
from mlacompile.convert.check import Check
from mlacompile.convert.evaluate import Score
from mlacompile.convert.latent import LayerReport
from mlacompile.convert.plan import Plan

_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:60em;margin:2em auto;padding:0 1em;color:#222}"
    "table{border-collapse:collapse;margin:1em 0}td,th{padding:.25em .8em;border-bottom:1px solid #ddd;text-align:left}"
    "td.n{text-align:right;font-variant-numeric:tabular-nums}svg{max-width:100%;height:auto}"
    "pre{white-space:pre-wrap;margin:0}.good{color:#17703a}.bad{color:#b3261e}"
)
#: Keys of a layer in conversion.json, and what people read.
_COLUMNS = {
    "layer": "layer",
    "rank": "rank",
    "rope": "rotary lanes",
    "nope": "nope",
    "value": "value",
    "balance": "worth of scores",
    "missed": "missed alone",
    "missed_in_place": "missed in place",
    "missed_after_refit": "missed after refit",
    "ridge": "ridge of the refit",
}


@dataclass(frozen=True)
class Loss:
    """What source and result predict of a text; ``after`` has the divergence from ``before``."""

    text: str
    before: Score
    after: Score

    def to_json(self) -> dict[str, Any]:
        return {
            "text": self.text,
            "tokens": self.before.tokens,
            "perplexity": {"source": self.before.perplexity, "result": self.after.perplexity},
            "kl": self.after.divergence,
        }


def notes(plan: Plan, *, compressed: bool) -> list[str]:
    """What a user has to know of this conversion, in sentences."""
    model, said = plan.model, [f"Not read but concluded: {text}." for text in plan.source.model.assumed]
    before, after = _parameters(plan)
    if plan.needs_own_class:
        said.append(
            f"No stock class has {'; '.join(plan.needs_own_class)}. A modeling file goes beside the weights: load the "
            "result with trust_remote_code=True."
        )
    if plan.dtype != plan.source.dtype:
        said.append(f"Weights are {dtype_name(plan.source.dtype)} and are written as {dtype_name(plan.dtype)}.")
    if plan.source.dtype == torch.float16 and not plan.needs_own_class:
        said.append("float16 cannot hold the latent of the stock class: do not load the result in float16.")
    if compressed:
        said.append("What was cut was fitted to the calibration text: others lose more, --evaluate measures how much.")
    elif after > 1.2 * before:
        said.append(
            f"Without compression every query head has lanes for all {model.groups} key heads: {_count(before)} "
            f"parameters become {_count(after)}, and the cache stays as large as it was."
        )
    return said


def summarize(
    plan: Plan,
    options: dict[str, Any],
    said: list[str],
    found: Check | None,
    layers: list[LayerReport],
    losses: list[Loss],
) -> dict[str, Any]:
    """The content of conversion.json. ``layers`` is empty if nothing was compressed."""
    model, before_after = plan.model, _parameters(plan)
    config = plan.config()
    rows = []
    for i, layer in enumerate(plan.shapes):
        rank, nope, rope, value = stock.widths(layer)
        row: dict[str, Any] = {"layer": i, "rank": rank, "rope": rope, "nope": nope, "value": value}
        rows.append(row | (vars(layers[i]) if layers else {}))
    values = [row["rank"] + row["rope"] for row in rows]
    source_bytes = model.layers * model.cache_values * plan.source.dtype.itemsize
    return {
        "format": 1,
        "mlacompile": mlacompile.__version__,
        "method": "compressed" if layers else "lossless",
        "source": {
            "name": plan.source.path.name,
            "model_type": model.family,
            "dtype": dtype_name(plan.source.dtype),
            "layers": model.layers,
            "heads": model.heads,
            "key_value_heads": model.groups,
            "head_dim": model.head_dim,
            "hidden_size": model.hidden,
            "parameters": before_after[0],
            "concluded": list(model.assumed),
        },
        "result": {
            "model_type": config["model_type"],
            "architecture": config["architectures"][0],
            "trust_remote_code": bool(plan.needs_own_class),
            "why_own_class": plan.needs_own_class,
            "dtype": dtype_name(plan.dtype),
            "parameters": before_after[1],
        },
        "options": options,
        "cache": {
            "values_per_token_and_layer": {"source": model.cache_values, "result": sum(values) / len(values)},
            "bytes_per_token": {"source": source_bytes, "result": sum(values) * plan.dtype.itemsize},
            "kept": sum(values) / (len(values) * model.cache_values),
        },
        "layers": rows,
        "rotary_frequencies": plan.shapes[0].inv_freq.tolist(),
        "losses": [loss.to_json() for loss in losses],
        "notes": said,
        "check": None if found is None else found.to_json(),
    }


def to_html(summary: dict[str, Any]) -> str:
    """One page that stands alone: figures, plots, and what has to be known."""
    source, result, cache = summary["source"], summary["result"], summary["cache"]
    facts = [
        ("model", f"{source['name']} ({source['model_type']})", f"{result['architecture']} ({result['model_type']})"),
        ("loads with", "transformers", "trust_remote_code=True" if result["trust_remote_code"] else "transformers"),
        ("dtype", source["dtype"], result["dtype"]),
        ("parameters", _count(source["parameters"]), _count(result["parameters"])),
        ("cache, bytes a token", *(f"{cache['bytes_per_token'][side]:,}" for side in ("source", "result"))),
        (
            "cache, values a token and layer",
            *(f"{cache['values_per_token_and_layer'][side]:,.4g}" for side in ("source", "result")),
        ),
    ]
    parts = [
        f"<h1>{html.escape(source['name'])} with latent attention</h1>",
        f"<p>{html.escape(summary['method'])}; {cache['kept']:.1%} of the cache kept; {summary['seconds']} s.</p>",
        _table(("", "source", "result"), facts),
        *(f"<p>{html.escape(note)}</p>" for note in summary["notes"]),
        _loss_section(summary["losses"]),
        _check_section(summary["check"], lossless=summary["method"] == "lossless"),
        "<h2>Layers</h2>",
        _plot(_bars, summary),
        _plot(_missed_lines, summary) if "missed" in summary["layers"][0] else "",
        _table(
            tuple(_COLUMNS[name] for name in summary["layers"][0]),
            [tuple(_rounded(value) for value in row.values()) for row in summary["layers"]],
        ),
        "<h2>Rotary lanes</h2>",
        "<p>Wavelengths of the rotary lanes, in tokens; a lane is two cached values. "
        + html.escape(", ".join(_wavelength(frequency) for frequency in summary["rotary_frequencies"]))
        + "</p>",
    ]
    head = f"<!doctype html><html lang=en><meta charset=utf-8><title>mlacompile convert</title><style>{_STYLE}</style>"
    return head + "\n".join(parts) + "\n"


def _loss_section(losses: list[dict[str, Any]]) -> str:
    if not losses:
        return ""
    rows = [
        (
            loss["text"],
            f"{loss['tokens']:,}",
            *(f"{loss['perplexity'][side]:.2f}" for side in ("source", "result")),
            f"{loss['kl']:.4f}",
        )
        for loss in losses
    ]
    return "<h2>Loss</h2>" + _table(
        ("text", "tokens", "perplexity of the source", "of the result", "KL divergence, nats"), rows
    )


def _rounded(value: Any) -> Any:
    return f"{value:.3g}" if isinstance(value, float) else value


def _wavelength(frequency: float) -> str:
    return f"{math.tau / frequency:,.4g}" if frequency else "never turns"


def _check_section(found: dict[str, Any] | None, *, lossless: bool) -> str:
    if found is None:
        return "<h2>Comparison</h2><p>Not compared with the source (<code>--check</code> does).</p>"
    verdict = "good" if found["lossless"] else "bad" if lossless else ""
    rows = [
        ("largest difference of a logit", f"{found['max_error']:.2e} (largest logit {found['max_logit']:.3g})"),
        ("KL divergence of the next token, nats", f"{found['mean_kl']:.2e}"),
        ("positions with the same most likely token", f"{found['same_argmax']:.1%}"),
        ("greedy continuations", "the same" if found["same_text"] else "differ"),
    ]
    texts = [tuple(f"<pre>{html.escape(row[side])}</pre>" for side in row) for row in found["continuations"]]
    return (
        f"<h2>Comparison</h2><p class={verdict}>{'Only rounding' if found['lossless'] else 'More than rounding'} "
        f"separates the two.</p>{_table(('', ''), rows)}"
        f"<h2>Side by side</h2>{_table(('prompt', 'source', 'result'), texts, escaped=True)}"
    )


def _plot(draw: Callable[[Any, dict[str, Any]], None], summary: dict[str, Any]) -> str:
    """A plot over layers as SVG, or a sentence where matplotlib is missing."""
    try:
        import matplotlib
    except ImportError:
        return "<p>Plots need matplotlib: pip install 'mlacompile[convert]'.</p>"
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": "mlacompile", "font.size": 9}):
        figure = Figure(figsize=(8, 2.8), layout="constrained")
        axes = figure.subplots()
        draw(axes, summary)
        axes.set(xlabel="layer")
        axes.legend(loc="upper center", ncols=3, frameon=False, bbox_to_anchor=(0.5, 1.2))
        stream = io.StringIO()
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
    text = stream.getvalue()
    return text[text.index("<svg") :]


def _bars(axes: Any, summary: dict[str, Any]) -> None:
    """What each layer caches, against what it cached before."""
    layers, rope, rank = ([row[name] for row in summary["layers"]] for name in ("layer", "rope", "rank"))
    axes.bar(layers, rope, label="k_pe, rotary", color="#4c78a8")
    axes.bar(layers, rank, bottom=rope, label="c_kv, latent", color="#f58518")
    axes.axhline(summary["cache"]["values_per_token_and_layer"]["source"], color="#333", lw=1, label="source")
    axes.set(ylabel="cached values a token")


def _missed_lines(axes: Any, summary: dict[str, Any]) -> None:
    """Share of the energy of attention's output that each layer misses, on text that nothing was fitted to."""
    rows = summary["layers"]
    for name, color in (("missed", "#4c78a8"), ("missed_in_place", "#bbb"), ("missed_after_refit", "#f58518")):
        axes.plot([row["layer"] for row in rows], [row[name] for row in rows], label=_COLUMNS[name], color=color)
    axes.set(ylabel="share of energy missed", yscale="log")


def _table(head: tuple[str, ...], rows: list[tuple[Any, ...]], *, escaped: bool = False) -> str:
    def cell(value: Any) -> str:
        numeric = isinstance(value, int | float)
        text = str(value) if escaped else html.escape(str(value))
        return f"<td class=n>{text}</td>" if numeric else f"<td>{text}</td>"

    top = "".join(f"<th>{html.escape(name)}</th>" for name in head)
    body = "".join(f"<tr>{''.join(map(cell, row))}</tr>" for row in rows)
    return f"<table><tr>{top}</tr>{body}</table>"


def _parameters(plan: Plan) -> tuple[int, int]:
    before = sum(math.prod(shape) for shape in plan.model.tensors().values())
    return before, sum(math.prod(spec.shape) for spec in plan.specs())


def _count(parameters: int) -> str:
    return f"{parameters / 1e9:.2f} B" if parameters >= 1e9 else f"{parameters / 1e6:.1f} M"
