"""A list of measurements that takes minutes: within a budget of time, resumed where it was left, kept as JSON.

Each is made and written down by itself: what fails is a row that says so, and hides no other.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hf_accel.errors import ConfigError, described
from hf_accel.measure.machine import Machine, versions


@dataclass(frozen=True)
class Row:
    """One line of the table: what was measured, the figures by name, and the command or remark that goes with it.

    figures: numbers by what they are ("stock ms", "ours ms", "ratio"). error: why there are none.
    """

    work: str
    figures: dict[str, float] = field(default_factory=dict)
    note: str = ""
    error: str | None = None


Work = Callable[[], list[Row]]


@dataclass
class Suite:
    """The rows of a suite so far, with where and when they were made.

    path: the JSON file that is written after every work; rows that stand in it, of the same machine and versions and
    without an error, are not made again. None: nothing is kept.
    """

    name: str
    path: Path | None = None
    machine: dict[str, Any] = field(default_factory=lambda: asdict(Machine.here()))
    versions: dict[str, str] = field(default_factory=versions)
    done: dict[str, list[Row]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def resume(self) -> None:
        """Take over what the file holds of the same machine and versions.

        Raises:
            ConfigError: the file is there, and is none of a suite.
        """
        if self.path is None or not self.path.exists():
            return
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
            same = all(found[key] == getattr(self, key) for key in ("name", "machine", "versions"))
            rows = {name: [Row(**row) for row in made] for name, made in found["works"].items()}
            seconds = {name: float(taken) for name, taken in found["seconds"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"{str(self.path)!r} was to be resumed, but holds no results of a suite ({described(error)}). "
                "Name another file."
            ) from error
        if same:
            self.done = {name: made for name, made in rows.items() if not any(row.error for row in made)}
            self.seconds = {name: seconds[name] for name in self.done if name in seconds}

    def run(self, works: Mapping[str, Work], budget_s: float) -> Iterator[str]:
        """Make what is missing, in order, and yield the name of each work once it is done or left out.

        A work is begun only while the budget lasts; those left out have a row that says so, and are made by the next
        run. An interrupt loses the work in hand only.
        """
        begin = time.perf_counter()
        for name, work in works.items():
            if name in self.done:
                yield name
                continue
            start = time.perf_counter()
            if start - begin > budget_s:
                made = [Row(name, error=f"not begun: the {budget_s:.0f} s were over")]
            else:
                try:
                    made = work()
                except Exception as error:  # a kernel that does not compile, memory that is short: the others go on
                    made = [Row(name, error=described(error))]
                self.seconds[name] = time.perf_counter() - start
            self.done[name] = made
            self._write()
            yield name

    def rows(self) -> list[Row]:
        """Return all rows in the order in which they were made."""
        return [row for made in self.done.values() for row in made]

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return {
            "name": self.name,
            "machine": self.machine,
            "versions": self.versions,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "works": {name: [asdict(row) for row in made] for name, made in self.done.items()},
            "seconds": self.seconds,
        }

    def markdown(self) -> str:
        """Return the rows as a table for docs/results.md, below a line on machine and versions."""
        where = self.machine["gpu"] or self.machine["cpu"]
        installed = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        lines = [
            f"{where}; {installed}; {datetime.now(UTC):%Y-%m-%d}",
            "",
            "| work | measured | note |",
            "|---|---|---|",
        ]
        for row in self.rows():
            measured = ", ".join(f"{name} {value:.4g}" for name, value in row.figures.items())
            lines.append(f"| {row.work} | {measured if row.error is None else 'none: ' + row.error} | {row.note} |")
        return "\n".join(lines) + "\n"

    def _write(self) -> None:
        if self.path is None:
            return
        written = self.path.with_name(self.path.name + ".part")
        written.write_text(json.dumps(self.to_dict(), indent=2), encoding="utf-8")
        os.replace(written, self.path)
