"""The Hopper kernel of ``fp8_linear`` without a GPU: what it compiles to, how it divides its work, what it refuses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mlacompile.kernels import registry
from mlacompile.kernels.device import SMEM
from mlacompile.kernels.fp8_linear import supports
from mlacompile.testing.scaled import E4M3, make_product, worst

pytest.importorskip("triton", reason="kernels are compiled by Triton, which the dev extra brings")

from mlacompile.kernels.fp8_linear import hopper
from mlacompile.kernels.fp8_linear.hopper_launch import (
    TILES,
    HopperTiles,
    choose_hopper_tiles,
    cycles,
    hopper_launches,
)
from mlacompile.testing.sass import compile_for, table
from tests.kernels import gluon_in_python, wrong_in_python

#: (m, n, k, dtype, tiles): every tile, one and several parts of K, large and small sizes, both dtypes.
VARIANTS = [
    (4096, 24576, 1536, torch.bfloat16, HopperTiles(256, 128)),
    (4096, 2112, 7168, torch.float16, HopperTiles(256, 128, 3)),
    (128, 7168, 16384, torch.bfloat16, HopperTiles(128, 128, 2)),
    (1000, 24576, 1536, torch.float16, HopperTiles(128, 128)),
    (128, 2112, 7168, torch.bfloat16, HopperTiles(128, 64, 4)),
    (1, 136, 16, torch.bfloat16, HopperTiles(128, 64)),
]


@pytest.mark.parametrize(("m", "n", "k", "dtype", "tiles"), VARIANTS, ids=str)
def test_what_it_compiles_to(
    m: int, n: int, k: int, dtype: torch.dtype, tiles: HopperTiles, record_property: Callable[[str, object], None]
) -> None:
    def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    x, x_descale = meta(m, k, dtype=E4M3), meta(m, -(-k // 128))
    weight, descale = meta(n, k, dtype=E4M3), meta(-(-n // 128), -(-k // 128))
    launches = hopper_launches(x, x_descale, weight, descale, meta(m, n, dtype=dtype), tiles)
    assert len(launches) == 1 + (tiles.parts > 1)
    launch = launches[0]
    built = compile_for(launch.kernel, launch.arguments, launch.options, name=f"fp8_hopper {tiles} {m}x{n}x{k}")
    record_property("compiled", table([built]))
    products = tiles.block_m // 64 * 4  # 64 rows by 32 columns of a block, of both groups of warps
    assert built.counts["QGMMA"] == 2 * products, "each in the loop over blocks and after it"
    assert built.counts["FFMA"] == 2 * tiles.block_m * tiles.block_n // 128, "each sum is multiplied and added once"
    assert built.counts["UTMALDG"] == 2, "x and the weight should come by TMA"
    assert built.counts["LDGSTS"] == built.counts["HGMMA"] == built.counts["HMMA"] == 0
    assert built.serialized == 0, "ptxas found a wgmma whose operands are still in use, and waits for it"
    assert built.unordered == 0, "a thread arrives for warps that may not have come so far"
    assert built.local_memory == built.spill_bytes == 0
    assert built.registers <= 168, "12 warps share the registers until the partitions take theirs"
    assert built.smem <= SMEM


def python_item(
    monkeypatch: pytest.MonkeyPatch, m: int, n: int, k: int, tiles: HopperTiles
) -> list[tuple[int, int, int, int, int]]:
    """What ``_item`` makes of every item, as plain Python."""
    monkeypatch.setattr(hopper, "gl", SimpleNamespace(minimum=min))
    blocks = -(-k // 128)
    work = SimpleNamespace(
        tiles_m=-(-m // tiles.block_m), tiles_n=-(-n // tiles.block_n), blocks=blocks,
        blocks_a_part=-(-blocks // tiles.parts),
    )  # fmt: skip
    items = work.tiles_m * work.tiles_n * tiles.parts
    return [hopper._item.fn(work, i, tiles.band) for i in range(items)]


@pytest.mark.parametrize(
    ("m", "n", "k", "tiles"),
    [
        (4096, 24576, 1536, HopperTiles(256, 128)),
        (5000, 2112, 784, HopperTiles(256, 128)),
        (3000, 1000, 7168, HopperTiles(128, 64, 4)),
        (1, 8, 16, HopperTiles(128, 128)),
    ],
)
def test_every_block_of_every_tile_is_taken_once(
    m: int, n: int, k: int, tiles: HopperTiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: Counter[tuple[int, int, int]] = Counter()
    parts = set()
    for i_m, i_n, part, first, end in python_item(monkeypatch, m, n, k, tiles):
        assert first < end, "a program would wait for a block that nobody fetches"
        taken.update((i_m, i_n, block) for block in range(first, end))
        parts.add((i_m, i_n, part))
    assert set(taken.values()) == {1}
    assert len(taken) == -(-m // tiles.block_m) * -(-n // tiles.block_n) * -(-k // 128)
    assert len(parts) * -(-k // 128) == len(taken) * tiles.parts


def test_what_runs_at_once_reads_few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    tiles = HopperTiles(256, 128)
    items = python_item(monkeypatch, 8192, 24576, 1536, tiles)[1320:1452]
    rows = [256 * len({i_m for i_m, *_ in items}), 128 * len({i_n for _, i_n, *_ in items})]
    assert sum(rows) < 2.2 * (132 * 256 * 128) ** 0.5, "a square reads twice its side"


def test_tiles_fit_and_fill_the_gpu() -> None:
    for tile in TILES:
        held = tile.stages * (tile.block_m + tile.block_n) * 128 + 2 * 64 * tile.block_n * 2
        assert SMEM - 2048 - (tile.block_m + tile.block_n) * 128 < held <= SMEM - 2048
    assert HopperTiles(256, 128).stages == 4
    assert choose_hopper_tiles(4096, 7168, 16384, 132) == HopperTiles(256, 128)
    assert choose_hopper_tiles(128, 24576, 1536, 132) == HopperTiles(128, 128), "no rows are wasted"
    assert choose_hopper_tiles(128, 2112, 7168, 132).parts > 3, "17 tiles would leave most of it idle"
    assert choose_hopper_tiles(128, 136, 100, 132).parts == 1, "there is one block only"
    assert cycles(HopperTiles(256, 128), 8192, 8192, 8192, 132) < cycles(HopperTiles(128, 128), 8192, 8192, 8192, 132)


def test_it_says_why_not() -> None:
    def reasons(m: int, n: int, k: int, dtype: torch.dtype = torch.bfloat16, **kinds: object) -> str:
        return "; ".join(supports.hopper_reasons(*make_product(m, n, k, **kinds).tensors, dtype))  # type: ignore[arg-type]

    assert reasons(4, 128, 128, quantized=True).count(";") == 0, "only that there is no GPU here"
    assert "CUDA device" in reasons(4, 128, 128, quantized=True)
    assert "not quantized" in reasons(4, 128, 128)
    assert "every head" in reasons(4, 128, 128, heads=2, quantized=True)
    assert "float32" in reasons(4, 128, 128, torch.float32, quantized=True)
    assert "rows of 300 results" in reasons(4, 300, 128, quantized=True)
    assert "16 bytes" in reasons(4, 128, 200, quantized=True)


def test_which_kernel_is_chosen() -> None:
    def chosen(m: int, n: int, k: int) -> str:
        x, weight = torch.empty(m, k, device="meta"), torch.empty(n, k, device="meta")
        tensors = (x, x, weight, weight, torch.bfloat16)
        unable = {"heads"} if m <= supports.MOST_ROWS else {"heads", "gluon"}
        able = [kernel for kernel in registry.kernels("fp8_linear") if kernel.name not in unable]
        return next(kernel.name for kernel in able if not kernel.slower(*tensors))

    assert chosen(1, 4096, 7168) == "gluon"
    assert chosen(16, 7168, 16384) == chosen(128, 2112, 7168) == "triton"
    assert chosen(64, 18432, 7168) == chosen(17, 576, 7168) == chosen(128, 24576, 1536) == "stream"
    assert chosen(128, 7168, 16384) == chosen(512, 4096, 128) == "hopper"
    assert chosen(512, 4096, 8192) == "cublas"


def in_python(
    monkeypatch: pytest.MonkeyPatch, m: int, n: int, k: int, tiles: HopperTiles, programs: int, stages: int = 3
) -> str:
    """The kernel's own text, its launch but for the number of stages; where its results are wrong."""
    random = torch.Generator().manual_seed(0)
    x, weight = (torch.randint(-4, 5, (rows, k), generator=random).to(E4M3) for rows in (m, n))
    blocks = -(-k // 128)
    # Scales of a quarter and more: no result is so small that float16 keeps fewer bits of it than the bound allows.
    x_descale, descale = (0.25 + torch.rand(rows, blocks, generator=random) for rows in (m, -(-n // 128)))
    out = torch.full((m, n), torch.nan, dtype=torch.float16)
    monkeypatch.setattr("mlacompile.kernels.fp8_linear.hopper_launch.sms_of", lambda device: programs)
    launch, *_ = hopper_launches(x, x_descale, weight, descale, out, tiles)
    launch.arguments["STAGES"] = stages
    parts = launch.arguments["p_part"]
    if parts is not None:
        parts.fill_(torch.nan)
    gluon_in_python.run([hopper], launch)

    left = x.double() * x_descale.double().repeat_interleave(128, 1)[:, :k]
    wide = descale.double().repeat_interleave(128, 0).repeat_interleave(128, 1)[:n, :k]
    right = weight.double() * wide
    want = left @ right.T
    bound = left.abs() @ right.abs().T * (blocks + 8) * 2.0**-23 + 1e-9  # sums of a block are exact
    if parts is None:
        return worst(out, want, bound + want.abs() * 2.0**-11 * 1.01)
    return worst(parts.double().sum(0), want, bound)


@pytest.mark.parametrize(
    ("m", "n", "k", "tiles"),
    [
        (300, 200, 784, HopperTiles(256, 128)),
        (700, 136, 144, HopperTiles(256, 128)),
        (300, 200, 784, HopperTiles(128, 64, 2)),
        (130, 264, 1552, HopperTiles(128, 128)),
        (1, 8, 1040, HopperTiles(256, 128, 3)),
    ],
)
def test_in_python(m: int, n: int, k: int, tiles: HopperTiles, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its partitions as threads: rows, scales, barriers, stages and edges."""
    wrong = in_python(monkeypatch, m, n, k, tiles, 2)
    assert not wrong, wrong


@settings(max_examples=12, deadline=None)
@given(
    st.integers(1, 600), st.integers(1, 40), st.integers(1, 60), st.sampled_from(TILES), st.integers(1, 4),
    st.integers(1, 4), st.integers(2, 6),
)  # fmt: skip
def test_any_sizes_in_python(m: int, n: int, k: int, tile: HopperTiles, parts: int, programs: int, stages: int) -> None:
    with pytest.MonkeyPatch.context() as patched:
        tiles = HopperTiles(tile.block_m, tile.block_n, parts)
        wrong = in_python(patched, m, 8 * n, 16 * k, tiles, programs, stages)
    assert not wrong, wrong


ARRIVE = "mbarrier.arrive(room.empty.index(stage), count=1)"
LOOP = f"""{ARRIVE}
                lower = _added(lower, block, lower_factor)"""
FULL = """(g // STAGES) & 1)
            block = _product(room, stage, UPPER, block, never)
            upper_factor"""
LAST = f"""{ARRIVE}
            lower = _added(lower, block, lower_factor)"""


@pytest.mark.parametrize(
    ("function", "changes"),
    [
        ("_multiply", [(LOOP, LOOP.replace(ARRIVE, "pass")), ("o_w += 1", f"{ARRIVE}; o_w += 1")]),
        ("_multiply", [(LAST, LAST.replace(ARRIVE, "pass")), ("upper = _added(upper, block, upper_scale * w_scale)",
         f"upper = _added(upper, block, upper_scale * w_scale); {ARRIVE}")]),
        ("_multiply", [(LAST, LAST.replace(ARRIVE, "pass"))]),
        ("_multiply", [(LAST, LAST.replace(ARRIVE, f"{ARRIVE}; {ARRIVE}"))]),
        ("_multiply", [(FULL, FULL.replace("& 1", "& 1 ^ 1"))]),
        ("_fetch", [("mbarrier.wait(room.empty.index(stage), ((g // STAGES) & 1) ^ 1)", "pass")]),
        ("_fetch", [("((g // STAGES) & 1) ^ 1", "(g // STAGES) & 1")]),
        ("_fetch", [("(BLOCK_M + BLOCK_N) * BLOCK_K", "BLOCK_M * BLOCK_K")]),
        ("_sent", [("tma.store_wait(0)", "pass")]),
        ("_sent", [("fence_async_shared()", "pass")]),
        ("_multiply", [("_launch_later()\n    tma.store_wait(0)", "_launch_later()")]),
        ("_multiply", [("o_lower += stride_xsk", "pass")]),
        ("_multiply", [("row + ROWS, column", "row, column")]),
        ("_item", [("i // height, part", "i // BAND, part")]),
    ],
)  # fmt: skip
def test_what_is_wrong_is_found(function: str, changes: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Stages given back early or never, waits and fences left out, wrong parities and places."""
    wrong_in_python.rewrite(monkeypatch, hopper, function, *changes)
    assert wrong_in_python.is_found(lambda patched: in_python(patched, 300, 200, 784, HopperTiles(256, 128), 1))
