"""What a user can choose, in one frozen, validated place.

Options arrive as ``torch.compile(model, backend="mlacompile", options={...})``. All are optional; a name or a value
that is not listed here is an error that lists what is.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from mlacompile.errors import OptionsError
from mlacompile.gate import Gate

CHOICES: dict[str, tuple[str, ...]] = {
    "form": ("auto", "absorbed", "expanded"),
    "verify": ("off", "compile", "first-call"),
    "rest": ("inductor", "eager"),
    "kernel": ("auto", "gluon", "triton", "cpu", "reference"),
}
FP8_MODES = ("off", "weights", "absorb", "all")
#: Modes of ``torch.compile`` that a caller such as ``generate()`` may pass along.
MODES = (None, "default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs", "lite")


@dataclass(frozen=True)
class Options:
    """Options of the backend.

    form: "auto" absorbs where that is cheaper (decode) and leaves prefill expanded; the others force one form.
    fp8: "weights" runs products with weights in FP8 where that is faster and safe (weights are quantized once and kept
        beside the originals), "absorb" the absorbed products of every head, "all" both. A mapping from patterns of
        sources (``file:line``, or the path of a module) to these or "off" asks for single ones, faster or not; the
        first pattern that matches counts. The path of a file that ``mlacompile calibrate`` wrote, ``*.json``: what it
        found to be safe.
    cudagraphs: replay the compiled step from a CUDA graph. None: yes on CUDA with static shapes.
    verify: "compile" checks every rewrite in float64 on small stand-in lengths while compiling; "first-call" also
    runs the
        original graph beside the compiled one, once, on the real inputs; "off" trusts the recogniser's own probe.
    strict: a refused attention op raises instead of staying as it was.
    dump: a folder that receives the graph after every stage, as readable Python.
    rest: who runs the rest of the graph.
    hardware: whose rates the choice of a form reckons with: a name of the table in ``mlacompile/cost/hardware.py``
    or a TOML
        file. None: what ``MLACOMPILE_HARDWARE`` says, else the device that attention runs on.
    kernel: which implementation serves ``mla_decode``; "auto" takes the best that supports the shape.
    seed: of the random data that rewrites are checked on, to repeat a check; None: another at every compilation.
    """

    form: str = "auto"
    fp8: str | Path | Mapping[str, str] = "off"
    cudagraphs: bool | None = None
    verify: str = "compile"
    strict: bool = False
    dump: str | Path | None = None
    rest: str = "inductor"
    kernel: str = "auto"
    hardware: str | Path | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, allowed in CHOICES.items():
            value = getattr(self, name)
            if value not in allowed:
                raise OptionsError(f"option {name}={value!r}: expected one of {', '.join(map(repr, allowed))}")
        self._check_fp8()
        if not isinstance(self.strict, bool):
            raise OptionsError(f"option strict={self.strict!r}: expected True or False")
        if self.cudagraphs is not None and not isinstance(self.cudagraphs, bool):
            raise OptionsError(f"option cudagraphs={self.cudagraphs!r}: expected True, False or None (automatic)")
        if self.hardware is not None and not isinstance(self.hardware, (str, Path)):
            raise OptionsError(f"option hardware={self.hardware!r}: expected a name or the path of a TOML file")
        if self.seed is not None and (not isinstance(self.seed, int) or not 0 <= self.seed < 2**32):
            raise OptionsError(f"option seed={self.seed!r}: expected a whole number below 2**32, or None")
        if self.dump is not None and not isinstance(self.dump, (str, Path)):
            raise OptionsError(f"option dump={self.dump!r}: expected the path of a folder")

    def _check_fp8(self) -> None:
        if isinstance(self.fp8, (str, Path)) and str(self.fp8).endswith(".json"):
            modes: Iterable[object] = Gate.read(self.fp8).sites.values()
        else:
            modes = self.fp8.values() if isinstance(self.fp8, Mapping) else [self.fp8]
        for mode in modes:
            if mode not in FP8_MODES:
                raise OptionsError(
                    f"option fp8={self.fp8!r}: expected one of {', '.join(map(repr, FP8_MODES))}, a mapping from "
                    "patterns of sources to these, or a file of `mlacompile calibrate` (*.json)"
                )
        if self.fp8 != "off" and self.verify == "first-call":
            raise OptionsError(
                "verify='first-call' allows for rounding in the dtype of the model, and FP8 rounds more: use "
                "verify='compile' with fp8"
            )

    @classmethod
    def parse(cls, options: Options | Mapping[str, Any] | None) -> Options:
        """Options from what a caller passed to torch.compile.

        Raises:
            OptionsError: for an unknown name (naming the nearest one and all allowed ones) or value.
        """
        if options is None:
            return cls()
        if isinstance(options, cls):
            return options
        if not isinstance(options, Mapping):
            raise OptionsError(f"options must be a dict or Options, got {type(options).__name__}")
        names = [f.name for f in fields(cls)]
        for name in options:
            if name not in names:
                near = difflib.get_close_matches(str(name), names, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise OptionsError(f"unknown option {name!r}{hint} (allowed: {', '.join(names)})")
        return cls(**options)


def check_mode(mode: str | None) -> str | None:
    """The mode a caller passed to torch.compile, or an error that lists the known ones."""
    if mode not in MODES:
        raise OptionsError(f"mode={mode!r}: expected one of {', '.join(map(repr, MODES))}")
    return mode
