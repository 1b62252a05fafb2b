"""Where the command line writes: results to standard output, progress and errors to standard error.

So `--json` leaves nothing on standard output but JSON, and a result can be piped while the bars keep moving.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

results = Console()
errors = Console(stderr=True)


class Step(Protocol):
    """Moves a progress bar on by one."""

    def __call__(self) -> None: ...


@contextmanager
def progress(description: str, total: int | None = None) -> Iterator[Step]:
    """Show a bar for the length of the block; without `total` it only shows that work goes on, and for how long.

    Where standard error is not a terminal nothing is shown.
    """
    columns = [SpinnerColumn(), TextColumn("{task.description}"), BarColumn(bar_width=30)]
    if total is not None:
        columns.append(MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=errors, transient=True, disable=not errors.is_terminal) as bar:
        task = bar.add_task(description, total=total)
        yield lambda: bar.advance(task)


def write_json(data: dict[str, Any]) -> None:
    """Write `data` to standard output, and nothing else."""
    typer.echo(json.dumps(data, indent=2))
