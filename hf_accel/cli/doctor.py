"""`hf-accel doctor`: what this machine has, what is in use, and what to do about the rest."""

from __future__ import annotations

from dataclasses import asdict
from importlib import metadata
from typing import Any

from rich.markup import escape
from rich.table import Table

from hf_accel.cli.models import AsJson, Threads, use_threads
from hf_accel.cli.output import progress, results, write_json
from hf_accel.kernels import native
from hf_accel.measure import Machine, read_bandwidth, versions

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
    "test": ("pytest", "pytest-xdist", "hypothesis", "compressed-tensors", "triton", "peft", "gguf", "ruff", "mypy"),
}


def doctor(threads: Threads = None, as_json: AsJson = False) -> None:
    """Show the machine, the native kernels, the memory bandwidth and the optional packages, with what to do."""
    use_threads(threads)
    with progress("measuring the memory bandwidth"):
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
    return {
        "machine": asdict(Machine.here()),
        "versions": versions(),
        "native": asdict(native.status()) | {"supported_isas": list(native.supported_isas())},
        "read_bandwidth_bytes_per_s": read_bandwidth("cpu"),
        "extras": {name: {package: _version(package) for package in packages} for name, packages in EXTRAS.items()},
    }


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


def _advice_on_threads(machine: dict[str, Any]) -> str:
    if machine["threads"] < machine["cores"]:
        return f" of {machine['cores']} cores: unset OMP_NUM_THREADS or call torch.set_num_threads to use them all"
    if machine["threads"] > machine["cores"]:
        return f", but only {machine['cores']} cores: fewer threads will be faster"
    return ""
