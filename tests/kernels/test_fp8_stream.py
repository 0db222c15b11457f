"""The Hopper kernel of ``fp8_linear`` for few rows without a GPU: what it compiles to, how it divides the weight."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mlacompile.testing.scaled import E4M3
from tests.kernels import gluon_in_python
from tests.kernels.gluon_in_python import Barrier, Barriers, Descriptor, Memory, Pointer

pytest.importorskip("triton", reason="kernels are compiled by Triton, which the dev extra brings")

from mlacompile.kernels.fp8_linear import stream
from mlacompile.kernels.fp8_linear.hopper_launch import SMEM
from mlacompile.kernels.fp8_linear.stream_launch import StreamTiles, choose_stream_tiles, stream_launches
from mlacompile.testing.sass import compile_for, table


@pytest.mark.parametrize(
    ("m", "rows", "k", "dtype", "tiles"),
    [
        (64, (18432,), 7168, torch.bfloat16, StreamTiles(64)),
        (33, (18432, 18432), 7168, torch.float16, StreamTiles(64)),
        (128, (24576,), 1536, torch.bfloat16, StreamTiles(128, whole=True)),
        (128, (18432,), 7168, torch.bfloat16, StreamTiles(128)),
    ],
    ids=str,
)
def test_what_it_compiles_to(
    m: int, rows: tuple[int, ...], k: int, dtype: torch.dtype, tiles: StreamTiles,
    record_property: Callable[[str, object], None],
) -> None:  # fmt: skip
    def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    x, x_descale = meta(m, k, dtype=E4M3), meta(m, -(-k // 128))
    weights, descales = [meta(n, k, dtype=E4M3) for n in rows], [meta(-(-n // 128), -(-k // 128)) for n in rows]
    launches = stream_launches(x, x_descale, weights, descales, meta(m, sum(rows), dtype=dtype), tiles)
    assert len(launches) == 2 - tiles.whole
    main, *rest = (compile_for(each.kernel, each.arguments, each.options, name=f"stream {tiles}") for each in launches)
    record_property("compiled", table([main, *rest]))
    groups = tiles.block_m // 64
    assert main.counts["QGMMA"] == 4 * groups, "64 rows by 32 columns of a block"
    assert main.counts["FFMA"] == 64 * groups, "each sum is multiplied and added once"
    assert main.counts["UTMALDG"] == 1 + len(rows), "x and each weight come by TMA"
    assert main.counts["HGMMA"] == main.counts["HMMA"] == main.counts["LDGSTS"] == 0
    assert main.serialized == 0, "ptxas found a wgmma whose operands are still in use, and waits for it"
    assert main.unordered == 0, "a thread arrives for warps that may not have come so far"
    assert all(built.local_memory == built.spill_bytes == 0 for built in (main, *rest))
    assert SMEM * 0.8 < main.smem <= SMEM, "what is in flight hides the latency of memory"


def test_whole_tiles_where_they_are_even_enough() -> None:
    assert choose_stream_tiles(128, 24576, 1536, 132) == StreamTiles(128, whole=True), (
        "24 blocks at most, or 18 and a sum"
    )
    assert choose_stream_tiles(64, 18432, 7168, 132) == StreamTiles(64), "112 or 62"
    assert choose_stream_tiles(17, 128, 128, 132) == StreamTiles(64, whole=True)
    for whole in (False, True):
        tiles = StreamTiles(64, whole)
        for n, k in ((18432, 7168), (136, 16), (100000, 1040)):
            blocks, share = -(-n // 128) * -(-k // 128), tiles.share(n, k, 132)
            assert share * 132 >= blocks, "nothing is left over"
            assert not whole or share % -(-k // 128) == 0


@pytest.mark.parametrize(
    ("m", "rows", "k", "tiles", "programs"),
    [
        (64, (300,), 784, StreamTiles(64), 2),
        (20, (200,), 144, StreamTiles(64), 3),
        (100, (456,), 400, StreamTiles(128), 3),
        (7, (128,), 1040, StreamTiles(64), 4),
        (30, (256, 200), 272, StreamTiles(64), 3),
        (128, (500,), 272, StreamTiles(128, whole=True), 3),
    ],
    ids=str,
)
def test_in_python(
    m: int, rows: tuple[int, ...], k: int, tiles: StreamTiles, programs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel's own text, its partitions as threads: stretches, pieces, scales, stages, edges."""
    gluon_in_python.install(monkeypatch, stream, programs, ("_scales", "_leave"))
    random = np.random.default_rng(0)
    n, blocks, stages = sum(rows), -(-k // 128), 3
    x, *weights = (random.integers(-4, 5, (height, k)).astype(float) for height in (m, *rows))
    x_descale, *descales = (random.random((height, blocks)) for height in (m, *(-(-r // 128) for r in rows)))
    wide = [np.repeat(np.repeat(d, 128, 0), 128, 1)[:r, :k] for d, r in zip(descales, rows, strict=True)]
    factors = np.concatenate([w * s for w, s in zip(weights, wide, strict=True)])
    want = (x * np.repeat(x_descale, 128, 1)[:, :k]) @ factors.T
    share, total, two = tiles.share(n, k, programs), -(-n // 128) * blocks, len(rows) == 2
    out, pieces = np.full((m, n), np.nan), np.full((programs, 2, tiles.block_m, 128), np.nan)
    for program in range(programs):
        begin, end = min(program * share, total), min((program + 1) * share, total)
        groups = tiles.block_m // 64
        room = SimpleNamespace(
            x=Memory(np.full((stages, tiles.block_m, 128), np.nan)), w=Memory(np.full((stages, 128, 128), np.nan)),
            out=Memory(np.full((groups, 64, 128), np.nan)), full=Barriers(Barrier(1) for _ in range(stages)),
            empty=Barriers(Barrier(groups) for _ in range(stages)),
        )  # fmt: skip
        common = (
            room, Descriptor(out), Pointer(pieces.reshape(-1)), Pointer(x_descale.ravel()),
            Pointer(descales[0].ravel()), Pointer(descales[-1].ravel()), begin, end, blocks, m, rows[0], blocks, 1,
            blocks, blocks,
        )  # fmt: skip
        fetch = (room, Descriptor(x), Descriptor(weights[0]), Descriptor(weights[-1]), begin, end, blocks, rows[0])
        partitions: list[Callable[[], None]] = [
            lambda group=group, common=common: stream._multiply.fn(*common, group, tiles.block_m, stages, two)
            for group in range(groups)
        ]
        partitions.append(lambda fetch=fetch: stream._fetch.fn(*fetch, tiles.block_m, stages, two))
        gluon_in_python.run(program, partitions)
    np.testing.assert_allclose(_summed(out, pieces, share, blocks), want, rtol=1e-12, atol=1e-9)


def _summed(out: np.ndarray, pieces: np.ndarray, share: int, blocks: int) -> np.ndarray:  # type: ignore[type-arg]
    """out with the pieces of tiles that are cut, as ``_fp8_cut_kernel`` adds them: by where programs begin."""
    m, n = out.shape
    for tile in range(-(-n // 128)):
        start, stop = tile * blocks, (tile + 1) * blocks
        first, last = start // share, (stop - 1) // share
        if first == last:
            continue
        found = sum(pieces[p, int(p == first)] for p in range(first, last + 1))
        columns = slice(tile * 128, min(n, tile * 128 + 128))
        assert np.isnan(out[:, columns]).all(), "a tile that is cut is nobody's"
        out[:, columns] = found[:m, : columns.stop - columns.start]
    return out
