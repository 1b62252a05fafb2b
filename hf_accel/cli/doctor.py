"""`hf-accel doctor`: what this machine has, what is in use, and what to do about the rest."""

from __future__ import annotations

from dataclasses import asdict
from importlib import metadata
from typing import Any

from rich.markup import escape
from rich.table import Table

from hf_accel.cli.advice import advice
from hf_accel.cli.models import AsJson, Threads, use_threads
from hf_accel.cli.output import progress, results, write_json
from hf_accel.kernels import native, pages
from hf_accel.measure import Machine, read_bandwidth, versions
from hf_accel.measure.pages import page_trial
from hf_accel.measure.threads import ThreadTrial, thread_trial
from hf_accel.measure.topology import Topology

# distributions that each extra of hf-accel brings, as in pyproject.toml (a test compares)
EXTRAS: dict[str, tuple[str, ...]] = {
    "gpu": ("triton",),
    "flash": ("flash-attn",),
    "gptq": ("gptqmodel", "optimum"),
    "gguf": ("gguf",),
    "peft": ("peft",),
    "onnx": ("onnx", "onnxruntime"),
    "bench": ("psutil",),
    "plot": ("matplotlib",),
    "ray": ("ray",),
    "serve": ("fastapi", "uvicorn", "prometheus-client"),
    "test": (
        "pytest",
        "pytest-xdist",
        "hypothesis",
        "compressed-tensors",
        "triton",
        "peft",
        "gguf",
        "fastapi",
        "uvicorn",
        "prometheus-client",
        "openai",
        "ruff",
        "mypy",
    ),
}


def doctor(threads: Threads = None, as_json: AsJson = False) -> None:
    """Show the machine, its memory and threads, the native kernels and the optional packages, with what to do."""
    use_threads(threads)
    with progress("trying memory and threads"):
        found = examine()
    if as_json:
        write_json(found)
        return
    table = Table(show_header=False, box=None)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")  # a path is needed in full
    for label, value in _rows(found):
        table.add_row(f"[bold]{label}", value)
    results.print(table, highlight=False)


def examine() -> dict[str, Any]:
    """Return everything `doctor` shows, as JSON values."""
    topology = Topology.here()
    trial, in_pages = _tried(topology), None if pages.obstacle() else page_trial()
    return {
        "machine": asdict(Machine.here()),
        "versions": versions(),
        "native": asdict(native.status()) | {"supported_isas": list(native.supported_isas())},
        "read_bandwidth_bytes_per_s": read_bandwidth("cpu"),
        "topology": asdict(topology),
        "threads": None if trial is None else trial.to_dict(),
        "large_pages": {"obstacle": pages.obstacle(), "trial": None if in_pages is None else in_pages.to_dict()},
        "advice": advice(topology, trial, in_pages),
        "extras": {name: {package: _version(package) for package in packages} for name, packages in EXTRAS.items()},
    }


def _tried(topology: Topology) -> ThreadTrial | None:
    """Return the trial of threads, None where memory is too short for it."""
    try:
        return thread_trial(topology)
    except RuntimeError:
        return None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    machine, kernels, installed = found["machine"], found["native"], found["versions"]
    memory = f", {machine['memory_bytes'] / 2**30:.1f} GiB" if machine["memory_bytes"] else ""
    rows = [
        ("machine", f"{machine['cpu']}, {machine['cores']} cores{memory}, {machine['system']}"),
        ("GPU", machine["gpu"] or "none that torch can use"),
        ("threads", f"{machine['threads']}{_advice_on_threads(machine)}"),
        ("memory reads", f"{found['read_bandwidth_bytes_per_s'] / 1e9:.1f} GB/s"),
        *_tried_rows(found),
        *(("advice" if place == 0 else "", escape(text)) for place, text in enumerate(found["advice"])),
        ("versions", ", ".join(f"{name} {version}" for name, version in installed.items())),
    ]
    if kernels["available"]:
        rows.append(
            ("native kernels", f"[green]in use[/]: {kernels['isa']} (of {', '.join(kernels['supported_isas'])})")
        )
        rows.append(("", f"threads: {kernels['threading']}"))
        rows.append(("", f"library: {escape(kernels['path'])}"))
    else:
        rows.append(("native kernels", f"[yellow]not in use[/], ATen computes instead: {escape(kernels['reason'])}"))
    for name, packages in found["extras"].items():
        missing = [package for package, version in packages.items() if version is None]
        present = ", ".join(f"{package} {version}" for package, version in packages.items() if version)
        if missing:
            state = f"[dim]without {', '.join(missing)}[/]: pip install 'hf-accel\\[{name}]'"
            present = f"{present}; {state}" if present else state
        rows.append((f"extra {name}", present))
    return rows


def _tried_rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    topology, trial, in_pages = found["topology"], found["threads"], found["large_pages"]["trial"]
    granted = "" if topology["quota"] is None else f", {topology['quota']:g} of them granted"
    nodes = len(topology["nodes"])
    rows = [
        ("", f"{topology['logical']} processors on {topology['physical']} cores and {nodes} memory nodes{granted}"),
    ]
    if trial is not None:
        rates = ", ".join(f"{rate / 1e9:.1f} with {count}" for count, rate in trial["products"].items())
        rows.append(("products read", f"{rates} threads (GB/s)"))
    if in_pages is not None:
        rows.append(
            ("large pages", f"{in_pages['large'] / 1e9:.1f} GB/s, {in_pages['small'] / 1e9:.1f} from small ones")
        )
    return rows


def _advice_on_threads(machine: dict[str, Any]) -> str:
    if machine["threads"] < machine["cores"]:
        return f" of {machine['cores']} cores: unset OMP_NUM_THREADS or call torch.set_num_threads to use them all"
    if machine["threads"] > machine["cores"]:
        return f", but only {machine['cores']} cores: fewer threads will be faster"
    return ""
