"""What `hf-accel doctor` says about threads, nodes and memory: sentences from what was found and tried."""

from __future__ import annotations

import math

from hf_accel.kernels import pages
from hf_accel.measure.pages import PageTrial
from hf_accel.measure.threads import ThreadTrial
from hf_accel.measure.topology import Topology

_WORTH = 1.05  # a gain below it is not worth a change
_STRICT = 2  # vm.overcommit_memory


def advice(found: Topology, trial: ThreadTrial | None, gain_of_pages: PageTrial | None) -> list[str]:
    """Return what to change, and what it would gain where that was tried; empty where nothing is known to gain."""
    said = [*_threads(found, trial), *_nodes(found, trial)]
    if reason := pages.obstacle():
        said.append(f"Large pages: {reason} Weights, caches and buffers lie in small ones.")
    elif gain_of_pages is not None and gain_of_pages.gain >= _WORTH:
        said.append(
            f"Large pages: products read {gain_of_pages.gain:.2f} x as fast from them. Packed weights and caches lie "
            "in them already; LargePagesConfig puts all weights there."
        )
    if found.overcommit == _STRICT:
        said.append(
            "vm.overcommit_memory is 2: the system refuses memory that it could not back, also where a model would "
            "never write to it. Load with hf_accel.load, which holds one tensor beside the result."
        )
    return said


def _threads(found: Topology, trial: ThreadTrial | None) -> list[str]:
    said = []
    threads = found.threads
    if found.quota is not None and threads > math.ceil(found.quota):
        said.append(
            f"Threads: {threads} run, and the control group grants {found.quota:g} processors: all of them are stopped "
            f"once that is used up. Call torch.set_num_threads({max(1, math.floor(found.quota))}) or raise the limit."
        )
    elif threads > found.logical:
        said.append(f"Threads: {threads} run on {found.logical} processors and wait for one another; use fewer.")
    elif found.physical < threads:
        said.append(
            f"Threads: {threads} run on {found.physical} cores, two or more on each; one on each often suffices."
        )
    if found.logical == 1:
        said.append("Threads: there is one processor; nothing runs beside anything else.")
    if trial is not None and trial.best != trial.threads and trial.gain >= _WORTH:
        variables = "".join(f" ({name}={value} is set)" for name, value in found.variables.items() if "NUM" in name)
        said.append(
            f"Threads: {trial.best} instead of {trial.threads} read {trial.gain:.2f} x as fast: call "
            f"torch.set_num_threads({trial.best}){variables}."
        )
    return said


def _nodes(found: Topology, trial: ThreadTrial | None) -> list[str]:
    if len(found.nodes) < 2 or found.policy.startswith("interleave"):
        return []
    sizes = ", ".join(map(str, found.nodes))
    said = f"Nodes: memory lies on {len(found.nodes)} nodes (processors: {sizes}), and a model lies where it was read."
    if trial is not None and trial.spread is not None and trial.spread >= _WORTH:
        said += f" Memory spread over them is read {trial.spread:.2f} x as fast: start with numactl --interleave=all."
    else:
        said += " Try numactl --interleave=all, or --cpunodebind=0 --membind=0 where one node suffices."
    return [said]
