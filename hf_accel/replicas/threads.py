"""How many threads a replica computes with: what Ray grants it, and never more than there are."""

from __future__ import annotations

import os
from typing import Any

import torch

from hf_accel.measure.topology import Topology


def threads_for(granted: float, asked: int | None, usable: int) -> int:
    """Return the number of threads of one replica, at least 1.

    granted: CPUs that Ray counts for it, which may be a part of one. asked: by the recipe; None: as many as granted.
        More than granted are not taken: the other replicas compute on them. usable: processors the process may use.
    """
    within = max(1, min(int(granted), usable))
    return within if asked is None else min(asked, within)


def usable_processors() -> int:
    """Return how many processors this process may keep busy: its affinity mask, and what its control group grants."""
    topology = Topology.here()
    quota = topology.logical if topology.quota is None else int(topology.quota)
    return max(1, min(topology.logical, quota))


def use_granted(runtime: Any, asked: int | None) -> int:
    """Let torch, and so the native library, compute with what Ray grants the actor that calls this; returns the number.

    runtime: `ray.get_runtime_context()` of the actor.
    """
    count = threads_for(runtime.get_assigned_resources().get("CPU", 1), asked, usable_processors())
    os.environ["OMP_NUM_THREADS"] = str(count)  # for pools that are not loaded yet
    torch.set_num_threads(count)
    return count
