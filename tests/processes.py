"""Processes of their own for scripts, forked from one that has imported everything: starting takes no time.

What an interpreter does when it starts or ends is not seen so; tests of that start one by `subprocess`.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from pathlib import Path
from typing import Any

_context: Any = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["hf_accel", "hf_accel.cache.tiers", "transformers.models.llama.modeling_llama"])


def _run(script: str, arguments: list[str], out: str, error: str) -> None:
    """Be the process: `python -c script arguments`, with files in place of the terminal."""
    for path, stream in ((out, 1), (error, 2)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT)
        os.dup2(file, stream)
        os.close(file)
    sys.argv = ["-c", *arguments]
    exec(compile(script, "<string>", "exec"), {"__name__": "__main__"})


class Running:
    """A script under way; its output is complete once it has ended."""

    def __init__(self, script: str, folder: Path, *arguments: object) -> None:
        """folder: where its output is kept."""
        folder.mkdir(parents=True, exist_ok=True)
        self._out, self._error = folder / "stdout", folder / "stderr"
        given = (script, [str(argument) for argument in arguments], str(self._out), str(self._error))
        self._process = _context.Process(target=_run, args=given, daemon=True)
        self._process.start()

    def poll(self) -> int | None:
        """Return the exit status, negative for a signal; None while it runs."""
        return self._process.exitcode  # type: ignore[no-any-return]

    def wait(self, timeout: float) -> int | None:
        """Wait for its end and return the exit status."""
        self._process.join(timeout)
        return self.poll()

    def kill(self) -> None:
        self._process.kill()

    @property
    def stdout(self) -> str:
        return self._out.read_text()

    @property
    def stderr(self) -> str:
        return self._error.read_text()
