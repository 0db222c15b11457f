"""A kernel with some text that is wrong, to see that running it as Python says so."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

from tests.kernels import gluon_in_python


def rewrite(monkeypatch: pytest.MonkeyPatch, module: ModuleType, name: str, *changes: tuple[str, str]) -> None:
    """Let a function of a kernel's module have other text when it runs as Python."""
    function = getattr(module, name)
    text: str = function.src
    for old, new in changes:
        assert text.count(old) == 1, f"{old!r} is {text.count(old)} times in {name}"
        text = text.replace(old, new)
    found: dict[str, Any] = {}
    exec(text, vars(module), found)
    monkeypatch.setattr(function, "fn", found[name])


def is_found(run: Callable[[pytest.MonkeyPatch], str]) -> bool:
    """Whether running it finds something, with partitions late in one of some ways. run: what is wrong with results."""
    for seed in range(12):
        with pytest.MonkeyPatch.context() as patched:
            gluon_in_python.dawdle(patched, seed)
            try:
                if run(patched):
                    return True
            except (AssertionError, IndexError):
                return True
    return False
