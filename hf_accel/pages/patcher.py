"""The step that puts the weights of a model into large pages, values and parameters as they were.

Memory of the process is collapsed where it lies: no address changes, and nothing is to be undone. Weights that lie in a
mapped file, as transformers loads them, or that the system does not collapse, are copied one tensor at a time; what
they were copied from goes at once with originals="drop", else it waits for `restore`.
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_accel.core.calls.hosting import Host
from hf_accel.core.config import Config
from hf_accel.core.journal import Journal
from hf_accel.core.steps.goal import Goal, Offer
from hf_accel.core.steps.patcher import Change, Fidelity, Patcher, Stage
from hf_accel.core.steps.setting import Setting
from hf_accel.kernels import pages
from hf_accel.measure.pages import PageTrial, page_trial

_ENOUGH = 0.5  # of a tensor's bytes in large pages: its ends may have pages in common with what lies elsewhere


@dataclass(frozen=True, kw_only=True)
class LargePagesConfig(Config):
    """The model's weights in memory of large pages (2 MiB), which products read through fewer address lookups."""


class LargePagesPatcher(Patcher[LargePagesConfig], config=LargePagesConfig):
    stage = Stage.PRODUCTS  # behind what packs weights, before what is tried on them
    fidelity = Fidelity.EXACT
    occupies = "memory pages"
    moves_tensors = True

    @classmethod
    def candidates(cls, goal: Goal, setting: Setting) -> Offer:
        return Offer()  # weights in a mapped file are copied, which costs memory: whoever wants that says so

    def obstacles(self, setting: Setting) -> list[str]:
        if setting.anatomy.device.type != "cpu":
            return ["large pages are asked for in the CPU's memory; the model lies elsewhere."]
        if not any(pages.is_large(tensor) for tensor in _tensors(setting.model)):
            return [f"no weight of the model fills a large page of {pages.page_bytes() >> 20} MiB."]
        return []

    def preview(self, setting: Setting) -> PageTrial | None:
        return None if pages.obstacle() else page_trial(setting.anatomy.dtype)

    @torch.inference_mode(False)
    @torch.no_grad()
    def patch(self, setting: Setting, host: Host) -> Change:
        if reason := pages.obstacle():
            return Change("weights stay in pages as they are", skipped=(reason,))
        trial, begin = page_trial(setting.anatomy.dtype), time.perf_counter()
        tensors = [tensor for tensor in _tensors(setting.model) if pages.is_large(tensor)]
        starts = Counter(tensor.data_ptr() for tensor in tensors)
        total = found = copied = shared = 0
        for tensor in tensors:
            total += tensor.nbytes
            now = pages.collapse(tensor)
            if now < _ENOUGH * tensor.nbytes:
                if starts[tensor.data_ptr()] > 1:  # copies would be separate
                    shared += 1
                else:
                    now = _move(tensor, host.journal)
                    copied += tensor.nbytes
            found += now
            setting.advance()
        skipped = []
        if found < _ENOUGH * total:
            skipped.append(f"the system put large pages beneath {found / 1e6:.1f} of {total / 1e6:.1f} MB only")
        if shared:
            skipped.append(f"{shared} weights that share memory of a file with others stay there")
        gain = "" if trial is None else f"; {trial}"
        return Change(
            f"{found / 1e6:.1f} of {total / 1e6:.1f} MB in large pages, {copied / 1e6:.1f} MB of them copied, in "
            f"{time.perf_counter() - begin:.1f} s{gain}",
            extra_bytes=0 if host.journal.originals == "drop" else copied,
            skipped=tuple(skipped),
        )


def _tensors(model: nn.Module) -> list[Tensor]:
    """Return each parameter and buffer once."""
    return [*model.parameters(), *model.buffers()]


def _move(tensor: Tensor, journal: Journal) -> int:
    """Give a tensor a copy of its memory, and return how many bytes of that lie in large pages."""
    before = tensor.data
    tensor.data = pages.copied(before)
    if journal.originals != "drop":
        journal.did(lambda: setattr(tensor, "data", before))
    return pages.collapse(tensor)
