"""A bar on standard error for set-up that takes long: nothing for two seconds, nothing where nobody looks."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from transformers.utils.logging import is_progress_bar_enabled

SILENT_S = 2.0


@contextmanager
def shown(description: str, console: Console | None = None, silent_s: float = SILENT_S) -> Iterator[Callable[[], None]]:
    """Show that work goes on, and for how long, once it has taken `silent_s` seconds; yield what moves the bar on.

    Nothing is shown where standard error is neither a terminal nor a notebook, and where transformers' own bars are
    turned off (`transformers.utils.logging.disable_progress_bar`).
    """
    console = console or Console(stderr=True)
    if not (console.is_terminal or console.is_jupyter) or not is_progress_bar_enabled():
        yield lambda: None
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}, step {task.completed:.0f}"), BarColumn(bar_width=30))
    bar = Progress(*columns, TimeElapsedColumn(), console=console, transient=True)
    task = bar.add_task(description, total=None)
    starting = threading.Timer(silent_s, bar.start)
    starting.daemon = True
    starting.start()
    try:
        yield lambda: bar.advance(task)
    finally:
        starting.cancel()
        starting.join()
        bar.stop()
