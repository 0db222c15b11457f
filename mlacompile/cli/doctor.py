"""`mlacompile doctor`: can this machine run mlacompile, with which kernels, and if not, why not."""

from __future__ import annotations

import json
import platform
from importlib import metadata
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

_PACKAGES = ("mlacompile", "torch", "triton", "transformers", "sympy", "safetensors", "onnxruntime", "torch_tensorrt")


def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False) -> None:
    """Show versions, devices, and which kernels are usable here, with the reasons where they are not."""
    found = examine()
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        _show(Console(), found)
    if not found["backend"]["usable"]:
        raise typer.Exit(1)


def examine() -> dict[str, Any]:
    """Everything the command shows, as plain data."""
    from mlacompile.testing.timing import version_of

    versions = {"python": platform.python_version()} | {name: version_of(name) for name in _PACKAGES}
    return {
        "versions": versions,
        "devices": _devices(),
        "backend": _backend(),
        "cpu_compiler": _cpu_compiler(),
        "kernels": _kernels(),
    }


def _devices() -> list[dict[str, Any]]:
    import torch

    from mlacompile.testing.timing import cpu_name

    found: list[dict[str, Any]] = [
        {"name": cpu_name(), "device": "cpu", "detail": f"{torch.get_num_threads()} threads"}
    ]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        detail = f"sm_{properties.major}{properties.minor}, {properties.multi_processor_count} SMs, "
        detail += f"{properties.total_memory / 2**30:.0f} GiB"
        found.append({"name": properties.name, "device": f"cuda:{index}", "detail": detail})
    return found


def _backend() -> dict[str, Any]:
    """Whether torch.compile finds the backend by its name, and whether it loads."""
    registered = any(e.name == "mlacompile" for e in metadata.entry_points(group="torch_dynamo_backends"))
    reasons = [] if registered else ["no entry point: install the package (pip install -e .), or import mlacompile"]
    loads = True
    try:
        from mlacompile import backend

        assert callable(backend)
    except Exception as error:  # whatever is broken in an installation is what a user wants to see
        loads = False
        reasons.append(f"mlacompile cannot be imported: {type(error).__name__}: {error}")
    return {"registered": registered, "usable": registered and loads, "reasons": reasons}


def _cpu_compiler() -> dict[str, Any]:
    """The C++ compiler that Inductor would use; without one, code on the CPU runs with rest='eager' only."""
    try:
        from torch._inductor.cpp_builder import get_cpp_compiler

        return {"path": get_cpp_compiler(), "reasons": []}
    except Exception as error:
        return {
            "path": None,
            "reasons": [f"none found ({type(error).__name__}: {error}); use options={{'rest': 'eager'}}"],
        }


def _kernels() -> list[dict[str, Any]]:
    """Every kernel, asked whether it takes a typical input on this machine."""
    from mlacompile.kernels import registry

    found = []
    for op, (tensors, keywords) in _typical_inputs().items():
        for kernel in registry.kernels(op):
            reasons = kernel.supports(*tensors, **keywords)
            found.append({"op": op, "kernel": kernel.name, "usable": not reasons, "reasons": reasons})
        found.append({"op": op, "kernel": "reference", "usable": True, "reasons": []})
    return found


def _typical_inputs() -> dict[str, tuple[tuple[Any, ...], dict[str, Any]]]:
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    sizes = [(1, 128, 1, 512), (1, 128, 1, 64), (1, 64, 512), (1, 64, 64)]
    queries_and_cache = [torch.empty(size, dtype=torch.bfloat16, device=device) for size in sizes]
    row, weight = (torch.empty(n, 7168, dtype=torch.float8_e4m3fn, device=device) for n in (1, 2048))
    scales = [torch.empty(n, 56, device=device) for n in (1, 16)]
    return {
        "mla_decode": ((*queries_and_cache, None, None, None), {"scale": 1.0}),
        "fp8_linear": ((row, scales[0], weight, scales[1], torch.bfloat16), {}),
    }


def _show(console: Console, found: dict[str, Any]) -> None:
    versions = Table("package", "version", title="Versions", title_justify="left")
    for name, version in found["versions"].items():
        versions.add_row(name, version or "[dim]not installed[/]")
    devices = Table("device", "name", "", title="Devices", title_justify="left")
    for row in found["devices"]:
        devices.add_row(row["device"], escape(row["name"]), row["detail"])
    checks = Table("what", "usable", "reason", title="Usable here", title_justify="left")
    backend, compiler = found["backend"], found["cpu_compiler"]
    checks.add_row("backend 'mlacompile'", *_verdict(backend["usable"], backend["reasons"]))
    checks.add_row("C++ compiler for the CPU", *_verdict(compiler["path"], compiler["reasons"], compiler["path"]))
    for row in found["kernels"]:
        checks.add_row(f"{row['op']}: {row['kernel']}", *_verdict(row["usable"], row["reasons"]))
    for table in (versions, devices, checks):
        console.print(table)


def _verdict(usable: Any, reasons: list[str], note: str | None = None) -> tuple[str, str]:
    return ("[green]yes[/]" if usable else "[yellow]no[/]"), escape("; ".join(reasons) or note or "")
