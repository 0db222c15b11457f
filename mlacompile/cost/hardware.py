"""How fast hardware is: a table, where each figure comes from, and how a user puts their own in its place.

MLACOMPILE_HARDWARE=a100            an entry of the table, whatever the device
MLACOMPILE_HARDWARE=mine.toml       or a file; the option hardware= takes the same two

    name = "my GPU"
    base = "h100"                   # everything not said here is as in this entry
    bandwidth = 2.9e12              # bytes a second
    latency = 3e-6                  # seconds a kernel takes at least
    units = 132                     # that work at the same time: multiprocessors
    tile = 128                      # queries of a head that attention works on together
    [flops]                         # FLOP a second of a large product, by dtype
    bfloat16 = 700e12
    [share]                         # what kinds of steps reach of a rate: cost/forms.py lists them
    heads = 0.8
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from mlacompile.errors import OptionsError

VARIABLE = "MLACOMPILE_HARDWARE"
#: Kinds of steps that reach less than a large product or a plain copy does.
SHARES = ("heads", "masked", "latent", "expand", "scatter")


@dataclass(frozen=True)
class Hardware:
    """Rates of one device.

    source: where they come from. flops: FLOP/s of a large product by dtype name. bandwidth: bytes/s that a kernel
    reaches. latency: seconds that a kernel takes at least, inside a CUDA graph. share: what kinds of steps reach of
    that ("heads": attention expanded, "masked": the same under a mask in memory, "latent": absorbed, "expand": products
    written into place, "scatter": copies into rows that lie apart). units: how many tiles are worked on at the same
    time. tile: queries of one head in a tile.
    """

    name: str
    source: str
    flops: tuple[tuple[str, float], ...]
    bandwidth: float
    latency: float
    share: tuple[tuple[str, float], ...]
    units: int = 1
    tile: int = 1

    def copies(self, kind: str) -> float:
        """Bytes a second of a kind of step."""
        return self.bandwidth * (dict(self.share).get(kind, 1.0) if kind == "scatter" else 1.0)

    def rate(self, kind: str, dtype: str) -> float:
        """FLOP/s of a kind of step in a dtype; a dtype that is not listed runs like float32, float64 at half of
        it."""
        table = dict(self.flops)
        peak = table.get(dtype, table["float32"] / (2 if dtype == "float64" else 1))
        return peak * dict(self.share).get(kind, 1.0)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self) | {"flops": dict(self.flops), "share": dict(self.share)}


def _table(**values: float) -> tuple[tuple[str, float], ...]:
    return tuple(sorted(values.items()))


#: By benchmarks/crossover.py on an H200 (benchmarks/results), latency too; masked: 198 TFLOP/s of expanded attention of
#: 128 heads over 8192 tokens under a boolean mask.
_SHARE_HOPPER = _table(heads=0.84, masked=0.27, latent=0.88, expand=0.92, scatter=0.7)
_H200 = Hardware(
    "NVIDIA H200",
    "measured: bf16 product of 8192³ 673–790 TFLOP/s, FP8 1285–1378, reads 3.9–4.25 TB/s",
    _table(bfloat16=720e12, float16=720e12, float8_e4m3fn=1300e12, float32=45e12),
    4.1e12,
    3e-6,
    _SHARE_HOPPER,
    units=132,
    tile=128,
)
_DATASHEET = "datasheet, times what an H200 was measured to reach of its own: 0.73 of its FLOPs, 0.85 of its bandwidth"
TABLE: dict[str, Hardware] = {
    "h200": _H200,
    "h100": replace(
        _H200,
        name="NVIDIA H100",
        source=_DATASHEET + " (989 TFLOP/s in bf16, 1979 in FP8, 3.35 TB/s)",
        bandwidth=0.85 * 3.35e12,
    ),
    "a100": Hardware(
        "NVIDIA A100",
        _DATASHEET + " (312 TFLOP/s in bf16, 2.04 TB/s; 80 GB)",
        _table(bfloat16=0.73 * 312e12, float16=0.73 * 312e12, float32=0.73 * 19.5e12),
        0.85 * 2.04e12,
        6e-6,
        _table(heads=0.6, masked=0.3, latent=0.4, expand=0.7, scatter=0.5),
        units=108,
        tile=128,
    ),
    "cpu": Hardware(
        "CPU",
        "estimate for one core with 512-bit units; products scale with threads, bandwidth does not beyond four",
        _table(float32=55e9, bfloat16=110e9, float16=20e9),
        12e9,
        5e-6,
        _table(heads=0.5, masked=0.4, latent=0.5),
    ),
}


def find_hardware(device: torch.device | None = None, wanted: str | Path | None = None) -> Hardware:
    """The rates to reckon with: what was asked for, else what the environment says, else the device's own entry.

    Args:
        device: where attention runs. The meta device stands for the GPU of this machine, or an H200 where there is
        none.
        wanted: a name of the table or the path of a TOML file; None: ``MLACOMPILE_HARDWARE``, then the device.
    Raises:
        OptionsError: no such entry, or a file that does not say what is expected.
    """
    wanted = wanted or os.environ.get(VARIABLE)
    if wanted:
        return _named(str(wanted))
    kind = "cuda" if device is None or device.type == "meta" else device.type
    if kind == "cpu":
        return _scaled(TABLE["cpu"], torch.get_num_threads())
    if kind != "cuda" or not torch.cuda.is_available():
        return TABLE["h200"]
    index = None if device is None or device.type == "meta" else device.index
    return _of_gpu(torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index))


def _of_gpu(name: str, capability: tuple[int, int]) -> Hardware:
    for key in ("h200", "h100", "a100"):
        if key in name.lower():
            return TABLE[key]
    near = "h100" if capability >= (9, 0) else "a100"
    return replace(TABLE[near], name=name, source=f"no entry for {name}: taken as {near}; {VARIABLE} names a TOML file")


def _scaled(cpu: Hardware, threads: int) -> Hardware:
    rates = tuple((dtype, rate * threads) for dtype, rate in cpu.flops)
    return replace(cpu, name=f"CPU, {threads} threads", flops=rates, bandwidth=cpu.bandwidth * min(threads, 4))


def _named(wanted: str) -> Hardware:
    if wanted == "cpu":
        return _scaled(TABLE["cpu"], torch.get_num_threads())
    if wanted in TABLE:
        return TABLE[wanted]
    path = Path(wanted)
    if not path.is_file():
        raise OptionsError(
            f"hardware={wanted!r}: expected one of {', '.join(map(repr, TABLE))}, "
            "or the path of a TOML file (there is none)"
        )
    try:
        return _from_toml(path.stem, tomllib.loads(path.read_text()))
    except (tomllib.TOMLDecodeError, TypeError, ValueError) as error:
        raise OptionsError(f"hardware={wanted!r}: {error}") from error


def _from_toml(stem: str, data: Mapping[str, Any]) -> Hardware:
    allowed = ("name", "source", "base", "bandwidth", "latency", "units", "tile", "flops", "share")
    if unknown := sorted(set(data) - set(allowed)):
        raise ValueError(f"unknown entry {unknown[0]!r}; expected some of {', '.join(allowed)}")
    if data.get("base", "h200") not in TABLE:
        raise ValueError(f"base={data['base']!r}: expected one of {', '.join(TABLE)}")
    base = TABLE[data.get("base", "h200")]
    for group, known in (("share", SHARES), ("flops", None)):
        for key, value in data.get(group, {}).items():
            if known is not None and key not in known:
                raise ValueError(f"unknown {group}.{key}; expected some of {', '.join(known)}")
            _positive(f"{group}.{key}", value)
    for key in ("bandwidth", "latency", "units", "tile"):
        _positive(key, data.get(key, 1.0))
    return Hardware(
        data.get("name", stem),
        data.get("source", "given by the user"),
        _table(**dict(base.flops) | data.get("flops", {})),
        float(data.get("bandwidth", base.bandwidth)),
        float(data.get("latency", base.latency)),
        _table(**dict(base.share) | data.get("share", {})),
        int(data.get("units", base.units)),
        int(data.get("tile", base.tile)),
    )


def _positive(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
        raise ValueError(f"{name} = {value!r}: expected a positive number")
