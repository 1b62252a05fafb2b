"""A bar on standard error for a run: nothing where nobody looks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers.utils.logging import is_progress_bar_enabled


@contextmanager
def bar(description: str, console: Console | None = None) -> Iterator[Callable[[float, str], None]]:
    """Show how far a run is; yield what takes the share that is done, 0 to 1, and a note.

    As `hf_accel.core.progress.shown`: quiet where standard error is neither a terminal nor a notebook, and where
    transformers' own bars are turned off.
    """
    console = console or Console(stderr=True)
    if not (console.is_terminal or console.is_jupyter) or not is_progress_bar_enabled():
        yield lambda share, note: None
        return
    columns = (SpinnerColumn(), TextColumn("{task.description} {task.fields[note]}"), BarColumn(bar_width=30))
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console, transient=True) as shown:
        task = shown.add_task(description, total=1.0, note="")
        yield lambda share, note: shown.update(task, completed=share, note=note)
