"""The command line: `mlacompile explain`, `convert`, `quantize`, `calibrate`, `doctor`, `demo`; one file a command.

Exit codes: 0 all is well, 1 the answer is no (nothing absorbed, a site refused under --strict, no usable
backend), 2 the question could not be understood (a bad path, configuration or option).
"""

from __future__ import annotations

import sys

import typer
from rich.console import Console
from rich.markup import escape

from mlacompile.cli.calibrate import calibrate
from mlacompile.cli.convert import convert
from mlacompile.cli.demo import demo
from mlacompile.cli.doctor import doctor
from mlacompile.cli.explain import explain
from mlacompile.cli.quantize import quantize
from mlacompile.errors import MLACompileError

app = typer.Typer(
    name="mlacompile",
    help="Decode multi-head latent attention on its latent cache, by torch.compile(model, backend='mlacompile').",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)
app.command()(explain)
app.command()(convert)
app.command()(quantize)
app.command()(calibrate)
app.command()(doctor)
app.command()(demo)


def main() -> None:
    """Run the command line; an error this project raises on purpose is shown without a traceback."""
    try:
        app()
    except MLACompileError as error:
        Console(stderr=True, soft_wrap=True).print(f"[bold red]error:[/] {escape(str(error))}", highlight=False)
        sys.exit(2)


__all__ = ["app", "main"]
