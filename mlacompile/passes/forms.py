"""Which form a site takes: the cost model's answer, or the one that was asked for, and the rewrite that makes it so.

absorbed     attention on the latent itself
expanded     attention on heads, as the model wrote it, less a mask that need not be there
chunked      the same on what is written of the cache, expanded a chunk at a time
by length    absorbed or chunked, as the number of queries says at run time
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch.fx import Node

from mlacompile.cost import Hardware, Prediction, border, find_hardware, predict
from mlacompile.cost.border import NEVER_EXPAND
from mlacompile.cost.predict import chunk_tokens
from mlacompile.options import Options
from mlacompile.passes.absorb import absorb
from mlacompile.passes.axes import Size
from mlacompile.passes.expand import expand_directly, expand_in_chunks, why_not_in_chunks
from mlacompile.passes.recognize import MLASite
from mlacompile.passes.visibility import Visibility, understand

Rewrite = Callable[[MLASite, Options], Node]

#: So many tokens are a step of decoding, with speculation or without.
DECODES = 8


@dataclass(frozen=True)
class Choice:
    """A form for one site.

    status: "absorbed" or "expanded", at the lengths the graph was traced with. why: in words. rewrite: makes it so;
    None: the site is that already. sees: what a query sees, in words. costs: what each form is predicted to cost on
    ``hardware``, the chosen one first. masked: every pair is computed, under a mask in memory.
    """

    form: str
    status: str
    why: str
    rewrite: Rewrite | None
    sees: str
    kernel: str = "as before"
    costs: tuple[Prediction, ...] = ()
    hardware: str = ""
    masked: bool = False

    @property
    def reads_probe(self) -> bool:
        """Whether the rewrite relies on what the prober read, and so wants to be checked."""
        return self.rewrite is not None and self.rewrite is not expand_directly


@dataclass(frozen=True)
class _Lengths:
    """Sizes of one site as numbers: symbolic ones as they were when the graph was traced."""

    batch: int
    queries: int
    context: int
    dtype: str

    @classmethod
    def of(cls, site: MLASite) -> _Lengths:
        q, k = (n.meta["val"] for n in (site.attention.q, site.attention.node.args[1]))  # type: ignore[union-attr]
        batch, queries, context = (_hint(s) for s in (q.shape[0], q.shape[2], k.shape[2]))
        return cls(batch, queries, context, str(q.dtype).removeprefix("torch."))


def _hint(size: Any) -> int:
    return int(size.node.hint or 1) if isinstance(size, torch.SymInt) else int(size)


def choose_form(site: MLASite, options: Options) -> Choice:
    """The form of a site, why, and how to get there.

    With a varying number of queries both forms are compiled, into one op that picks when it sees them, so no length
    is
    compiled for twice.
    """
    if site.probe.absorbed_already:
        return _already(site, options)
    queries: Size = site.attention.queries
    seen, at = understand(site.attention), _Lengths.of(site)
    q = site.attention.q.meta["val"]
    hardware = find_hardware(q.device, options.hardware)
    chunk = chunk_tokens(site.geometry, q.dtype.itemsize)
    expanded = _expanded(site, seen, chunk)
    costs = _costs(site, at, hardware, seen, expanded, chunk)
    limit = border(site.geometry, at.batch, at.context, at.dtype, hardware, expanded.form, expanded.masked, seen.opaque)
    cheap, dear = f"cheaper {_border(limit)} on {hardware.name}", costs[::-1]
    several = f"{queries} query token{'s' * (queries != 1)}"
    several = several if isinstance(queries, int) else f"a varying number of queries ({queries})"
    choice = Choice("absorbed", "absorbed", "", absorb, seen.describe(), costs=costs, hardware=hardware.name)
    decodes = isinstance(queries, int) and queries <= DECODES
    if options.form == "expanded" or (options.form == "auto" and at.queries > limit and not decodes):
        choice = replace(expanded, costs=dear, hardware=hardware.name)
    if options.form != "auto":
        return replace(choice, why=f"form={options.form!r} was asked for")
    if decodes and at.queries > limit:
        return replace(choice, why=f"{several} are a step of decoding, whose cache is never expanded")
    if isinstance(queries, int) or seen.whole or _why_not_in_chunks(site) is not None:
        return replace(choice, why=f"{several}: attention on the latent is {cheap}")
    return replace(
        choice,
        form="by length",
        why=f"{several}, {at.queries} when compiled: each call picks; attention on the latent is {cheap}",
        rewrite=partial(expand_in_chunks, chunk=chunk, absorb_up_to=limit),
        kernel="picked at run time",
    )


def _already(site: MLASite, options: Options) -> Choice:
    """The form of a site whose graph attends to the latent itself: there is no other."""
    sees = understand(site.attention).describe()
    if options.form == "expanded":
        why = "form='expanded' was asked for, and the model's own code, which absorbs, stays as it is"
        return Choice("expanded", "expanded", why, None, sees)
    why = "the model's own code attends to the latent already; the fused op takes it from there"
    return Choice("absorbed", "absorbed", why, absorb, sees)


def _why_not_in_chunks(site: MLASite) -> str | None:
    return "it mixes several dtypes" if site.mixed else why_not_in_chunks(site)


def _border(limit: int) -> str:
    return "at any length" if limit >= NEVER_EXPAND else "at no length" if limit < 1 else f"up to {limit} queries"


def _expanded(site: MLASite, seen: Visibility, chunk: int) -> Choice:
    """How a site stays expanded: untouched, without its mask, or in chunks over what is written of the cache."""
    described, masked = seen.describe(), site.attention.mask is not None
    if seen.whole and masked and site.attention.sink is None:
        return Choice("expanded", "expanded", "", expand_directly, described, "PyTorch, without the mask")
    pays = site.attention.queries != 1 and (seen.causal or bool(seen.binding))
    if seen.whole or not pays or _why_not_in_chunks(site) is not None:
        return Choice("expanded", "expanded", "", None, described, masked=masked)
    rewrite = partial(expand_in_chunks, chunk=chunk)
    return Choice("chunked", "expanded", "", rewrite, described, "chunked", masked=seen.opaque)


def _costs(
    site: MLASite, at: _Lengths, hardware: Hardware, seen: Visibility, expanded: Choice, chunk: int
) -> tuple[Prediction, Prediction]:
    sizes: dict[str, Any] = {"batch": at.batch, "queries": at.queries, "context": at.context, "dtype": at.dtype}
    sizes |= {"hardware": hardware, "chunk": chunk}
    return (
        predict("absorbed", site.geometry, masked=seen.opaque, **sizes),
        predict(expanded.form, site.geometry, masked=expanded.masked, **sizes),
    )
