"""Kernels of ``mlacompile::mla_prefill``, best first."""

from __future__ import annotations

from mlacompile.kernels.mla_prefill.chunked import chunked_reasons, mla_prefill_chunked
from mlacompile.kernels.registry import Kernel

KERNELS = (Kernel("chunked", "mla_prefill", chunked_reasons, mla_prefill_chunked),)
