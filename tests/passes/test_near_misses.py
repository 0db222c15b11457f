"""What looks like latent attention and is not: left as it was, with the reason that is true.

Every case differs from a plain latent attention layer in one step on the way from the latent to keys and values.
Outputs must be those of the uncompiled module, and the report must say why nothing was rewritten.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention as sdpa

from mlacompile import backend, last_report

# As many sentences as heads: a mask whose first dimension is heads then also fits as one over sentences.
B, H, S, T = 4, 4, 2, 9
N, P, V, R, HIDDEN = 12, 8, 10, 24, 40
OPTIONS = {"rest": "eager"}


class Layer(nn.Module):
    """Latent attention on given caches ``c [B, T, R]`` and ``pe [B, T, P]``, with one step replaced."""

    def __init__(self, near: Near) -> None:
        super().__init__()
        self.near = near
        self.q = nn.Linear(HIDDEN, H * (N + P))
        self.up_k, self.up_v = nn.Linear(R, H * N), nn.Linear(R, H * V)
        self.up_pe = nn.Linear(P, H * P, bias=False)
        self.grouped_k, self.grouped_v = nn.Linear(R, 2 * N), nn.Linear(R, 2 * V)
        self.hyper = nn.Linear(HIDDEN, H * N * R)
        self.gamma = nn.Parameter(torch.rand(H, N) + 0.5)
        self.positions = nn.Parameter(torch.randn(T, H, V))
        self.head_factor = nn.Parameter(torch.rand(H) + 0.5)
        self.down_up = nn.Linear(R, R)
        self.single = nn.ModuleList(nn.Linear(R, V) for _ in range(H))
        self.other = nn.Parameter(torch.randn(B, T, R))

    def heads(self, x: Tensor) -> Tensor:
        """``[B, T, H·D]`` as ``[B, H, T, D]``."""
        return x.unflatten(-1, (H, -1)).transpose(1, 2)

    def keys(self, c: Tensor, x: Tensor) -> Tensor:
        return self.heads(self.up_k(c))

    def values(self, c: Tensor) -> Tensor:
        return self.heads(self.up_v(c))

    def join(self, k: Tensor, pe: Tensor) -> Tensor:
        return torch.cat((k, pe[:, None].expand(-1, H, -1, -1)), -1)

    def forward(self, x: Tensor, c: Tensor, pe: Tensor) -> Tensor:
        q = self.heads(self.q(x))
        return self.near.attend(self, q, x, c, pe).transpose(1, 2).flatten(2)


@dataclass(frozen=True)
class Near:
    """A name, how attention is computed, and what the reason must say."""

    name: str
    attend: Callable[[Layer, Tensor, Tensor, Tensor, Tensor], Tensor]
    reason: str


@dataclass(frozen=True)
class Hit(Near):
    """What looks like a near miss and is latent attention all the same."""


def hit(function: Callable[..., Tensor]) -> Hit:
    return Hit(function.__name__, function, "")


def near(reason: str) -> Callable[[Callable[..., Tensor]], Near]:
    return lambda function: Near(function.__name__, function, reason)


@near("not linear in a latent|keys and values are made of 3 different latents|two different latents")
def rope_keys_of_every_head(m: Layer, q: Tensor, x: Tensor, c: Tensor, pe: Tensor) -> Tensor:
    return sdpa(q, torch.cat((m.keys(c, x), m.heads(m.up_pe(pe))), -1), m.values(c))


@near("rotary key differs from head to head|two different latents")
def rope_keys_scaled_by_head(m: Layer, q: Tensor, x: Tensor, c: Tensor, pe: Tensor) -> Tensor:
    scales = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, H, 1, 1)
    return sdpa(q, torch.cat((m.keys(c, x), pe[:, None] * scales), -1), m.values(c))


@near("come out of silu .*not linear in a latent")
def nonlinearity_behind_the_projection(m: Layer, q: Tensor, x: Tensor, c: Tensor, pe: Tensor) -> Tensor:
    return sdpa(q, m.join(m.heads(nn.functional.silu(m.up_k(c))), pe), m.values(c))


@near("not linear|product of several weights|not one weight times one factor")
def squared_keys(m: Layer, q: Tensor, x: Tensor, c: Tensor, pe: Tensor) -> Tensor:
    k = m.keys(c, x)
    return sdpa(q, m.join(k * k, pe), m.values(c))


@near("not linear in a latent")
def keys_rounded_to_integers(m: Layer, q: Tensor, x: Tensor, c: Tensor, pe: Tensor) -> Tensor:
    return sdpa(q, m.join((10 * m.keys(c, x)).to(torch.int32).float(), pe), m.values(c))


@near("not linear in a latent")
def keys_normalized_head_by_head(m: Layer, q: Tensor, x: Tensor, c: Tensor, pe: Tensor) -> Tensor:
    return sdpa(q, m.join(nn.functional.normalize(m.keys(c, x), dim=-1), pe), m.values(c))


@near("projected from two different latents|made of 3 different latents")
def values_of_another_latent(m: Layer, q: Tensor, x: Tensor, c: Tensor, pe: Tensor) -> Tensor:
    return sdpa(q, m.join(m.keys(c, x), pe), m.values(c.roll(1, 1)))


@near("projected from two different latents")
def keys_of_another_latent_without_rope(m: Layer, q: Tensor, x: Tensor, c: Tensor, pe: Tensor) -> Tensor:
    return sdpa(q[..., :N], m.keys(torch.relu(c), x), m.values(c))


@near("up-projection weight depends on the input")
def weight_made_from_the_input(m: Layer, q: Tensor, x: Tensor, c: Tensor, pe: Tensor) -> Tensor:
    w = m.hyper(x.mean((0, 1))).view(H, N, R)
    return sdpa(q, m.join(torch.einsum("btr,hnr->bhtn", c, w), pe), m.values(c))


@near("4 heads share 2 key up-projections: grouped key heads over a latent")
def grouped_heads_over_a_latent(m: Layer, q: Tensor, x: Tensor, c: Tensor, pe: Tensor) -> Tensor:
    def grouped(y: Tensor) -> Tensor:
        y = y.unflatten(-1, (2, -1)).transpose(1, 2)
        return y[:, :, None].expand(-1, -1, 2, -1, -1).flatten(1, 2)

    return sdpa(q, m.join(grouped(m.grouped_k(c)), pe), grouped(m.grouped_v(c)))


@near("4 query heads share 2 key heads: grouped-query attention")
def grouped_query_attention(m: Layer, q: Tensor, x: Tensor, c: Tensor, pe: Tensor) -> Tensor:
    k = m.grouped_k(c).unflatten(-1, (2, -1)).transpose(1, 2)
    v = m.grouped_v(c).unflatten(-1, (2, -1)).transpose(1, 2)
    return sdpa(q[..., :N], k, v, enable_gqa=True)


@near("stored for every head")
def keys_read_from_an_expanded_cache(m: Layer, q: Tensor, x: Tensor, c: Tensor, pe: Tensor) -> Tensor:
    return sdpa(q[..., :6], c.view(B, T, H, R // H).transpose(1, 2), c.view(B, T, H, R // H).transpose(1, 2))


@near("differs from head to head")
def mask_of_every_head(m: Layer, q: Tensor, x: Tensor, c: Tensor, pe: Tensor) -> Tensor:
    mask = torch.arange(T) <= torch.arange(H).view(1, H, 1, 1) + 2
    return sdpa(q, m.join(m.keys(c, x), pe), m.values(c), mask.expand(B, H, S, T))


@near("differs from head to head")
def mask_of_every_head_without_a_batch_dimension(m: Layer, q: Tensor, x: Tensor, c: Tensor, pe: Tensor) -> Tensor:
    mask = torch.arange(T) <= torch.arange(H).view(H, 1, 1) + 2
    return sdpa(q, m.join(m.keys(c, x), pe), m.values(c), mask.expand(H, S, T))


@near("differs from head to head")
def linear_bias_of_every_head(m: Layer, q: Tensor, x: Tensor, c: Tensor, pe: Tensor) -> Tensor:
    bias = torch.arange(T) * m.head_factor.view(H, 1, 1)
    scores = q @ m.join(m.keys(c, x), pe).transpose(2, 3) * 0.2 + bias
    return scores.softmax(-1) @ m.values(c)


@hit
def keys_scaled_row_by_row(m: Layer, q: Tensor, x: Tensor, c: Tensor, pe: Tensor) -> Tensor:
    return sdpa(q, m.join(m.keys(c, x) * m.gamma[:, None], pe), m.values(c))


@near("table of positions")
def values_with_a_table_of_positions(m: Layer, q: Tensor, x: Tensor, c: Tensor, pe: Tensor) -> Tensor:
    return sdpa(q, m.join(m.keys(c, x), pe), m.values(c) + m.positions.transpose(0, 1))


@hit
def absorbed_by_hand(m: Layer, q: Tensor, x: Tensor, c: Tensor, pe: Tensor) -> Tensor:
    w = m.up_k.weight.view(H, N, R)
    latent = torch.einsum("bhsn,hnr->bhsr", q[..., :N], w)
    shared = c[:, None].expand(-1, H, -1, -1)
    out = sdpa(torch.cat((latent, q[..., N:]), -1), m.join(shared, pe), shared, scale=0.2)
    return torch.einsum("bhsr,hvr->bhsv", out, m.up_v.weight.view(H, V, R))


@hit
def rope_keys_reversed(m: Layer, q: Tensor, x: Tensor, c: Tensor, pe: Tensor) -> Tensor:
    parts = pe[:, None].expand(-1, H, -1, -1).chunk(2, -1)
    return sdpa(q, torch.cat((m.keys(c, x), parts[1], parts[0]), -1), m.values(c))


@near("not linear in a latent")
def tokens_shifted_behind_the_projection(m: Layer, q: Tensor, x: Tensor, c: Tensor, pe: Tensor) -> Tensor:
    return sdpa(q, m.join(m.keys(c, x).roll(1, 2), pe), m.values(c))


@near("keys do not depend on the latent|made of 3 different latents|not linear")
def keys_gated_by_their_own_token(m: Layer, q: Tensor, x: Tensor, c: Tensor, pe: Tensor) -> Tensor:
    gate = torch.sigmoid(c.mean(-1))[:, None, :, None]
    return sdpa(q, m.join(m.keys(c, x) * gate, pe), m.values(c))


@near("latent|depend")
def a_latent_that_is_a_parameter(m: Layer, q: Tensor, x: Tensor, c: Tensor, pe: Tensor) -> Tensor:
    return sdpa(q[..., :N], m.keys(m.other, x), m.values(m.other))


@near(r"not written as scale, mask, softmax and product with V: tanh in between")
def soft_capped_scores(m: Layer, q: Tensor, x: Tensor, c: Tensor, pe: Tensor) -> Tensor:
    scores = q @ m.join(m.keys(c, x), pe).transpose(2, 3) * 0.2
    return torch.tanh(scores).softmax(-1) @ m.values(c)


@hit
def a_sink_beside_the_tokens(m: Layer, q: Tensor, x: Tensor, c: Tensor, pe: Tensor) -> Tensor:
    scores = q @ m.join(m.keys(c, x), pe).transpose(2, 3) * 0.2
    sink = m.head_factor.view(1, H, 1, 1).expand(B, H, S, 1)
    return torch.cat((scores, sink), -1).softmax(-1)[..., :-1] @ m.values(c)


@near("not written as .*masked_fill.* in between")
def a_mask_that_hides_little(m: Layer, q: Tensor, x: Tensor, c: Tensor, pe: Tensor) -> Tensor:
    scores = q @ m.join(m.keys(c, x), pe).transpose(2, 3)
    return (scores.masked_fill(torch.arange(T) > 5, -20000.0) * 1e-4).softmax(-1) @ m.values(c)


@hit
def sinks_that_the_input_decides_and_scores_less_their_maximum(
    m: Layer, q: Tensor, x: Tensor, c: Tensor, pe: Tensor
) -> Tensor:
    scores = q @ m.join(m.keys(c, x), pe).transpose(2, 3) * 0.2
    sink = m.head_factor.view(1, H, 1, 1) * x.mean(-1)[:, None, :, None]
    scores = torch.cat((sink, scores.masked_fill(torch.arange(T) > 5, -torch.inf)), -1)
    scores = scores - scores.max(-1, keepdim=True).values
    return scores.softmax(-1)[..., 1:] @ m.values(c)


@near("not written as")
def scores_shifted_beside_a_sink(m: Layer, q: Tensor, x: Tensor, c: Tensor, pe: Tensor) -> Tensor:
    """Without the sink the shift would not matter."""
    scores = q @ m.join(m.keys(c, x), pe).transpose(2, 3) * 0.2 + 1.0
    sink = m.head_factor.view(1, H, 1, 1).expand(B, H, S, 1)
    return torch.cat((scores, sink), -1).softmax(-1)[..., :-1] @ m.values(c)


@hit
def projected_by_two_weights_in_a_row(m: Layer, q: Tensor, x: Tensor, c: Tensor, pe: Tensor) -> Tensor:
    """As adapters are: ``c w + (c a) b``."""
    k = m.up_k(c) + m.up_k(m.down_up(c))
    return sdpa(q, m.join(m.heads(k), pe), m.heads(m.up_v(m.down_up(c)) + m.up_v(c)))


@hit
def every_head_a_layer_of_its_own(m: Layer, q: Tensor, x: Tensor, c: Tensor, pe: Tensor) -> Tensor:
    k = torch.stack([nn.functional.linear(c, w.clone()) for w in m.up_k.weight.chunk(H)], 1)
    v = torch.stack([layer(c) for layer in m.single], 1)
    return sdpa(q, m.join(k, pe), v)


CASES = [value for value in list(globals().values()) if type(value) is Near]
HITS = [value for value in list(globals().values()) if isinstance(value, Hit)]


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(B, S, HIDDEN).to(dtype), torch.randn(B, T, R).to(dtype), torch.randn(B, T, P).to(dtype)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_near_misses_are_refused_for_the_right_reason(case: Near) -> None:
    layer = Layer(case).eval()
    with torch.no_grad():
        want = layer(*inputs())
        got = torch.compile(layer, backend=backend, options=OPTIONS)(*inputs())
    assert (got - want).abs().max() <= 1e-6 * want.abs().max()
    report = last_report()
    assert (report.absorbed, report.expanded, report.refused) == (0, 0, 1), report
    (site,) = report.sites
    assert re.search(case.reason, site.reason), site.reason
    assert re.search(r"test_near_misses\.py:\d+$", site.source)


@pytest.mark.parametrize("case", HITS, ids=lambda case: case.name)
def test_what_is_linear_is_absorbed_however_it_looks(case: Near) -> None:
    torch.manual_seed(1)
    layer = Layer(case).eval()
    with torch.no_grad():
        want = layer(*inputs())
        got = torch.compile(layer, backend=backend, options=OPTIONS)(*inputs())
    assert last_report().absorbed == 1, [s.reason for s in last_report().sites]
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()


def plain(m: Layer, q: Tensor, x: Tensor, c: Tensor, pe: Tensor) -> Tensor:
    return sdpa(q, m.join(m.keys(c, x), pe), m.values(c))


def test_the_layer_without_a_change_is_absorbed() -> None:
    """Otherwise the refusals above would mean nothing."""
    layer = Layer(Near("plain", plain, "")).eval()
    with torch.no_grad():
        want = layer(*inputs())
        got = torch.compile(layer, backend=backend, options=OPTIONS)(*inputs())
    assert last_report().absorbed == 1
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()


def cached_in_another_dtype(m: Layer, q: Tensor, x: Tensor, c: Tensor, pe: Tensor) -> Tensor:
    k = torch.cat((m.heads(m.up_k(c)).to(pe.dtype), pe[:, None].expand(-1, H, -1, -1)), -1)
    return sdpa(q.to(pe.dtype), k, m.heads(m.up_v(c)).to(pe.dtype)).to(x.dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_mixed_dtypes_are_brought_into_the_one_that_keys_are_made_in(dtype: torch.dtype) -> None:
    """Here float32, that of the rotary key: the rest may not lose more than it does in the model itself."""
    layer = Layer(Near("mixed", cached_in_another_dtype, "")).eval().to(dtype)
    x, c, pe = inputs(dtype)
    with torch.no_grad():
        exact = copy.deepcopy(layer).double()(x.double(), c.double(), pe.double())
        want = layer(x, c, pe.float())
        got = torch.compile(layer, backend=backend, options=OPTIONS)(x, c, pe.float())
    assert last_report().absorbed == 1
    assert (got - exact).square().mean() <= 1.25 * (want - exact).square().mean()


class Router(nn.Module):
    """Softmax over experts, softmax over classes: nothing that attends to tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(HIDDEN, 6), nn.Parameter(torch.randn(6, HIDDEN, HIDDEN))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights = self.gate(x).softmax(-1)
        mixed = torch.einsum("bse,bsd,edf->bsf", weights, x, self.experts)
        return mixed, torch.nn.functional.log_softmax(mixed, -1)


def test_a_router_is_not_attention() -> None:
    router, (x, _, _) = Router().eval(), inputs()
    with torch.no_grad():
        got, want = torch.compile(router, backend=backend, options=OPTIONS)(x), router(x)
    assert last_report().sites == ()
    torch.testing.assert_close(got, want)


class Weighted(nn.Module):
    """Latent attention written out, that also returns its attention weights."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = Layer(Near("plain", plain, ""))

    def forward(self, x: Tensor, c: Tensor, pe: Tensor) -> tuple[Tensor, Tensor]:
        m = self.layer
        weights = (m.heads(m.q(x)) @ m.join(m.keys(c, x), pe).transpose(2, 3) * 0.2).softmax(-1)
        return weights @ m.values(c), weights


def test_attention_weights_that_are_returned_keep_attention_as_it_is() -> None:
    module = Weighted().eval()
    with torch.no_grad():
        got, want = torch.compile(module, backend=backend, options=OPTIONS)(*inputs()), module(*inputs())
    torch.testing.assert_close(got, want)
    (site,) = last_report().sites
    assert site.status == "refused"
    assert "attention weights are used" in site.reason
    assert re.search(r"test_near_misses\.py:\d+$", site.source)


def test_a_mask_of_one_dimension_less_than_known_is_refused_or_right() -> None:
    """A mask over tokens alone broadcasts; whatever becomes of it, the numbers stay."""

    def attend(m: Layer, q: Tensor, x: Tensor, c: Tensor, pe: Tensor) -> Tensor:
        return sdpa(q, m.join(m.keys(c, x), pe), m.values(c), (torch.arange(T) < 5).expand(S, T))

    layer = Layer(Near("tokens", attend, "")).eval()
    with torch.no_grad():
        want = layer(*inputs())
        got = torch.compile(layer, backend=backend, options=OPTIONS)(*inputs())
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()
    assert last_report().absorbed == 1
