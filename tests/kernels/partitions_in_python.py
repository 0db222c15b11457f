"""Partitions of a program that runs as Python: threads, what each has begun, barriers on which they wait."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np


class Program:
    """What its partitions know of one another. at: where it is in its grid."""

    def __init__(self, at: tuple[int, ...], partitions: int = 1) -> None:
        self.at, self.running, self.failed = at, partitions, False
        self.lock = threading.Lock()
        self.waiting: dict[int, tuple[Barrier, int]] = {}

    def stuck(self) -> bool:
        """Whether all that run wait, and none of them for what has come."""
        waiting = self.waiting.copy()
        if len(waiting) < self.running or any(barrier.comes(parity) for barrier, parity in waiting.values()):
            return False
        return all(self.waiting.get(thread) is each for thread, each in waiting.items())  # nobody went on meanwhile

    def end(self, failed: bool) -> None:
        """A partition has ended."""
        with self.lock:
            self.running -= 1
            self.failed |= failed


class Here(threading.local):
    """What a thread is, and what it has begun and not waited for."""

    def __init__(self) -> None:
        self.begin(Program((0, 0, 0)), 4)

    def begin(self, program: Program, warps: int) -> None:
        self.program, self.warps = program, warps
        self.products: list[Any] = []
        self.results: list[tuple[Any, Callable[[], None]]] = []  # that leave shared memory: from where, and how
        self.written: dict[tuple[int, ...], Any] = {}  # in shared memory, and not fenced off
        self.begun: list[Barrier] = []  # and not fenced off

    def tell(self) -> None:
        """Others now count on what was written."""
        self.forget(lambda written: written.fenced)
        for written in self.written.values():
            written.told = True

    def forget(self, done: Callable[[Any], bool]) -> None:
        for key in [key for key, written in self.written.items() if done(written)]:
            self.written.pop(key).memory.room.unfenced.pop(key)

    def ended(self) -> None:
        """Nothing is left over."""
        assert not self.products, "ends before its products are waited for"
        assert not self.results, "ends before its results have left"


here = Here()


class Abandoned(Exception):
    """Another partition has failed."""


class Barrier:
    """Of so many arrivals, and of bytes that are on their way."""

    def __init__(self) -> None:
        self.count = self.left = self.bytes = self.phase = 0
        self.changed = threading.Condition()
        self.coming: list[Callable[[], None]] = []
        self.fenced = True

    def init(self, count: int) -> None:
        assert self.count == 0, "begins twice"
        self.count = self.left = int(count)
        self.fenced = False
        here.begun.append(self)

    def expect(self, size: int) -> None:
        self.change(1, int(size))

    def arrive(self, count: int = 1) -> None:
        self.change(count, 0)

    def change(self, arrivals: int, size: int) -> None:
        if arrivals:
            here.tell()
        with self.changed:
            self.left -= arrivals
            self.bytes += size
            assert self.left >= 0, "more arrive than should"
            if self.left == self.bytes == 0:
                self.left, self.phase = self.count, self.phase + 1
            self.changed.notify_all()

    def later(self, copy: Callable[[], None]) -> None:
        """Copy when someone waits here."""
        assert self.fenced, "a copy arrives without a fence behind the beginning of its barrier"
        with self.changed:
            self.coming.append(copy)
            self.changed.notify_all()

    def comes(self, parity: int) -> bool:
        """Whether who waits can go on, or has something to copy."""
        return self.phase & 1 != parity or bool(self.coming)

    def wait(self, parity: int) -> None:
        assert self.count > 0, "has no arrivals"
        program, thread = here.program, threading.get_ident()
        with self.changed:
            while not self._passed(int(parity)):
                program.waiting[thread] = self, int(parity)
                if program.failed:
                    raise Abandoned
                assert not program.stuck(), "waits for what never comes"
                self.changed.wait(0.05)
                program.waiting.pop(thread)

    def _passed(self, parity: int) -> bool:
        while self.phase & 1 == parity and self.coming:
            self.coming.pop(0)()
        return self.phase & 1 != parity


class Barriers(list[Barrier]):
    """As they are allocated."""

    @classmethod
    def allocated(cls, count: int) -> Barriers:
        return cls(Barrier() for _ in range(count))

    def index(self, i: Any) -> Barrier:  # type: ignore[override]
        return self[int(i)]


def specialize(
    partitions: list[tuple[Callable[..., None], tuple[Any, ...]]], warps: list[int], registers: list[int]
) -> None:
    """The partitions of a program, each in a thread; raises what the first that fails has raised."""
    assert len(warps) == len(registers) == len(partitions) - 1
    program = Program(here.program.at, len(partitions))
    errors: list[BaseException] = []
    here.tell()

    def one(function: Callable[..., None], args: tuple[Any, ...], warps: int) -> None:
        here.begin(program, warps)
        try:
            with np.errstate(all="ignore"):
                function(*args)
            here.ended()
        except BaseException as error:
            errors.append(error)
            program.end(failed=True)
        else:
            program.end(failed=False)

    threads = [
        threading.Thread(target=partial(one, *partition, n), daemon=True)
        for partition, n in zip(partitions, [here.warps, *warps], strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
