"""How a graph stores a token: the arrays that attention reads, what is written into them, and in which form.

The form is found by writing: random latents and keys go through the ops that the graph has between them and its
arrays, and what arrives must be, byte for byte, what ``write_latents`` writes with one of the settings it knows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from mlacompile.geometry import SCALE_GROUP, KVLayout, scale_groups
from mlacompile.lowering.region import MOVES, run, same_values
from mlacompile.ops.fp8_quantize import FP8_DTYPES, fp8_quantize_reference
from mlacompile.ops.write_latents import write_latents_reference

aten = torch.ops.aten

_QUANTIZE = (torch.ops.mlacompile.fp8_quantize.default, fp8_quantize_reference)
_DEQUANTIZE = torch.ops.mlacompile.fp8_dequantize.default
#: Ops that turn values into what is stored.
_PACKING = MOVES | {
    *(aten._to_copy.default, aten.view.dtype, aten.cat.default, aten.stack.default, aten.constant_pad_nd.default),
    *(aten.__rshift__.Scalar, aten.bitwise_and.Scalar, *_QUANTIZE),
}
_READING = MOVES | {aten.view.dtype, aten._to_copy.default, _DEQUANTIZE}
_WRITE, _COPY = aten.index_copy.default, aten.copy_.default
_C_KV, _K_PE, _DESCALE = 2, 3, 8


@dataclass(frozen=True)
class StoredToken:
    """What one attention's cache is written from.

    writes: the nodes that write, in the order of the arguments of ``write_latents``. copies: those that make the
    writes those of inputs. latent, key: what is written, ``[B, S, R]`` and ``[B, S, P]`` in some shape. settings: of
    ``write_latents``.
    """

    writes: tuple[Node | None, Node | None, Node | None]
    copies: list[Node]
    slots: Node
    latent: Node
    key: Node | None
    batch: int
    tokens: int
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def written(self) -> list[Node]:
        """The writes that there are."""
        return [node for node in self.writes if node is not None]


def stored_token(decode: Node, most: int) -> StoredToken | None:
    """How the cache of a ``mla_decode`` is written, with at most so many tokens, or None where that is not what
    ``write_latents`` does."""
    args: list[Any] = [*decode.args, *[None] * (_DESCALE + 1 - len(decode.args))]
    found = [None if args[i] is None else _write_behind(args[i]) for i in (_C_KV, _K_PE, _DESCALE)]
    first = found[0]
    if first is None or (args[_K_PE] is not None and found[1] is None):
        return None
    writes = (first, *(w if w is not first else None for w in found[1:]))
    written = list(dict.fromkeys(w for w in writes if w is not None))
    copies = [_copy_back(node) for node in written]
    slots: Any = first.args[2]
    if any(c is None for c in copies) or any(w.args[2] is not slots for w in written) or len(written) > 3:
        return None
    batch, tokens = first.meta["val"].shape[0], slots.meta["val"].shape[0]
    rank, rope = args[0].meta["val"].shape[-1], 0 if args[1] is None else args[1].meta["val"].shape[-1]
    if not all(isinstance(size, int) for size in (batch, tokens, rank, rope)) or rank == rope:
        return None
    if batch * tokens > most:
        return None
    values = _values([w.args[3] for w in written], {batch * tokens * rank: 0, batch * tokens * rope: 1})
    latent = values.get(0)
    if latent is None or (rope and 1 not in values):
        return None
    token = StoredToken(writes, copies, slots, latent, values.get(1), batch, tokens)  # type: ignore[arg-type]
    settings = _settings(token, rank, rope)
    return None if settings is None else StoredToken(**{**vars(token), "settings": settings})


def _write_behind(node: Any) -> Node | None:
    """The write into the array that a value is read from."""
    while isinstance(node, Node) and node.op == "call_function" and node.target in _READING:
        node = node.args[0]
    return node if isinstance(node, Node) and node.op == "call_function" and _is_write(node) else None


def _is_write(node: Node) -> bool:
    """Whether whole rows of tokens are written into ``[B, T, ·]`` or ``[B, 1, T, ·]``."""
    if node.target is not _WRITE:
        return False
    value = node.meta["val"]
    rank, dim = value.dim(), node.args[1] % node.meta["val"].dim()  # type: ignore[operator]
    return (rank, dim) == (3, 1) or ((rank, dim) == (4, 2) and value.shape[1] == 1)


def _copy_back(write: Node) -> Node | None:
    """The node by which a write becomes one into an input that nothing else reads or writes."""
    array: Any = write.args[0]
    if array.op != "placeholder" or len(array.users) != 2:
        return None
    copies = [user for user in array.users if user.target is _COPY and user.args == (array, write) and not user.users]
    return copies[0] if len(copies) == 1 else None


def _values(sources: list[Any], sizes: dict[int, int]) -> dict[int, Node]:
    """Of which values the sources are made, by size, if each size is one value and there is nothing else."""
    found: dict[int, Node] = {}
    stack, seen = list(sources), set[Node]()
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        value = node.meta.get("val")
        if isinstance(value, Tensor) and value.dtype.is_floating_point and value.dtype.itemsize > 1:
            size = value.numel()
            which = sizes.get(size) if isinstance(size, int) else None
            if which is not None:
                if found.setdefault(which, same_values(node)) is not same_values(node):
                    return {}
                continue
        if node.op != "call_function" or node.target not in _PACKING:
            return {}
        stack += node.all_input_nodes
    return found


def _settings(token: StoredToken, rank: int, rope: int) -> dict[str, Any] | None:
    """With which settings ``write_latents`` writes the same."""
    generator = torch.Generator().manual_seed(0xC0FFEE)
    feeds: dict[Node, Tensor] = {}
    for node in (token.latent, token.key):
        if node is not None:
            value = node.meta["val"]
            feeds[node] = torch.randn(value.shape, generator=generator).to(value.dtype)
    want = [run(w.args[3], feeds, casts=True) for w in token.written]  # type: ignore[arg-type]
    latent = feeds[token.latent].reshape(token.batch, token.tokens, rank)
    key = None if token.key is None else feeds[token.key].reshape(token.batch, token.tokens, rope)
    slots = torch.arange(token.tokens)
    for settings in _candidates(token, rank, rope):
        arrays = [None if w is None else torch.zeros_like(v) for w, v in _beside(token.writes, want)]
        try:
            write_latents_reference(latent, key, None, None, None, slots, *arrays, eps=0.0, pairs="", **settings)  # type: ignore[arg-type]
        except RuntimeError:  # these arrays have no room for that form
            continue
        if all(torch.equal(a, v) for a, v in zip([a for a in arrays if a is not None], want, strict=True)):
            return settings
    return None


def _beside(writes: tuple[Node | None, ...], values: list[Tensor]) -> Iterator[tuple[Node | None, Any]]:
    rest = iter(values)
    for write in writes:
        yield write, None if write is None else next(rest)


def _candidates(token: StoredToken, rank: int, rope: int) -> Iterator[dict[str, Any]]:
    """The forms that arrays of these dtypes may have."""
    dtype = token.writes[0].meta["val"].dtype  # type: ignore[union-attr]
    if dtype.is_floating_point:
        keys = dtype if token.writes[1] is None else token.writes[1].meta["val"].dtype
        yield {"stored": dtype, "rope_stored": keys, "group": 0, "scale_at": 0, "rope_at": rank * dtype.itemsize}
        return
    for fp8 in FP8_DTYPES:
        for keys in (torch.bfloat16, torch.float16):
            for group in (SCALE_GROUP, rank):
                run_of = KVLayout.in_one_run("", rank, rope * keys.itemsize, 4 * scale_groups(rank, group))
                at = {"scale_at": run_of.scale_at, "rope_at": run_of.rope_at}
                yield {"stored": fp8, "rope_stored": keys, "group": group, **at}
