"""Where families may stand in a call."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch

from hf_accel.core.calls.call import Call, NewCache

pass


class Decoder(Protocol):
    """A token loop: says what it cannot serve, and serves the rest."""

    def objection(self, call: Call) -> str | None: ...

    def run(self, call: Call) -> Any: ...


class Caching(Protocol):
    """What gives caches their layers, and the prompts what is known of them already."""

    def fill(self, new: NewCache) -> None: ...

    def prefilling(
        self, model: Any, input_ids: torch.Tensor, generation_config: Any, kwargs: dict[str, Any], tenant: str | None
    ) -> AbstractContextManager[None]: ...
