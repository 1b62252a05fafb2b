"""stub"""

from collections.abc import Callable
from typing import Any

WAYS: dict[tuple[str, str], Callable[[Any], Any]] = {}


def architectures_for(model_type: str) -> list[str]:
    return [target for source, target in WAYS if source == model_type]


def in_architecture(model: Any, architecture: str) -> Any:
    raise NotImplementedError
