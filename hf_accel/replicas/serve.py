"""Replicas behind Ray Serve: one deployment, whose routing, health checks and restarts are Serve's."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from typing import Any

import torch

from hf_accel.errors import ConfigError, ReplicaError, described
from hf_accel.replicas.answering import Answering
from hf_accel.replicas.asked import Asked
from hf_accel.replicas.handle import Replicas
from hf_accel.replicas.package import ray_module
from hf_accel.replicas.pieces import pieces
from hf_accel.replicas.recipe import ModelRecipe
from hf_accel.replicas.threads import use_granted


class Replica:
    """The deployment: one process with one model. Serve makes it, and calls its methods in one event loop."""

    def __init__(self, recipe: ModelRecipe, at_once: int) -> None:
        threads = use_granted(ray_module().get_runtime_context(), recipe.threads)
        self._answering = Answering(recipe, threads, at_once)

    async def __call__(self, asked: Asked) -> Any:
        """Answer a request; see `Answering.answer`."""
        try:
            return await asyncio.wrap_future(self._answering.submit(asked))
        except torch.AcceleratorError:
            # nothing in this process can use the accelerator again: Serve starts another, and handles send there
            # what was under way here
            os._exit(1)

    async def pieces(self, asked: Asked) -> AsyncIterator[str]:
        """Answer piece by piece."""
        try:
            async for piece in pieces(self._answering, asked):
                yield piece
        except torch.AcceleratorError:
            os._exit(1)

    async def report(self) -> dict[str, Any]:
        """Return what this replica did; see `Answering.report`."""
        return self._answering.report()

    async def check_health(self) -> None:
        """Tell Serve whether to go on: its event loop answers this, and the accelerator works.

        Raises:
            ReplicaError: the accelerator has failed.
        """
        if self._answering.broken is not None:
            raise ReplicaError(f"The accelerator has failed ({described(self._answering.broken)}).")


def run(
    recipe: ModelRecipe,
    replicas: int = 2,
    *,
    cpus: int | None = None,
    gpus: float = 0,
    at_once: int = 1,
    tries: int = 3,
    timeout_s: float | None = None,
    name: str = "hf_accel",
    health_check_s: float = 10.0,
) -> Replicas:
    """Start replicas of a model on the Ray cluster at hand, or on one of this machine, and return a handle.

    Args:
        recipe: how each makes its model.
        replicas: how many.
        cpus: CPUs that Ray counts for each, and its threads; None: the recipe's threads, or the cluster's CPUs in equal
            parts.
        gpus: GPUs for each; the recipe puts the model there (`load_options={"device": "cuda"}`).
        at_once: calls of `generate` that run in a replica at the same time, each with all of its threads. One more
            waits there, so that it has work when one is done; others wait where Serve can send them to whoever is free.
        tries: how many replicas may die with one request before it is an error.
        timeout_s: of one request of the handle's `generate`; None: it waits for replicas as long as it takes.
        name: of the application in Serve.
        health_check_s: seconds between Serve's checks of each replica.

    Raises:
        MissingDependencyError: ray is not installed.
        ConfigError: a number does not fit, the cluster has too few CPUs, or the name is in use.
        ReplicaError: replicas could not be started; the cause says why.
    """
    for what, value in (("replicas", replicas), ("at_once", at_once), ("tries", tries), ("cpus", cpus)):
        if not (what == "cpus" and value is None) and (not isinstance(value, int) or value < 1):
            raise ConfigError(f"{what} is {value!r}; it is a number, 1 or more.")
    ray, serve = ray_module(), ray_module("ray.serve")
    is_ours = not ray.is_initialized()
    if is_ours:
        ray.init(include_dashboard=False)

    def end() -> None:
        if is_ours:
            serve.shutdown()
            ray.shutdown()
        else:
            serve.delete(name)

    try:
        there = int(ray.cluster_resources().get("CPU", 0))
        each = cpus or recipe.threads or max(1, there // replicas)
        if each * replicas > there:
            raise ConfigError(
                f"{replicas} replicas of {each} CPUs need {each * replicas}; the cluster has {there}. Ask for "
                "fewer, or add nodes first."
            )
        serve.start(proxy_location="Disabled")  # requests come by the handle; there is no HTTP server
        if name in serve.status().applications:
            raise ConfigError(
                f"The cluster runs an application {name!r} already. Shut it down, or give another name=..."
            )
    except BaseException:
        if is_ours:
            end()
        raise
    options = {
        "num_replicas": replicas,
        "ray_actor_options": {"num_cpus": each, "num_gpus": gpus},
        "max_ongoing_requests": at_once + 1,
        "health_check_period_s": health_check_s,
        "max_constructor_retry_count": 3,
    }
    try:
        deployment = serve.deployment(Replica).options(**options).bind(recipe, at_once)
        handle = serve.run(deployment, name=name, route_prefix=None)
    except Exception as error:
        why = _failed(serve, name) or described(error)
        end()
        raise ReplicaError(f"The replicas could not be started: {why}") from error
    return Replicas(handle, tries, timeout_s, end)


def _failed(serve: Any, name: str) -> str:
    """Return the last line of what Serve tells of replicas that did not start, "" where it tells nothing."""
    application = serve.status().applications.get(name)
    told = [] if application is None else [each.message for each in application.deployments.values()]
    lines = [line.strip() for message in told for line in message.splitlines() if "Error" in line]
    return lines[-1] if lines else ""
