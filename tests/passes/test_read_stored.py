"""``mla_decode`` reads what an FP8 cache stores: through views, with rotary keys of their own factor; and when not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

import mlacompile.ops  # noqa: F401
from mlacompile.ops.fp8_quantize import fp8_quantize
from mlacompile.passes.read_stored import read_stored

B, H, S, T, R, P = 2, 3, 1, 20, 256, 8
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
ops = torch.ops.mlacompile


def inputs(group: int, rope_fp8: bool = False, fp8: torch.dtype = E4M3) -> tuple[Tensor, ...]:
    """q_latent, q_pe, q, descale, k_pe (its factor in one more column of descale when it is FP8)."""
    gen = torch.Generator().manual_seed(0)
    random = [torch.randn(*size, generator=gen) for size in ((B, H, S, R), (B, H, S, P), (B, T, R), (B, T, P))]
    q, descale = fp8_quantize(random[2], group, fp8)
    k_pe = random[3]
    if rope_fp8:
        k_pe, rope_descale = fp8_quantize(k_pe, P, fp8)
        descale = torch.cat((descale, rope_descale), -1)
    return random[0], random[1], q, descale, k_pe


def rewritten(model: Callable[..., Tensor], arguments: tuple[Tensor, ...]) -> tuple[GraphModule, int]:
    gm = make_fx(model, tracing_mode="fake")(*arguments)
    count = read_stored(gm.graph)
    gm.graph.eliminate_dead_code()
    gm.graph.lint()
    gm.recompile()
    torch.testing.assert_close(gm(*arguments), model(*arguments), rtol=1e-5, atol=1e-5)
    return gm, count


def dequantized(gm: GraphModule) -> int:
    return len(gm.graph.find_nodes(op="call_function", target=ops.fp8_dequantize.default))


def decode(q_latent: Tensor, q_pe: Tensor, c_kv: Tensor, k_pe: Tensor) -> Tensor:
    return ops.mla_decode(q_latent, q_pe, c_kv, k_pe, None, None, None, scale=0.1)[0]


@pytest.mark.parametrize("group", [128, R])
@pytest.mark.parametrize("fp8", [E4M3, E5M2])
def test_directly(group: int, fp8: torch.dtype) -> None:
    def model(q_latent: Tensor, q_pe: Tensor, q: Tensor, descale: Tensor, k_pe: Tensor) -> Tensor:
        return decode(q_latent, q_pe, ops.fp8_dequantize(q, descale, group, torch.float32), k_pe)

    gm, count = rewritten(model, inputs(group, fp8=fp8))
    assert (count, dequantized(gm)) == (1, 0)


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "a head dimension and back": lambda x: x.unsqueeze(1).squeeze(1),
    "a prefix of the tokens": lambda x: x[:, :7],
    "reshaped over batch and tokens": lambda x: x.reshape(B * T, -1).reshape(B, T, x.shape[-1]),
    "permuted and back": lambda x: x.permute(1, 0, 2).permute(1, 0, 2),
    "copied": lambda x: x.clone(),
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=list(VIEWS))
@pytest.mark.parametrize("rope_fp8", [False, True])
def test_through_views(view: Callable[[Tensor], Tensor], rope_fp8: bool) -> None:
    def model(q_latent: Tensor, q_pe: Tensor, q: Tensor, descale: Tensor, k_pe: Tensor) -> Tensor:
        c_kv = ops.fp8_dequantize(q, descale[..., :2] if rope_fp8 else descale, 128, torch.float32)
        if rope_fp8:
            k_pe = ops.fp8_dequantize(k_pe, descale[..., 2:], P, torch.float32)
        return decode(q_latent, q_pe, view(c_kv), view(k_pe))

    gm, count = rewritten(model, inputs(128, rope_fp8))
    assert (count, dequantized(gm)) == (1, 0)
    assert not gm.graph.find_nodes(op="call_function", target=torch.ops.aten.cat.default), (
        "the columns lie side by side"
    )


def test_factors_that_lie_apart_are_put_together() -> None:
    def model(q_latent: Tensor, q_pe: Tensor, q: Tensor, descale: Tensor, k_pe: Tensor) -> Tensor:
        c_kv = ops.fp8_dequantize(q, descale[..., 1:], R, torch.float32)  # the rotary key's factor stands first here
        return decode(q_latent, q_pe, c_kv, ops.fp8_dequantize(k_pe, descale[..., :1], P, torch.float32))

    gm, count = rewritten(model, inputs(R, rope_fp8=True))
    assert (count, dequantized(gm)) == (1, 0)
    assert len(gm.graph.find_nodes(op="call_function", target=torch.ops.aten.cat.default)) == 1


NEAR_MISSES: dict[str, tuple[int, Callable[[Tensor], Tensor]]] = {
    "groups of 64": (64, lambda x: x),
    "twice the values": (128, lambda x: x * 2),
    "columns turned": (128, lambda x: x.reshape(B, T, 2, R // 2).transpose(2, 3).reshape(B, T, R)),
    "latents and tokens of one number exchanged": (128, lambda x: x[:, :, :T].transpose(1, 2).repeat(1, 1, R)[..., :R]),
}


@pytest.mark.parametrize(("group", "change"), NEAR_MISSES.values(), ids=list(NEAR_MISSES))
def test_near_misses_stay(group: int, change: Callable[[Tensor], Tensor]) -> None:
    def model(q_latent: Tensor, q_pe: Tensor, q: Tensor, descale: Tensor, k_pe: Tensor) -> Tensor:
        return decode(q_latent, q_pe, change(ops.fp8_dequantize(q, descale, group, torch.float32)), k_pe)

    gm, count = rewritten(model, inputs(group))
    assert (count, dequantized(gm)) == (0, 1)


def test_a_rotary_key_in_fp8_beside_a_latent_that_is_not() -> None:
    def model(q_latent: Tensor, q_pe: Tensor, c_kv: Tensor, descale: Tensor, k_pe: Tensor) -> Tensor:
        return decode(q_latent, q_pe, c_kv, ops.fp8_dequantize(k_pe, descale[..., 1:], P, torch.float32))

    arguments = list(inputs(R, rope_fp8=True))
    arguments[2] = arguments[2].float()
    assert rewritten(model, tuple(arguments))[1] == 0


def test_a_cache_that_no_kernel_reads_stays_dequantized() -> None:
    def model(q_latent: Tensor, q_pe: Tensor, q: Tensor, descale: Tensor, k_pe: Tensor) -> Tensor:
        return decode(q_latent, q_pe, ops.fp8_dequantize(q, descale, R, torch.float32), k_pe)

    gm = make_fx(model, tracing_mode="fake")(*inputs(R))
    asked = []

    def read(*args: Tensor | None, scale: float, causal: bool = False) -> bool:
        asked.append((args[2].dtype, args[8].shape, scale))  # type: ignore[union-attr]
        return False

    assert read_stored(gm.graph, read) == 0
    assert asked == [(E4M3, (B, T, 1), 0.1)]
    assert dequantized(gm) == 1
