"""Rotary embeddings, recognised by what they compute: each value is made of two, by factors that positions give.

    out[j] = first factor[j] · x[first(j)] + second factor[j] · x[second(j)]

Models write this with slices, with negated halves, with complex numbers, on tables that were computed a dozen ways. So
nothing is read off the spelling: the ops are run, on the patterns that pick the factors out and then on random values,
which the factors must explain. In a graph the same ops on the same patterns yield the factors, once for all layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from mlacompile.lowering.region import MOVES, is_float_cast, random_like, replay, run, squeezed
from mlacompile.ops.write_latents import PAIRS, rotated
from mlacompile.passes.emit import Emitter

aten = torch.ops.aten

_ARITHMETIC = MOVES | {
    *(aten.mul.Tensor, aten.mul.Scalar, aten.add.Tensor, aten.sub.Tensor, aten.neg.default),
    *(aten.cat.default, aten.stack.default, aten.roll.default, aten.flip.default, aten.slice_scatter.default),
    *(aten.view_as_complex.default, aten.view_as_real.default, aten.complex.default, aten.copy.default),
}
_MOST_STEPS = 64
#: Float64 arithmetic on sums of two products.
_EXACT = 1e-12


@dataclass(frozen=True)
class Rotation:
    """``out`` is ``x`` rotated. x: with the elements of ``out`` before, in the same order. tables: what else it is made
    of."""

    out: Node
    x: Node
    tables: frozenset[Node]


def rotation_before(out: Node, fed: set[Node]) -> Rotation | None:
    """What may be a rotation: the ops between a value and the last single one, of the same shape, that it is made of.

    fed: the nodes that depend on more than positions.
    """
    order = {node: i for i, node in enumerate(out.graph.nodes)}
    shape = squeezed(out)
    frontier, x = {out}, out
    for _ in range(_MOST_STEPS):
        node = max(frontier, key=order.__getitem__)
        if len(frontier) == 1 and squeezed(node) == shape and node.meta["val"].is_floating_point():
            x = node
        if not _is_step(node):
            break
        frontier.remove(node)
        frontier |= {source for source in node.all_input_nodes if source in fed}
        if not frontier:
            return None
    if x is out or not shape:
        return None
    tables = _tables(out, x, fed)
    return None if tables is None else Rotation(out, x, tables)


def _is_step(node: Node) -> bool:
    return node.op == "call_function" and (node.target in _ARITHMETIC or is_float_cast(node))


def _tables(out: Node, x: Node, fed: set[Node]) -> frozenset[Node] | None:
    """What is not made of tokens on the way from x to out; None if there is a way around x."""
    tables: set[Node] = set()
    seen, stack = {x}, [out]
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if node in fed:
            if not _is_step(node):
                return None
        elif node.target not in MOVES:
            tables.add(node)
            continue
        stack += node.all_input_nodes
    return frozenset(tables)


def pairs_of(one: Rotation, others: list[Rotation], batch: int, tokens: int) -> tuple[str, list[Rotation]]:
    """How the values of a rotation are paired, and which of the others have the same pairs and factors; "": it is none.

    The factors are those of ``one``, a tensor that holds ``[batch, tokens, P]`` in order. The others hold
    ``[batch, H, tokens, P]``.
    """
    rope = one.out.meta["val"].shape[-1]
    if rope % 2 or one.out.meta["val"].numel() != batch * tokens * rope:
        return "", []
    generator = torch.Generator().manual_seed(0xC0FFEE)
    tables: dict[Node, Tensor] = {}
    for table in one.tables.union(*(other.tables for other in others)):
        if not (table.meta["val"].is_floating_point() or table.meta["val"].is_complex()):
            return "", []
        tables[table] = random_like(table, generator)
    for pairs in PAIRS:
        factors = torch.stack(
            [
                run(one.out, {**tables, one.x: pattern.expand(one.x.meta["val"].shape).clone()}, casts=False)
                for pattern in _patterns(pairs, rope)
            ]
        ).reshape(2, batch, tokens, rope)
        if _explains(one, factors, pairs, tables, generator, batch, tokens):
            alike = [r for r in others if _explains(r, factors, pairs, tables, generator, batch, tokens)]
            return pairs, alike
    return "", []


def _patterns(pairs: str, rope: int) -> tuple[Tensor, Tensor]:
    """A one for each value that is the first of its pair, and for each that is the second."""
    i = torch.arange(rope)
    first = (i < rope // 2 if pairs == "halves" else i % 2 == 0).double()
    return first, 1 - first


def _explains(
    rotation: Rotation,
    factors: Tensor,
    pairs: str,
    tables: dict[Node, Tensor],
    generator: torch.Generator,
    batch: int,
    tokens: int,
) -> bool:
    """Whether the factors give what the ops compute."""
    x = random_like(rotation.x, generator)
    got = run(rotation.out, {**tables, rotation.x: x}, casts=False)
    rope = factors.shape[-1]
    if x.numel() % (batch * tokens * rope):
        return False
    want = rotated(x.reshape(batch, -1, tokens, rope), factors, pairs)
    return bool((got.reshape(want.shape) - want).abs().max() <= _EXACT * (1 + want.abs().max()))


def emit_factors(emit: Emitter, rotation: Rotation, pairs: str, batch: int, tokens: int) -> Node:
    """Write the factors into a graph, from the tables of a rotation: float32 ``[2, batch, tokens, P]``."""
    value = rotation.x.meta["val"]
    rope = value.shape[-1]
    i = emit(aten.arange.default, rope, device=value.device)
    if pairs == "halves":
        mask = emit(aten.lt.Scalar, i, rope // 2)
    else:
        mask = emit(aten.eq.Scalar, emit(aten.remainder.Scalar, i, 2), 0)
    first = emit.cast(mask, torch.float32)
    factors = []
    for pattern in (first, emit(aten.rsub.Scalar, first, 1)):
        spread = emit(aten.expand.default, pattern, list(value.shape))
        x = emit(aten.clone.default, spread, memory_format=torch.contiguous_format)
        given: dict[Node, Any] = {rotation.x: x, **{table: table for table in rotation.tables}}
        out = replay(rotation.out, given, emit, casts=False)
        factors.append(emit.cast(emit.view(out, [batch, tokens, rope]), torch.float32))
    return emit(aten.stack.default, factors)


def signature(rotation: Rotation) -> str:
    """Equal for rotations that are the same ops on the same tables."""

    def spelled(op: Any, *args: Any, **kwargs: Any) -> str:
        return f"{op}({args}, {kwargs})"

    given: dict[Node, Any] = {rotation.x: f"x{list(rotation.x.meta['val'].shape)}"}
    given |= {table: table.name for table in rotation.tables}
    return str(replay(rotation.out, given, spelled, casts=False))
