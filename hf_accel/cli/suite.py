"""`hf-accel bench --suite`: a list of measurements, resumed from its file, as a table and as JSON."""

from __future__ import annotations

from pathlib import Path

import torch
from rich.table import Table

from hf_accel.cli.gpu_works import GpuWorks
from hf_accel.cli.output import progress, results, write_json
from hf_accel.errors import ConfigError
from hf_accel.measure import SHAPES
from hf_accel.measure.suite import Suite

SUITES = ("gpu",)


def run_suite(name: str, shape: str, device: str, out: Path | None, budget_s: float, *, as_json: bool) -> None:
    """Make what is missing of the suite called `name` and show all of it; `out` is the JSON file, beside it a .md.

    Raises:
        ConfigError: there is no such suite or shape, the device is no GPU, or the file is none of a suite.
    """
    if name not in SUITES:
        raise ConfigError(f"There is no suite called {name!r}. Suites: {', '.join(SUITES)}.")
    if shape not in SHAPES:
        raise ConfigError(f"A suite measures a shape ({', '.join(SHAPES)}); {shape!r} was given.")
    if torch.device(device).type != "cuda":
        raise ConfigError(f"The suite {name!r} measures a GPU; the device is {device!r}. Add --device cuda.")
    suite = Suite(f"{name}, {shape}, {device}", out)
    suite.resume()
    works = GpuWorks(shape, device).works()
    with progress(f"suite {name}", len(works)) as step:
        for _ in suite.run(works, budget_s):
            step()
    if out is not None:
        out.with_suffix(".md").write_text(suite.markdown(), encoding="utf-8")
    if as_json:
        write_json(suite.to_dict())
        return
    table = Table("work", "measured", "note", title=suite.name, title_justify="left")
    for row in suite.rows():
        measured = "\n".join(f"{what} {value:.4g}" for what, value in row.figures.items())
        table.add_row(row.work, f"[red]{row.error}" if row.error else measured, row.note)
    results.print(table, highlight=False)
