"""`hf-accel serve`: a model, optimised, behind an endpoint that speaks OpenAI's protocol."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from hf_accel.assets import demo_path
from hf_accel.batching import serving
from hf_accel.cli.models import (
    Bits,
    Device,
    Dtype,
    GoalName,
    GroupSize,
    Threads,
    check_device,
    few_bits,
    load_tokenizer,
    use_threads,
)
from hf_accel.cli.output import errors, progress
from hf_accel.endpoint import Limits, build_app, check_installed
from hf_accel.errors import ConfigError
from hf_accel.loading import load

DEMO = "demo"
_DEFAULTS = Limits()
RUNNING = 8  # they share each reading of the weights


def serve(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A local folder, a hub id, or demo: the embedded one.")],
    goal: GoalName = "exact",
    bits: Bits = None,
    group_size: GroupSize = None,
    dtype: Annotated[Dtype | None, typer.Option(help="Data type of the weights.", show_default="as stored")] = None,
    device: Device = "cpu",
    threads: Threads = None,
    name: Annotated[str | None, typer.Option(help="What clients call it.", show_default="MODEL")] = None,
    host: Annotated[str, typer.Option(help="The address to listen at; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="The port to listen at.")] = 8000,
    api_key: Annotated[
        str | None, typer.Option(envvar="HF_ACCEL_API_KEY", help="What clients must send.", show_default="nothing")
    ] = None,
    chat_template: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="A file with the chat template to use.")
    ] = None,
    running: Annotated[int, typer.Option(help="Requests that generate at a time, as rows of one batch.")] = RUNNING,
    waiting: Annotated[int, typer.Option(help="Requests that may wait beside them.")] = _DEFAULTS.waiting,
    latency: Annotated[
        float | None, typer.Option(help="Milliseconds between two tokens that are aimed at.", show_default="no bound")
    ] = None,
    context: Annotated[
        int | None, typer.Option(help="Tokens of prompt and text together.", show_default="the model's")
    ] = None,
    new_tokens: Annotated[
        int | None, typer.Option(help="Tokens that a request may ask for.", show_default="what the context leaves")
    ] = None,
    choices: Annotated[int, typer.Option(help="Choices that a request may ask for.")] = _DEFAULTS.choices,
    body_bytes: Annotated[int, typer.Option(help="Bytes that a request may have.")] = _DEFAULTS.body_bytes,
    drain: Annotated[
        float, typer.Option(help="Seconds that requests have to finish when the server is stopped.")
    ] = _DEFAULTS.drain_s,
) -> None:
    """Serve MODEL, optimised, to clients of OpenAI's API: chat completions and completions, until it is stopped."""
    check_installed()
    limits = Limits(
        running=running,
        waiting=waiting,
        context_tokens=context,
        new_tokens=new_tokens,
        choices=choices,
        body_bytes=body_bytes,
        drain_s=drain,
    )
    folder = str(demo_path()) if model == DEMO else model
    configs = few_bits(bits, group_size)
    use_threads(threads)
    check_device(device)
    tokenizer = load_tokenizer(folder)
    if tokenizer is None:
        raise ConfigError(f"No tokenizer could be loaded from {model!r}; a model without one cannot be served.")
    if chat_template is not None:
        tokenizer.chat_template = chat_template.read_text(encoding="utf-8")
    with progress(f"loading {model}") as step:
        steps: Any = [goal, *configs] if configs else goal
        loaded = load(folder, steps, dtype=None if dtype is None else dtype.torch, device=device, progress=step)
    with joined(loaded, limits, latency) as served:
        app = build_app(served, tokenizer, name=name or model, limits=limits, api_key=api_key)
        run(app, host, port, drain)


@contextmanager
def joined(model: Any, limits: Limits, latency_ms: float | None = None) -> Iterator[Any]:
    """Let requests that run at the same time join in one batch."""
    with serving(model, max_rows=max(limits.running, limits.choices), latency_ms=latency_ms) as joining:
        yield joining


def run(app: Any, host: str, port: int, drain_s: float) -> None:
    """Serve an application until a signal comes; then take no more requests, and give those that run `drain_s`."""
    import uvicorn

    errors.print(f"serving at http://{host}:{port}/v1; stop with Ctrl+C", markup=False, highlight=False)
    uvicorn.run(
        app,
        host=host,
        port=port,
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=max(1, round(drain_s)),
    )
