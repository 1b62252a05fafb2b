"""Seeds, the CUDA device, and the only place that says why a test is skipped."""

from __future__ import annotations

import interpreter  # noqa: F401  # isort: skip

import gc
import importlib.util
import logging
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

from hf_accel.kernels import native

settings.register_profile(
    "repeatable", derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)
settings.load_profile("repeatable")

SKIPS = {
    "gpu": (torch.cuda.is_available(), "no CUDA device on this machine"),
    "native": (native.is_available(), f"no native library: {native.status().reason}"),
    "compressed_tensors": (
        importlib.util.find_spec("compressed_tensors") is not None,
        "compressed-tensors is not installed (extra: test)",
    ),
    "triton": (importlib.util.find_spec("triton") is not None, "Triton is not installed (extra: test)"),
    "ray": (importlib.util.find_spec("ray") is not None, "ray is not installed (extra: ray)"),
    "peft": (importlib.util.find_spec("peft") is not None, "peft is not installed (extra: test)"),
}


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "compressed_tensors: needs compressed-tensors")
    config.addinivalue_line("markers", "native: needs the native library")
    config.addinivalue_line("markers", "peft: needs peft")
    config.addinivalue_line("markers", "ray: needs ray")
    config.addinivalue_line("markers", "triton: needs Triton")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.name.startswith("test_planted"):  # tables of mistakes: they test the tests, and run weekly
            item.add_marker(pytest.mark.slow)
        for name, (is_there, reason) in SKIPS.items():
            if not is_there and item.get_closest_marker(name):
                item.add_marker(pytest.mark.skip(reason=reason))


def pytest_collection_finish() -> None:
    """What is imported and collected stays to the end: the collector need not walk through it again and again."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _repeatable() -> Iterator[None]:
    """Each test starts from the same random state; transformers' advice stays out of the output.

    Tiny models run on one thread: more gain nothing, and wait for one another where cores are shared.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    yield
    torch.set_num_threads(threads)
