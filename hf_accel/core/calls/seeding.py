"""`generate(seed=...)`: draws of a call from a generator of its own, whatever other threads draw meanwhile.

torch has one generator per device and process, so that of two calls at once neither draws what it draws alone. A call
with a seed draws what stock draws after `torch.manual_seed(seed)`, and leaves torch's own generators as they are.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from hf_accel.core.calls.call import Request, request_in_progress
from hf_accel.core.calls.keywords import Keyword, register
from hf_accel.errors import ConfigError

DRAWS = threading.Lock()  # who draws has it, and who captures steps: torch's generators refuse to draw meanwhile
_turn = threading.Lock()  # for what draws from torch's own generators


class Seeded:
    """The generators of one call, one per device that it draws on."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._generators: dict[torch.device, torch.Generator] = {}

    def on(self, device: torch.device) -> torch.Generator:
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(self.seed)
        return self._generators[device]


def generator_on(device: torch.device) -> torch.Generator | None:
    """Return the generator that the call in progress draws from on a device; None: torch's own."""
    request = request_in_progress()
    seeded: Seeded | None = None if request is None else request.options.get("seed")
    return None if seeded is None else seeded.on(device)


@contextmanager
def stocks_draws(request: Request | None, device: torch.device) -> Iterator[None]:
    """Let a call that stock serves draw by its seed: from torch's own generators, which are put back afterwards.

    Such calls run one after the other.
    """
    seeded: Seeded | None = None if request is None else request.options.get("seed")
    if seeded is None:
        yield
        return
    with _turn, torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seeded.seed)
        yield


def _seed(model: Any, value: Any, arguments: dict[str, Any]) -> Seeded:
    """Understand `generate(seed=...)`."""
    if type(value) is not int or not 0 <= value < 2**63:
        raise ConfigError(f"seed is a whole number from 0 to 2**63 - 1; {value!r} was given.")
    return Seeded(value)


register(Keyword("seed", _seed))
