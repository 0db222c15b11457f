"""Any rotary frequencies come out of a stock class, to the last bits of float32."""

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import AutoConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3RotaryEmbedding

from mlacompile.convert import stock
from mlacompile.convert.rope import default_theta, longrope


def table_of_the_class(parameters: dict, pairs: int, positions: int = 4096) -> DeepseekV3RotaryEmbedding:
    config = AutoConfig.for_model(
        "deepseek_v3", qk_rope_head_dim=2 * pairs, rope_parameters=parameters, max_position_embeddings=positions
    )
    return DeepseekV3RotaryEmbedding(config)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(2.0**-20, 1.0, width=32) | st.sampled_from([1.0, 0.5]), min_size=1, max_size=40),
    st.sampled_from([1e4, 5e5, 1e6]),
)
@example([1.0] * 5 + [0.969034731388092] + [1.0] * 5, 1e4)  # no factor gives it nearer than two units in the last place
def test_frequencies_survive(frequencies: list[float], theta: float) -> None:
    """The class computes 1 / (factor * power). Neighbouring factors differ by 2^-23 at most, their products, rounded by
    2^-24 each, by 2^-22: the nearest is off by half of that, and its reciprocal rounded by 2^-24."""
    wanted = torch.tensor(frequencies)
    made = table_of_the_class(longrope(wanted, theta=theta, positions=4096), len(wanted))
    assert made.attention_scaling == 1.0
    assert ((made.inv_freq - wanted).double().abs() <= wanted.double() * (2.0**-23 + 2.0**-24)).all()


def test_lanes_that_never_turn() -> None:
    """Frequency zero has an infinite factor, which JSON cannot say; at the largest finite one a lane stands still."""
    wanted = torch.tensor([1.0, 0.0, 0.1, 0.0])
    parameters = longrope(wanted, theta=1e4, positions=4096)
    assert all(math.isfinite(factor) for factor in parameters["short_factor"])
    made = table_of_the_class(parameters, 4).inv_freq
    assert (made[1::2] * 1e7 < 1e-20).all()
    torch.testing.assert_close(made[0::2], wanted[0::2])


def test_long_and_short_texts_turn_alike() -> None:
    wanted = 1e4 ** -torch.linspace(0, 1, 8)
    made = table_of_the_class(longrope(wanted, theta=1e4, positions=16), 8, positions=16)
    before = made.inv_freq.clone()
    made(torch.ones(1), torch.arange(64)[None])
    assert made.inv_freq.equal(before)


@pytest.mark.parametrize("theta", [1e4, 1e5, 5e5, 123.0, 1e6])
@pytest.mark.parametrize("width", [4, 64, 128])
def test_default_tables_are_known(theta: float, width: int) -> None:
    table = 1.0 / (theta ** (torch.arange(0, width, 2, dtype=torch.float32) / width))
    assert default_theta(table) == pytest.approx(theta, rel=1e-5)
    made = table_of_the_class({"rope_type": "default", "rope_theta": default_theta(table)}, width // 2).inv_freq
    torch.testing.assert_close(made, table, rtol=1e-5, atol=0)


def test_other_tables_are_not_default_ones() -> None:
    table = 1e4 ** -(torch.arange(16) / 16)
    for other in (table * 0.5, table.flip(0), table.repeat(2), torch.cat([table[:8], table[8:] / 4]), table[:1]):
        assert default_theta(other) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_of_the_latent_does_nothing(dtype: torch.dtype) -> None:
    """For latents of any usual size, in both dtypes a checkpoint may be loaded in."""
    gain, undo = stock._gains(dtype)
    assert torch.tensor(undo).to(dtype).item() == undo
    for size in (1e-6, 1.0, 1e4):
        c = torch.randn(64, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * size
        stored = c * stock.SHRINK
        normalized = stored * torch.rsqrt(stored.square().mean() + stock.LATENT_EPS)
        for loaded, tolerance in ((gain, 1e-7), (torch.tensor(gain).bfloat16().item(), 1e-3)):
            torch.testing.assert_close(normalized * loaded * undo, c, rtol=tolerance, atol=0)
