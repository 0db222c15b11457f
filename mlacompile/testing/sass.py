"""Compiles a Triton kernel for an NVIDIA GPU that is not there, and reads registers, spills and instructions.

The Triton wheel carries ptxas, cuobjdump and nvdisasm, so a test on any machine can assert that products became
``wgmma`` (HGMMA), that tiles arrive by TMA (UTMALDG) or cp.async (LDGSTS) and leave by it (UTMASTG), and that nothing
lives in local memory (LDL, STL).
"""

from __future__ import annotations

import contextlib
import io
import re
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
import triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonTensorDescriptor
from triton.tools.tensor_descriptor import TensorDescriptor

INSTRUCTIONS = ("HGMMA", "QGMMA", "HMMA", "UTMALDG", "UTMASTG", "LDGSTS", "LDG", "LDL", "STL", "FFMA")
_ORDERS = re.compile(r"\b(?:BAR\.SYNC|LDS|LDSM|STS|STSM|ATOMS|WARPGROUP\.DEPBAR|HGMMA|QGMMA)\b")
_GLOBAL = re.compile(r"\b(?:LDG|STG|LDGSTS|RED|ATOMG|UTMALDG|UTMASTG|UBLKCP|UBLKPF)\b")
_WAIT = "ACQBULK"  # griddepcontrol.wait
_JUMP = re.compile(r"\bBRA\b.*`\((\.L_\w+)\)")
_TYPES = {
    torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int32: "i32", torch.int64: "i64",
    torch.uint8: "u8", torch.bool: "i1", torch.float8_e4m3fn: "fp8e4nv",
    torch.float8_e5m2: "fp8e5",
}  # fmt: skip


@dataclass(frozen=True)
class Compiled:
    """What one kernel costs.

    spill_bytes: stores and loads together. serialized: ptxas warnings that wgmma waits. counts: instructions by name,
    loads of 16 bytes as "LDG.128", and waits for wgmma as "DEPBAR". local_in_loops: instructions that touch local
    memory inside innermost loops, as (those of loops with wgmma, those of the others). unordered: arrivals at a barrier
    in shared memory, of one thread for all of its warps, that these have not waited for each other before. too_early:
    of a kernel that may begin before the one in front of it has ended, accesses to memory before it waits for that, in
    the order of its code (which says nothing of kernels whose warps have work of their own).
    """

    name: str
    registers: int
    spill_bytes: int
    smem: int
    serialized: int
    counts: dict[str, int]
    local_in_loops: tuple[int, int] = (0, 0)
    unordered: int = 0
    too_early: int = 0

    @property
    def local_memory(self) -> int:
        """Instructions that touch local memory."""
        return self.counts["LDL"] + self.counts["STL"]


def compile_for(
    kernel: Any, arguments: dict[str, Any], options: dict[str, Any], *, capability: int = 90, name: str = ""
) -> Compiled:
    """Compile ``kernel`` as a launch with these arguments would. Tensors may be on the meta device.

    capability: 80, 90, …: the GPU to compile for. Pointers are taken to be 16-byte aligned.
    """
    constexprs = {p.name for p in kernel.params if p.is_constexpr}
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for i, param in enumerate(kernel.params):
        value = options[param.name] if param.name in options else arguments[param.name]
        kind = "constexpr" if param.name in constexprs or value is None else _type_of(value)
        if kind == "i32" and value == 1 and not param.do_not_specialize:  # as a launch does
            kind = "constexpr"
        signature[param.name] = kind
        if kind == "constexpr":
            constants[(i,)] = value
        elif kind[0] == "*" or (kind in ("i32", "i64") and value % 16 == 0 and not param.do_not_specialize):
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = (GluonASTSource if kernel.is_gluon() else ASTSource)(kernel, signature, constants, attributes)
    chained = options.get("launch_pdl", False)
    options = {key: value for key, value in options.items() if key != "launch_pdl"}
    log = io.StringIO()
    # Only what is really compiled has a log: a kernel from Triton's cache on disk has none.
    with triton.knobs.nvidia.scope(), contextlib.redirect_stdout(log):
        triton.knobs.nvidia.dump_ptxas_log = True
        built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return _inspect(built, capability, name or kernel.__name__, log.getvalue(), chained)


def _type_of(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return "*" + _TYPES[value.dtype]
    if isinstance(value, TensorDescriptor):
        return f"tensordesc<{_TYPES[value.base.dtype]}{list(value.block_shape)}>"
    if isinstance(value, GluonTensorDescriptor):
        return f"tensordesc<{_TYPES[value.base.dtype]}{list(value.block_shape)},{value.layout!r}>"
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def _inspect(built: Any, capability: int, name: str, log: str, chained: bool) -> Compiled:
    """log: what ptxas said when it made this cubin; asked again if that is not there."""
    tools = Path(triton.backends.nvidia.__file__).parent / "bin"
    with tempfile.TemporaryDirectory() as folder:
        cubin, ptx = Path(folder, "kernel.cubin"), Path(folder, "kernel.ptx")
        cubin.write_bytes(built.asm["cubin"])
        if "ptxas info" not in log:
            ptx.write_text(built.asm["ptx"])
            arch = f"sm_{capability}a" if capability >= 90 else f"sm_{capability}"
            log = _run(tools / "ptxas", "-v", f"-arch={arch}", ptx, "-o", Path(folder, "again.cubin"))
        sass = _run(tools / "nvdisasm", "-c", cubin)
        usage = _run(tools / "cuobjdump", "-res-usage", cubin)
    spilled = sum(int(n) for n in re.findall(r"(\d+) bytes spill", log))
    registers = max(int(n) for n in re.findall(r"REG:(\d+)", usage))
    counts = {word: len(re.findall(rf"\b{word}\b", sass)) for word in INSTRUCTIONS}
    counts["LDG.128"] = len(re.findall(r"\bLDG\S*\.128\b", sass))
    counts["DEPBAR"] = len(re.findall(r"\bWARPGROUP\.DEPBAR\b", sass))
    serialized = len(re.findall(r"C75\d\d", log))
    in_loops, unordered = _local_in_loops(sass), _unordered(sass)
    too_early = len(_GLOBAL.findall(sass.split(_WAIT)[0])) if chained else 0
    return Compiled(name, registers, spilled, built.metadata.shared, serialized, counts, in_loops, unordered, too_early)


def _unordered(sass: str) -> int:
    """Arrivals (not those that announce bytes) with an access to shared memory, or a wait for wgmma, between them and
    the barrier of all warps before them: other warps might not have come so far."""
    lines = (re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", line) for line in sass.splitlines())
    code = [line[1] for line in lines if line]
    arrivals = (at for at, instruction in enumerate(code) if "SYNCS.ARRIVE.TRANS64.A1T0" in instruction)
    before = (next((x for x in reversed(code[:at]) if _ORDERS.search(x)), "") for at in arrivals)
    return sum("BAR.SYNC" not in x for x in before)


def innermost_loops(jumps: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """The first and the last instruction of loops without loops in them. jumps: where each leads, and where it is."""
    loops = {(begin, end) for begin, end in jumps if begin <= end}
    return sorted(x for x in loops if not any(y != x and x[0] <= y[0] and y[1] <= x[1] for y in loops))


def _local_in_loops(sass: str) -> tuple[int, int]:
    """What innermost loops of a disassembly do to local memory: those with wgmma, and the others."""
    labels: dict[str, int] = {}
    code: list[str] = []
    for line in sass.splitlines():
        if label := re.match(r"\s*(\.L_\w+):", line):
            labels[label[1]] = len(code)
        elif instruction := re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            code.append(instruction[1])
    jumps = ((labels.get(found[1], len(code)), at) for at, x in enumerate(code) if (found := _JUMP.search(x)))
    totals = [0, 0]
    for begin, end in innermost_loops(jumps):
        body = " ".join(code[begin : end + 1])
        totals["GMMA" not in body] += len(re.findall(r"\b(?:LDL|STL)\b", body))
    return totals[0], totals[1]


def _run(*command: str | Path) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def table(rows: Iterable[Compiled]) -> str:
    """A fixed-width table, one kernel a line."""
    lines = [
        f"{'kernel':44s} {'regs':>5s} {'spill B':>8s} {'smem':>8s} {'serial':>6s} {'in loops':>8s} "
        + " ".join(f"{w:>7s}" for w in INSTRUCTIONS)
    ]
    lines += [
        f"{row.name:44s} {row.registers:5d} {row.spill_bytes:8d} {row.smem:8d} {row.serialized:6d} "
        f"{sum(row.local_in_loops):8d} " + " ".join(f"{row.counts[w]:7d}" for w in INSTRUCTIONS)
        for row in rows
    ]
    return "\n".join(lines)
