"""The Hopper kernel of ``fp8_linear`` for few rows without a GPU: what it compiles to, how it divides the weight."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mlacompile.testing.scaled import E4M3

pytest.importorskip("triton", reason="kernels are compiled by Triton, which the dev extra brings")

from mlacompile.kernels.device import SMEM
from mlacompile.kernels.fp8_linear import hopper, stream
from mlacompile.kernels.fp8_linear.stream_launch import stream_launches
from mlacompile.kernels.fp8_linear.stream_tiles import STRIPS, StreamTiles, choose_stream_tiles
from mlacompile.testing.sass import compile_for, table
from mlacompile.testing.scaled import worst
from tests.kernels import gluon_in_python, wrong_in_python


@pytest.mark.parametrize(
    ("m", "rows", "k", "dtype", "tiles"),
    [
        (64, (18432, 18432), 7168, torch.bfloat16, StreamTiles(64, 2, 32)),
        (33, (24576,), 1536, torch.float16, StreamTiles(64, 1, 64)),
        (64, (7168,), 16384, torch.bfloat16, StreamTiles(64, 1, parts=2)),
        (64, (1536, 576), 7168, torch.bfloat16, StreamTiles(64, 2, 64, parts=7)),
        (128, (36864,), 7168, torch.bfloat16, StreamTiles(128, 1, 16)),
        (128, (24576,), 1536, torch.bfloat16, StreamTiles(128, 1, 64)),
    ],
    ids=str,
)
@pytest.mark.parametrize("normed", [False, True])
def test_what_it_compiles_to(
    m: int, rows: tuple[int, ...], k: int, dtype: torch.dtype, tiles: StreamTiles, normed: bool,
    record_property: Callable[[str, object], None],
) -> None:  # fmt: skip
    def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    x, x_descale = meta(m, k, dtype=E4M3), meta(m, -(-k // 128))
    weights, descales = [meta(n, k, dtype=E4M3) for n in rows], [meta(-(-n // 128), -(-k // 128)) for n in rows]
    squares = meta(m, 4) if normed else None
    launches = stream_launches(x, x_descale, weights, descales, meta(m, sum(rows), dtype=dtype), tiles, squares)
    assert len(launches) == (1 if tiles.parts == 1 else 2)
    main, *rest = (compile_for(each.kernel, each.arguments, each.options, name=f"stream {tiles}") for each in launches)
    record_property("compiled", table([main, *rest]))
    pieces = 2 if tiles.strip else 1
    assert main.counts["QGMMA"] == 2 * 4 * pieces, "64 rows by 32 columns of a block, of blocks and of strips"
    roots = 4 if normed else 0  # of two rows, in either group
    assert main.counts["FFMA"] == tiles.columns + tiles.strip_columns + roots, "each sum is multiplied and added once"
    boxes = tiles.blocks + (1 if tiles.strip else 0)
    assert main.counts["UTMALDG"] == 2 * (1 + boxes * len(rows)), "x and each weight come by TMA, two blocks at once"
    assert main.counts["HGMMA"] == main.counts["HMMA"] == main.counts["LDGSTS"] == 0
    assert main.serialized == 0, "ptxas found a wgmma whose operands are still in use, and waits for it"
    assert main.unordered == 0, "a thread arrives for warps that may not have come so far"
    assert all(built.local_memory == built.spill_bytes == 0 for built in (main, *rest))
    assert SMEM * 0.8 < main.smem <= SMEM, "what is in flight hides the latency of memory"


@pytest.mark.parametrize(
    ("m", "n", "k", "tiles"),
    [
        (64, 36864, 7168, StreamTiles(64, 2, 32)),
        (64, 18432, 7168, StreamTiles(64, 1, 32)),
        (64, 7168, 16384, StreamTiles(64, 1, parts=2)),
        (17, 24576, 1536, StreamTiles(64, 1, 64)),
        (64, 2112, 7168, StreamTiles(64, 1, parts=7)),
        (128, 24576, 1536, StreamTiles(128, 1, 64)),
    ],
    ids=str,
)
def test_tiles_that_were_fastest_are_chosen(m: int, n: int, k: int, tiles: StreamTiles) -> None:
    assert choose_stream_tiles(m, n, k, 132) == tiles
    assert choose_stream_tiles(m, n, k, 132, tiles.parts) == tiles, "a product in parts is cut as the graph says"


@given(st.integers(1, 128), st.integers(1, 40000), st.integers(1, 20000), st.integers(1, 200))
def test_chosen_tiles_fit(m: int, n: int, k: int, sms: int) -> None:
    tiles, groups = choose_stream_tiles(m, n, k, sms), -(-k // 128)
    assert m <= tiles.block_m
    assert tiles.stages >= 3
    assert tiles.strip_columns == 0 or tiles.strip_columns >= 16
    assert -(-groups // -(-groups // tiles.parts)) == tiles.parts, "no part is empty"


def in_python(
    monkeypatch: pytest.MonkeyPatch, m: int, rows: tuple[int, ...], k: int, tiles: StreamTiles, programs: int,
    stretches: int = 0, stages: int = 3,
) -> str:  # fmt: skip
    """The kernel's own text, its launch but for the number of stages; where its results are wrong."""
    random = torch.Generator().manual_seed(0)
    x, *weights = (torch.randint(-4, 5, (height, k), generator=random).to(E4M3) for height in (m, *rows))
    blocks = -(-k // 128)
    # Scales of a quarter and more: no result is so small that float16 keeps fewer bits of it than the bound allows.
    heights = (m, *(-(-r // 128) for r in rows))
    x_descale, *descales = (0.25 + torch.rand(height, blocks, generator=random) for height in heights)
    squares = torch.rand(m, stretches, generator=random) if stretches else None
    out = torch.full((m, sum(rows)), torch.nan, dtype=torch.float16)
    monkeypatch.setattr("mlacompile.kernels.fp8_linear.stream_launch.sms_of", lambda device: programs)
    launch, *_ = stream_launches(x, x_descale, weights, descales, out, tiles, squares, 1e-3)
    launch.arguments["STAGES"] = stages
    parts = launch.arguments["p_part"]
    if parts is not None:
        parts.fill_(torch.nan)
    gluon_in_python.run([stream, hopper], launch)

    left = x.double() * x_descale.double().repeat_interleave(128, 1)[:, :k]
    wide = [d.double().repeat_interleave(128, 0).repeat_interleave(128, 1) for d in descales]
    right = torch.cat([w.double() * d[: w.shape[0], :k] for w, d in zip(weights, wide, strict=True)])
    want, sizes = left @ right.T, left.abs() @ right.abs().T
    if squares is not None:
        root = (squares.double().sum(1, keepdim=True) / k + 1e-3).rsqrt()
        want, sizes = want * root, sizes * root
    bound = sizes * (blocks + 8) * 2.0**-23 + 1e-9  # sums of a block are exact
    if parts is None:
        return worst(out, want, bound + want.abs() * 2.0**-11 * 1.01)
    return worst(parts.double().sum(0), want, bound)


@pytest.mark.parametrize("stretches", [0, 1, 3])
@pytest.mark.parametrize(
    ("m", "rows", "k", "tiles", "programs"),
    [
        (64, (600,), 784, StreamTiles(64, 2, 32), 3),
        (20, (200,), 144, StreamTiles(64, 1, 64), 2),
        (100, (456,), 400, StreamTiles(128, 1, 16), 2),
        (7, (128,), 1040, StreamTiles(64, 1, parts=3), 2),
        (30, (256, 200), 272, StreamTiles(64, 1, 32), 1),
        (30, (384, 1000), 272, StreamTiles(64, 2, 64, parts=2), 5),
        (128, (500,), 656, StreamTiles(128, 1, 64, parts=2), 2),
        (64, (8,), 16, StreamTiles(64, 2, 64), 1),
    ],
    ids=str,
)
def test_in_python(
    m: int, rows: tuple[int, ...], k: int, tiles: StreamTiles, programs: int, stretches: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Its partitions as threads: tiles, strips, parts, scales, stages, edges, roots."""
    wrong = in_python(monkeypatch, m, rows, k, tiles, programs, stretches)
    assert not wrong, wrong


@settings(max_examples=15, deadline=None)
@given(
    st.integers(1, 128), st.integers(0, 3), st.integers(1, 60), st.integers(1, 60), st.integers(1, 2),
    st.sampled_from(STRIPS), st.integers(1, 3), st.integers(1, 4), st.integers(0, 3), st.integers(2, 6),
)  # fmt: skip
def test_any_sizes_in_python(
    m: int, first: int, n: int, k: int, blocks: int, strip: int, parts: int, programs: int, stretches: int, stages: int
) -> None:
    """first: blocks of rows of a first weight, if there are two."""
    tiles = StreamTiles(64 if m <= 64 else 128, blocks if m <= 64 else 1, strip, parts)
    assume(tiles.strip_columns == 0 or tiles.strip_columns >= 16)
    with pytest.MonkeyPatch.context() as patched:
        rows = (128 * first, 8 * n) if first else (8 * n,)
        wrong = in_python(patched, m, rows, 16 * k, tiles, programs, stretches, stages)
    assert not wrong, wrong


ARRIVE = "mbarrier.arrive(room.empty.index(stage), count=1)"


@pytest.mark.parametrize(
    ("function", "changes"),
    [
        ("_multiply", [(ARRIVE, "pass"), ("factor = x_scale * w_scale", f"{ARRIVE}; factor = x_scale * w_scale")]),
        ("_multiply", [(ARRIVE, "pass")]),
        ("_multiply", [(ARRIVE, f"{ARRIVE}; {ARRIVE}")]),
        ("_multiply", [("mbarrier.wait(room.full.index(stage), (g // STAGES) & 1)", "pass")]),
        ("_multiply", [("(g // STAGES) & 1)", "((g // STAGES) & 1) ^ 1)")]),
        ("_fetch", [("mbarrier.wait(room.empty.index(stage), (((g + ahead) // STAGES) & 1) ^ 1)", "pass")]),
        ("_fetch", [("((g + ahead) // STAGES) & 1) ^ 1)", "((g + ahead) // STAGES) & 1))")]),
        ("_fetch", [("+ BLOCKS * COLUMNS + STRIP) * BLOCK_K", "+ BLOCKS * COLUMNS) * BLOCK_K")]),
        ("_multiply", [("tma.store_wait(0)  # what the item before has left", "pass")]),
        ("_multiply", [("_launch_later()\n    tma.store_wait(0)", "_launch_later()")]),
        ("_leave", [("fence_async_shared()", "pass")]),
        ("_multiply", [("gl.minimum(k + 2, end - 1)", "gl.minimum(k + 1, end - 1)")]),
        ("_multiply", [("UPPER, row + LEFT, M, N)", "UPPER, row, M, N)")]),
        ("_multiply", [("side + SIDE, M, N)", "side, M, N)")]),
        ("_scales_of", [("row = gl.minimum(row, N - 1)", "pass")]),
    ],
)
def test_what_is_wrong_is_found(function: str, changes: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Stages given back early or never, waits and fences left out, wrong parities and places."""
    wrong_in_python.rewrite(monkeypatch, stream, function, *changes)

    def run(patched: pytest.MonkeyPatch) -> str:
        return "".join(in_python(patched, 30, (n,), 656, StreamTiles(64, 1, 32), 1) for n in (600, 200))

    assert wrong_in_python.is_found(run)
