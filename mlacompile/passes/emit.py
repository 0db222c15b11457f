"""Write nodes into a traced graph, each with the fake value it would have been traced with."""

from __future__ import annotations

from typing import Any

import torch
from torch._subclasses import FakeTensor
from torch.fx import Graph, Node

from mlacompile.passes.axes import Dims

aten = torch.ops.aten


class Emitter:
    """Inserts ATen calls before one node, carrying its source position and computing fake values."""

    def __init__(self, before: Node) -> None:
        self.before = before
        self.graph: Graph = before.graph
        self.mode = _mode_of(before.graph)
        self.known: dict[str, int | Node] = {}  # sizes of axes by label, for dimensions that two symbolic axes share

    def __call__(self, op: Any, *args: Any, **kwargs: Any) -> Node:
        with self.graph.inserting_before(self.before):
            node = self.graph.call_function(op, args, kwargs)
        node.meta = {k: self.before.meta[k] for k in ("stack_trace", "nn_module_stack") if k in self.before.meta}
        real_args, real_kwargs = torch.fx.map_arg((args, kwargs), lambda n: n.meta["val"])
        with self.mode:
            node.meta["val"] = op(*real_args, **real_kwargs)
        return node

    def size(self, node: Node, dim: int) -> int | Node:
        """A size for use in another call: an int, or a node that yields it when it is symbolic."""
        size = node.meta["val"].shape[dim]
        return self(aten.sym_size.int, node, dim) if isinstance(size, torch.SymInt) else int(size)

    def view(self, node: Node, shape: list[int | Node]) -> Node:
        """``reshape``, left out when it would change nothing."""
        now = node.meta["val"].shape
        if len(now) == len(shape) and all(isinstance(s, int) and s == n for s, n in zip(shape, now, strict=True)):
            return node
        return self(aten.reshape.default, node, shape)

    def permute(self, node: Node, order: list[int]) -> Node:
        """``permute``, left out when it would change nothing."""
        return node if order == sorted(order) else self(aten.permute.default, node, order)

    def by_token(self, node: Node) -> Node:
        """``[B, H, S, D]``, in memory ``[B, S, H, D]``; where it is joined from parts, by joining them so."""
        order, along = [0, 2, 1, 3], node.args[1] if len(node.args) > 1 else 0
        if node.target is aten.cat.default and along in (-1, 3):
            parts = [self.permute(part, order) for part in node.args[0]]  # type: ignore[arg-type, union-attr]
            return self.permute(self(aten.cat.default, parts, -1), order)
        moved = self.permute(node, order)
        return self.permute(self(aten.clone.default, moved, memory_format=torch.contiguous_format), order)

    def cast(self, node: Node, dtype: torch.dtype) -> Node:
        """The same in another dtype, left out when it is that already."""
        return node if node.meta["val"].dtype is dtype else self(aten._to_copy.default, node, dtype=dtype)

    def narrow(self, node: Node, dim: int, start: int, length: int) -> Node:
        """A range of one dimension, left out when it is all of it."""
        whole = node.meta["val"].shape[dim]
        if start == 0 and isinstance(whole, int) and whole == length:
            return node
        return self(aten.slice.Tensor, node, dim, start, start + length)

    def arrange(self, node: Node, dims: Dims, order: str) -> Node:
        """Bring a tensor with known axes into one dimension for each label of ``order``.

        Atoms labelled neither batch, head, query nor token are features, "D". A label without an atom yields a
        dimension of one.
        """
        split = self.view(node, self._atom_sizes(node, dims))
        present = [_letter(a.label) for d in dims for a in d]
        groups = [[i for i, letter in enumerate(present) if letter == want] for want in order]
        moved = self.permute(split, [i for g in groups for i in g])
        return self._join(moved, [len(g) for g in groups])

    def merge(self, node: Node, order: str, dims: Dims) -> Node:
        """The inverse: bring ``node``, one dimension a label of ``order``, into the given axes."""
        letters = [[_letter(a.label) for a in d] for d in dims]
        wanted = [order.index(letter) for group in letters for letter in group]
        rest = [i for i in range(len(order)) if i not in wanted]
        moved = self.permute(node, wanted + rest)
        return self._join(moved, [len(g) for g in letters], extra=len(rest))

    def _atom_sizes(self, node: Node, dims: Dims) -> list[int | Node]:
        sizes: list[int | Node] = []
        for i, dim in enumerate(dims):
            for a in dim:
                if len(dim) == 1:
                    sizes.append(self.size(node, i))
                else:
                    sizes.append(a.size if isinstance(a.size, int) else self.known.get(a.label, -1))
        if sizes.count(-1) > 1:
            raise ValueError("two symbolic axes share one dimension")
        return sizes

    def _join(self, node: Node, groups: list[int], extra: int = 0) -> Node:
        """Merge runs of dimensions; an empty run is a dimension of one, ``extra`` trailing dimensions of one are
        dropped."""
        shape: list[int | Node] = []
        at = 0
        for length in groups:
            parts = [self.size(node, at + i) for i in range(length)]
            at += length
            static = 1
            for p in parts:
                static = static * p if isinstance(p, int) else static
            symbolic = [p for p in parts if isinstance(p, Node)]
            shape.append(static if not symbolic else symbolic[0] if len(parts) == 1 else -1)
        return self.view(node, shape)


def _letter(label: str) -> str:
    return label if label in ("B", "H", "S", "T") else "D"


def _mode_of(graph: Graph) -> Any:
    """The fake tensor mode the graph was traced under."""
    for node in graph.nodes:
        if isinstance(node.meta.get("val"), FakeTensor):
            return node.meta["val"].fake_mode
    raise ValueError("the graph was not traced with fake tensors")
