"""An endpoint that speaks OpenAI's protocol over one model: each request is one ordinary `model.generate` call."""

from __future__ import annotations

import importlib.util
from typing import Any

from hf_accel.endpoint.limits import Limits
from hf_accel.errors import MissingDependencyError

__all__ = ["Limits", "build_app", "check_installed"]

_PACKAGES = {"fastapi": "fastapi", "uvicorn": "uvicorn", "prometheus_client": "prometheus-client"}


def check_installed() -> None:
    """Raise where a package that serving needs is not installed.

    Raises:
        MissingDependencyError: names the packages, and the extra that brings them.
    """
    missing = [name for module, name in _PACKAGES.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise MissingDependencyError(f"Serving needs {', '.join(missing)}: pip install 'hf-accel[serve]'.")


def build_app(
    model: Any, tokenizer: Any, *, name: str, limits: Limits | None = None, api_key: str | None = None
) -> Any:
    """Return an ASGI application (FastAPI) that serves `model`, optimised or not, as `name`.

    The model belongs to the application while it serves: nothing is written to it, and `generate` is called on it from
    `limits.running` threads. When the application's lifespan ends, requests are given `limits.drain_s` to finish.

    Args:
        model: any causal language model of transformers with `generate`.
        tokenizer: the model's; chat needs one with a chat template.
        name: what clients call the model.
        limits: what is refused; None: the defaults of `Limits`.
        api_key: what clients must send as a bearer token to everything below /v1; None: nothing.

    Raises:
        MissingDependencyError: the extra `serve` is not installed.
        ConfigError: a limit does not fit, or the key is empty.
        UnsupportedModelError: the model does not continue texts.
    """
    check_installed()
    from hf_accel.endpoint.app import Endpoint

    return Endpoint(model, tokenizer, name=name, limits=limits or Limits(), api_key=api_key).app()
