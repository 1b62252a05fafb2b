"""The learning curve of a run: records of numbers, in memory, as JSON lines, and as a picture."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

from hf_accel.errors import MissingDependencyError


def check_picture() -> None:
    """Find out at the beginning whether a picture can be drawn at the end.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingDependencyError(
            "The picture of the learning curve needs matplotlib: pip install 'hf-accel[plot]'. Without picture=... the "
            "curve is written as numbers alone."
        )


class Curve:
    """Records of "step", "tokens", "seconds", and "loss" and "learning_rate" or what was measured, in order."""

    def __init__(self, file: Path | None, until: int) -> None:
        """Begin, or go on with the records of `file` up to the step `until`."""
        self.file = file
        self.records: list[dict[str, float]] = []
        if file is not None:
            if file.exists() and until:
                lines = file.read_text(encoding="utf-8").splitlines()
                self.records = [record for record in map(_read, lines) if record and record["step"] <= until]
            file.write_text("".join(json.dumps(record) + "\n" for record in self.records), encoding="utf-8")

    def add(self, **record: float) -> None:
        """Add a record, and write it to the file at once."""
        self.records.append(record)
        if self.file is not None:
            with self.file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")

    def draw(self, path: Path, teacher_perplexity: float | None) -> None:
        """Draw the curve to the picture `path`: the loss over tokens, and what was measured on held-out text."""
        from matplotlib.figure import Figure  # no pyplot: no window system is asked for

        figure = Figure(figsize=(7, 4), layout="constrained")
        axes: Any = figure.add_subplot()
        for name, style in (("loss", "-"), ("kl", "o-"), ("perplexity", "s--")):
            points = [(record["tokens"], record[name]) for record in self.records if record.get(name) is not None]
            if not points:
                continue
            if name == "perplexity":
                axes = axes.twinx()
                axes.set_ylabel("held-out perplexity")
                axes.plot(*zip(*points), style, color="tab:green", label="held-out perplexity (right)")
                if teacher_perplexity is not None:
                    axes.axhline(teacher_perplexity, color="tab:gray", linestyle=":", label="the teacher's (right)")
            else:
                label = {"loss": "training loss", "kl": "held-out KL to the teacher"}[name]
                axes.plot(*zip(*points), style, label=label)
                axes.set_yscale("log")
                axes.set_ylabel("nats per token")
                axes.set_xlabel("tokens")
        figure.legend(loc="outside upper center", ncols=2, frameon=False)
        figure.savefig(path, dpi=120)


def _read(line: str) -> dict[str, float]:
    try:
        return json.loads(line)
    except ValueError:  # the end of a file that was being written when the machine stopped
        return {}
