"""Latent attention, free to use: ``torch.compile(model, backend="mlacompile")`` decodes on the latent cache.

Public names: ``backend``, ``Options``, ``explain``, ``last_report``, ``Report``, ``MLAGeometry``, ``LatentCache``,
``convert``, ``quantize``, ``calibrate``. Each is imported when first used, so that importing the package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlacompile.calibration import calibrate as calibrate
    from mlacompile.compiler import backend as backend
    from mlacompile.convert.conversion import convert as convert
    from mlacompile.explainer import explain as explain
    from mlacompile.geometry import MLAGeometry as MLAGeometry
    from mlacompile.integrations.transformers import LatentCache as LatentCache
    from mlacompile.options import Options as Options
    from mlacompile.report import Report as Report
    from mlacompile.report import last_report as last_report
    from mlacompile.resident import quantize as quantize

__version__ = "0.1.0"

_HOMES = {
    "backend": "mlacompile.compiler",
    "calibrate": "mlacompile.calibration",
    "convert": "mlacompile.convert",
    "explain": "mlacompile.explainer",
    "LatentCache": "mlacompile.integrations.transformers",
    "MLAGeometry": "mlacompile.geometry",
    "Options": "mlacompile.options",
    "Report": "mlacompile.report",
    "last_report": "mlacompile.report",
    "quantize": "mlacompile.resident",
}
__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
