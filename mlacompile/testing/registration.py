"""Makes ``backend="mlacompile"`` work from a checkout into which nothing was installed.

Installed, the package is found through its entry point and this does nothing.
"""

from __future__ import annotations

from torch._dynamo import list_backends, register_backend


def ensure_registered() -> None:
    """Register the backend by its name, unless torch knows it already."""
    if "mlacompile" not in list_backends(exclude_tags=()):
        from mlacompile import backend

        register_backend(backend, name="mlacompile")
