"""Axes followed backwards: regrouping of atoms, and the subgraph they describe run again at other sizes.

A cone evaluated at another batch and length must be what the very function computes there; every structural op that a
key may pass on its way has an example.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from mlacompile.passes.axes import BATCH, HEAD, TOKEN, Atom, dims_for, regroup
from mlacompile.passes.cone import WalkError, dynamic_nodes, feature_width, place, walk
from mlacompile.passes.replay import evaluate


def borders(sizes: list[int]) -> set[int]:
    """Where dimensions end, counted from the innermost: products of the sizes behind each border."""
    return {math.prod(sizes[i:]) for i in range(1, len(sizes))} - {1, math.prod(sizes)}


ATOMS = st.lists(st.tuples(st.sampled_from([BATCH, HEAD, TOKEN, "D"]), st.integers(2, 12)), max_size=4)


@given(ATOMS, st.lists(st.sampled_from([2, 3, 4, 5, 6, 7, 8, 12]), max_size=8))
@settings(deadline=None)
def test_regroup_deals_atoms_where_borders_allow(pairs: list[tuple[str, int]], wanted: list[int]) -> None:
    """A border inside an atom must divide it evenly, and may not cut batch or tokens; these are all the conditions."""
    atoms = [Atom(label, size) for label, size in pairs]
    left, sizes = math.prod(a.size for a in atoms), []
    for want in wanted:  # what divides the rest; the rest at the end
        sizes.append(math.gcd(want, left))
        left //= sizes[-1]
    sizes.append(left)
    got = regroup(atoms, sizes)
    possible = True
    inner = 1
    for atom in reversed(atoms):
        for border in borders(sizes):
            if inner < border < inner * atom.size:
                possible &= border % inner == 0 and inner * atom.size % border == 0 and not atom.resizable
        inner *= atom.size
    assert (got is not None) == possible
    if got is not None:
        assert [math.prod(a.size for a in dim) for dim in got] == sizes
        flat = [a for dim in got for a in dim]
        assert borders([a.size for a in flat]) == borders(sizes) | borders([a.size for a in atoms])
        for atom in atoms:  # every atom is there, whole or cut, in its place
            size = 1
            while size < atom.size:
                part = flat.pop(0)
                assert part.label == atom.label
                size *= part.size
            assert size == atom.size
        assert not flat


def test_regroup_refuses_other_sizes() -> None:
    assert regroup([Atom(HEAD, 6)], [7]) is None
    assert regroup([Atom(HEAD, 6)], [3]) is None
    assert regroup([Atom(HEAD, 6)], [3, 2, 2]) is None


H, N, R = 3, 4, 6


def joint(c: Tensor, w: Tensor) -> Tensor:
    return (c @ w.t()).view(*c.shape[:2], H, N).transpose(1, 2)


def heads_first(c: Tensor, w: Tensor) -> Tensor:
    return torch.matmul(c[:, None], w.view(1, H, N, R).transpose(2, 3))


def by_einsum(c: Tensor, w: Tensor) -> Tensor:
    return torch.einsum("btr,hnr->bhtn", c, w.view(H, N, R))


def catted(c: Tensor, w: Tensor) -> Tensor:
    k = joint(c, w)
    return torch.cat([k[..., 2:], k[..., :2]], -1)


def stacked(c: Tensor, w: Tensor) -> Tensor:
    k = joint(c, w)
    return torch.stack([k[..., ::2], k[..., 1::2]], -1).flatten(-2)


def padded(c: Tensor, w: Tensor) -> Tensor:
    return torch.nn.functional.pad(joint(c, w)[..., 1:3], (1, 1))


def written(c: Tensor, w: Tensor) -> Tensor:
    k = joint(c, w)
    out = torch.zeros_like(k).slice_scatter(k[..., :2], -1, 2, 4)
    return out.slice_scatter(k[..., 2:], -1, 0, 2)


def selected(c: Tensor, w: Tensor) -> Tensor:
    k = joint(c, w)
    return k.select_scatter(k.select(-1, 0), -1, 3)


def unbound(c: Tensor, w: Tensor) -> Tensor:
    a, b, d, e = joint(c, w).unbind(-1)
    return torch.stack([e, b, d, a], -1)


def split(c: Tensor, w: Tensor) -> Tensor:
    a, b = joint(c, w).split([1, 3], -1)
    d, e = b.chunk(2, -1)
    return torch.cat([e, a, d], -1) * 0.5


def shared(c: Tensor, w: Tensor) -> Tensor:
    return joint(c, w) + c[:, None, :, :N].expand(-1, H, -1, -1) - c[:, None, :, :N].repeat(1, H, 1, 1) / 3


def folded(c: Tensor, w: Tensor) -> Tensor:
    k = (c.reshape(-1, R) @ w.t()).view(*c.shape[:2], H * N)
    return k.unflatten(-1, (H, N)).permute(2, 0, 1, 3).permute(1, 0, 2, 3).neg()


def summed(c: Tensor, w: Tensor) -> Tensor:
    return (c[:, None, :, None, :] * w.view(1, H, 1, N, R)).sum(-1)


def biased(c: Tensor, w: Tensor) -> Tensor:
    return torch.nn.functional.linear(c, w, w[:, 0]).view(*c.shape[:2], H, N).transpose(1, 2)


FUNCTIONS = [
    *(joint, heads_first, by_einsum, catted, stacked, padded, written, selected, unbound, split, shared, folded),
    *(summed, biased),
]


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_a_cone_runs_again_at_other_sizes(function: Callable[[Tensor, Tensor], Tensor]) -> None:
    c, w = torch.randn(2, 7, R, dtype=torch.float64), torch.randn(H * N, R, dtype=torch.float64)
    graph = make_fx(function, tracing_mode="fake")(c, w).graph
    _, weight = graph.find_nodes(op="placeholder")
    root = graph.output_node().args[0]
    cone = walk([(root, dims_for((2, H, 7, N), (BATCH, HEAD, TOKEN, "D")))], dynamic_nodes(graph, {weight}))
    assert set(cone.weights) <= {weight, *weight.users}
    for batch, tokens in ((2, 7), (1, 1), (1, 4), (3, 1), (3, 5)):
        c = torch.randn(batch, tokens, R, dtype=torch.float64)
        # leaves may be parts of the inputs: give each what the function itself would have computed there
        feeds = {}
        latents = cone.latent_nodes()
        for leaf in (*latents, *cone.weights):
            whole = c if leaf in latents else w
            feeds[leaf] = leaf_value(leaf, whole, cone.dims[leaf], leaf in latents)
        got = evaluate(cone, feeds, batch, tokens)[root]
        torch.testing.assert_close(got, function(c, w), rtol=1e-12, atol=1e-12)


def leaf_value(leaf: torch.fx.Node, whole: Tensor, dims: tuple, latent: bool) -> Tensor:
    """What a leaf holds when the input it was cut from holds ``whole``."""
    if leaf.op == "placeholder":
        return whole
    assert leaf.target is torch.ops.aten.slice.Tensor
    _, dim, start, stop = leaf.args
    part = whole.narrow(-1, start, min(stop, whole.shape[-1]) - start)
    assert dim == len(leaf.meta["val"].shape) - 1
    return place(part, dims) if latent and feature_width(dims) else part


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda c, w: joint(c, w).tanh(), "not linear"),
        (lambda c, w: joint(c, w).to(torch.int32).to(torch.float64), "not linear"),
        (lambda c, w: joint(c, w).to(torch.float8_e4m3fn).to(torch.float64), "not linear"),
        (lambda c, w: joint(c, w).flip(2), "not linear"),
        (lambda c, w: joint(c, w).roll(1, 1), "not linear"),
        (lambda c, w: torch.cat([joint(c[:, 1:], w), joint(c[:, :1], w)], 2), "not linear"),
    ],
    ids=["tanh", "integers", "float8", "flipped-tokens", "rolled-heads", "cat-of-tokens"],
)
def test_the_walk_ends_where_keys_are_not_linear_in_one_token(function: Callable[..., Tensor], reason: str) -> None:
    c, w = torch.randn(2, 7, R, dtype=torch.float64), torch.randn(H * N, R, dtype=torch.float64)
    graph = make_fx(function, tracing_mode="fake")(c, w).graph
    _, weight = graph.find_nodes(op="placeholder")
    root = graph.output_node().args[0]
    with pytest.raises(WalkError, match=reason):
        walk([(root, dims_for((2, H, 7, N), (BATCH, HEAD, TOKEN, "D")))], dynamic_nodes(graph, {weight}))
