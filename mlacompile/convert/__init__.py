"""Models with grouped-query attention become models with latent attention, checkpoint to checkpoint.

``mlacompile.convert(source, out)`` is this package being called: a function and the package it lives in have one name.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

from mlacompile.convert.conversion import Conversion, check_conversion, convert

__all__ = ["Conversion", "check_conversion", "convert"]


class _Callable(ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> Conversion:
        return convert(*args, **kwargs)


_Callable.__call__.__doc__ = convert.__doc__
sys.modules[__name__].__class__ = _Callable
