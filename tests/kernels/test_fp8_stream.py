"""The Hopper kernel of ``fp8_linear`` for few rows without a GPU: what it compiles to, how it divides the weight."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mlacompile.testing.scaled import E4M3
from tests.kernels import gluon_in_python
from tests.kernels.gluon_in_python import Barrier, Barriers, Descriptor, Memory, Pointer

pytest.importorskip("triton", reason="kernels are compiled by Triton, which the dev extra brings")

from mlacompile.kernels.device import SMEM
from mlacompile.kernels.fp8_linear import stream
from mlacompile.kernels.fp8_linear.stream_launch import stream_launches
from mlacompile.kernels.fp8_linear.stream_tiles import StreamTiles, choose_stream_tiles
from mlacompile.testing.sass import compile_for, table


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
    """The kernel's own text, its partitions as threads: tiles, strips, parts, scales, stages, edges, roots."""
    n, blocks, stages = sum(rows), -(-k // 128), 3
    own = ("_item", "_scales", "_scales_of", "_load_rows", "_roots", "_product", "_leave")
    gluon_in_python.install(monkeypatch, stream, programs, own)
    random = np.random.default_rng(0)
    x, *weights = (random.integers(-4, 5, (height, k)).astype(float) for height in (m, *rows))
    x_descale, *descales = (random.random((height, blocks)) for height in (m, *(-(-r // 128) for r in rows)))
    wide = [np.repeat(np.repeat(d, 128, 0), 128, 1)[:r, :k] for d, r in zip(descales, rows, strict=True)]
    factors = np.concatenate([w * s for w, s in zip(weights, wide, strict=True)])
    want = (x * np.repeat(x_descale, 128, 1)[:, :k]) @ factors.T
    squares = random.random((m, stretches))
    if stretches:
        want /= np.sqrt(squares.sum(1, keepdims=True) / k + 1e-3)
    out, parts = np.full((m, n), np.nan), np.full((tiles.parts, m, n), np.nan)
    count = -(-n // tiles.width)
    work = SimpleNamespace(
        tiles=count, blocks=blocks, blocks_a_part=-(-blocks // tiles.parts), items=count * tiles.parts
    )
    for program in range(programs):
        room = SimpleNamespace(
            x=Memory(np.full((stages, tiles.block_m, 128), np.nan)),
            w=Memory(np.full((stages * tiles.blocks, 128, 128), np.nan)),
            strip=Memory(np.full((stages, tiles.strip, 128), np.nan)),
            out=Memory(np.full((2, 64, tiles.columns), np.nan)),
            side=Memory(np.full((2, 64, tiles.strip_columns), np.nan)),
            full=Barriers(Barrier(1) for _ in range(stages)), empty=Barriers(Barrier(2) for _ in range(stages)),
        )  # fmt: skip
        forms = tiles.block_m, tiles.blocks, tiles.strip, stages, len(rows) == 2
        target = Descriptor(out), Descriptor(out), None
        if tiles.parts > 1:
            target = None, None, Pointer(parts.reshape(-1))  # type: ignore[assignment]
        scales = Pointer(x_descale.ravel()), Pointer(descales[0].ravel()), Pointer(descales[-1].ravel())
        strides = m, n, rows[0], k, blocks, 1, blocks, blocks
        root = Pointer(squares.ravel()), 1e-3
        boxes = [Descriptor(weights[0]), Descriptor(weights[-1])] * 2
        groups = [
            partial(stream._multiply.fn, room, work, *target, *root, *scales, *strides, i, *forms, stretches)
            for i in range(2)
        ]
        fetch = partial(stream._fetch.fn, room, work, Descriptor(x), *boxes, rows[0], *forms)
        gluon_in_python.run(program, [*groups, fetch])
    np.testing.assert_allclose(out if tiles.parts == 1 else parts.sum(0), want, rtol=1e-12, atol=1e-9)
