"""The application: its commands, `--version`, and how errors are shown."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from hf_accel import __version__
from hf_accel.cli.bench import bench
from hf_accel.cli.convert_gqa import convert_gqa
from hf_accel.cli.demo import demo
from hf_accel.cli.doctor import doctor
from hf_accel.cli.export import export
from hf_accel.cli.output import errors
from hf_accel.cli.plan import plan
from hf_accel.cli.quantize import quantize
from hf_accel.cli.serve import serve
from hf_accel.cli.uptrain import uptrain
from hf_accel.errors import HfAccelError

ERROR_CODE = 2


class _Group(TyperGroup):
    """Shows the errors that hf_accel raises on purpose as one message; every other error keeps its traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except HfAccelError as error:
            errors.print(f"{type(error).__name__}: {error}", style="bold red", markup=False, highlight=False)
            raise typer.Exit(ERROR_CODE) from error


app = typer.Typer(
    cls=_Group,
    name="hf-accel",
    no_args_is_help=True,
    add_completion=False,
    help="Makes Hugging Face `model.generate` fast: one line, the same text, everything undoable.",
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"hf-accel {__version__}")
        raise typer.Exit()


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Makes Hugging Face `model.generate` fast: one line, the same text, everything undoable."""


for command in (demo, plan, bench, quantize, export, convert_gqa, uptrain, serve, doctor):
    app.command()(command)
