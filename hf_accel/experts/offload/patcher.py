"""The step that moves the experts of a model to a file, and has calls keep some of them in memory."""

from __future__ import annotations

import os
import shutil
import tempfile
from functools import partial
from typing import Any

import torch

from hf_accel.core.calls.hosting import Host
from hf_accel.core.calls.report import SECTIONS
from hf_accel.core.journal import Journal, subclass
from hf_accel.core.model.experts import active_experts
from hf_accel.core.model.shadow import twin
from hf_accel.core.steps.goal import Goal, Offer
from hf_accel.core.steps.patcher import Change, Fidelity, Patcher, Stage
from hf_accel.core.steps.setting import Setting
from hf_accel.errors import HfAccelError, UnsupportedModelError, VerificationError
from hf_accel.experts.offload.config import ExpertOffloadConfig
from hf_accel.experts.offload.describing import described
from hf_accel.experts.offload.guard import Guard
from hf_accel.experts.offload.module import Offloaded, offloaded_forward
from hf_accel.experts.offload.preview import OffloadPreview, previewed
from hf_accel.experts.offload.rounds import computed
from hf_accel.experts.offload.slots import Slots
from hf_accel.experts.offload.statistics import OffloadStatistics
from hf_accel.experts.offload.store import ExpertStore, Modules, return_memory, store_of
from hf_accel.experts.offload.stored import StoredExperts
from hf_accel.kernels import native
from hf_accel.ops import tolerances

SECTION = "offloaded_experts"
_TOKENS = 4  # of the audit
_LEAST_BITS = 2  # of a weight, whatever other steps make of it


class ExpertOffloadPatcher(Patcher[ExpertOffloadConfig], config=ExpertOffloadConfig):
    stage = Stage.PRODUCTS
    fidelity = Fidelity.EXACT
    occupies = "experts"
    saves_memory = True
    moves_tensors = True

    @classmethod
    def candidates(cls, goal: Goal, setting: Setting) -> Offer:
        return Offer()  # it trades time for memory as no goal does: whoever wants that says how much

    def obstacles(self, setting: Setting) -> list[str]:
        anatomy = setting.anatomy
        found = native.obstacles(anatomy.device)
        if not hasattr(os, "preadv"):
            found.append("this system has no preadv, by which experts are read.")
        stored, skipped = described(anatomy.model, anatomy.dtype)
        if not stored:
            reasons = f" ({skipped[0]})" if skipped else ""
            return [*found, f"the model has no stacked experts that can be moved to a file{reasons}."]
        if all(store_of(module) is not None for module, _ in stored):
            return found  # a copy of a model whose experts lie in a file
        # other steps of the plan may put experts in few bits before this one; `patch` knows what has become of them
        can_shrink = any(each.products is None for _, each in stored)
        shrunk = _LEAST_BITS / 8 / anatomy.dtype.itemsize if can_shrink else 1.0
        found += self._too_small(anatomy.model, stored, 1.0 if self.config.budget_bytes is None else shrunk)
        folder, size = tempfile.gettempdir() if self.config.folder is None else self.config.folder, stored[-1][1].end
        if not os.path.isdir(folder) or not os.access(folder, os.W_OK | os.X_OK):
            found.append(
                f"no file can be written in the folder {folder!r}; name one that exists and can be written to."
            )
        elif (free := shutil.disk_usage(folder).free) < shrunk * size:
            found.append(f"the experts take {size:,} bytes, and {free:,} are free in {folder!r}; name another folder.")
        return found

    def _too_small(self, model: Any, stored: Modules, shrunk: float = 1.0) -> list[str]:
        """Return that the budget is below what a token wants of one layer, if experts take `shrunk` of their bytes."""
        active = min(active_experts(model) or 1, *(each.form.experts for _, each in stored))
        largest = max(max(each.bytes_of) for _, each in stored)
        budget = self._budget(stored)
        if budget >= active * largest * shrunk:
            return []
        return [
            f"a budget of {budget:,} bytes is below the {active} experts of {largest:,} bytes that one token wants in "
            f"one layer; give budget_bytes of {active * largest:,} at least."
        ]

    def _budget(self, stored: Modules) -> int:
        if self.config.budget_bytes is not None:
            return self.config.budget_bytes
        return int(self.config.share * sum(sum(each.bytes_of) for _, each in stored))

    def preview(self, setting: Setting) -> OffloadPreview:
        trial = twin(setting.model)
        stored, _ = described(trial, setting.anatomy.dtype)
        return previewed(trial, [each for _, each in stored], self._budget(stored), setting.calibration)

    @torch.inference_mode(False)
    @torch.no_grad()
    def patch(self, setting: Setting, host: Host) -> Change:
        anatomy, journal = setting.anatomy, host.journal
        model, before = anatomy.model, anatomy.weight_bytes
        modules, skipped = described(model, anatomy.dtype)
        shared = [store_of(module) for module, _ in modules]
        if modules and all(shared):
            pairs = [found for found in shared if found is not None]
            for (module, _), (store, each) in zip(modules, pairs, strict=True):
                _put(store, each, module, journal)
            return Change("experts lie where those of the model lie that this one is a copy of")
        try:
            if not modules:
                raise UnsupportedModelError("the model has no stacked experts any more that can be moved to a file.")
            if too_small := self._too_small(model, modules):
                raise UnsupportedModelError(too_small[0])
            store = ExpertStore(self.config.folder, modules, self._budget(modules))
        except HfAccelError as error:
            if not journal.given_up:
                raise
            # there is no way back to the model as it was: it goes on in memory
            return Change("all experts stay in memory", skipped=(*skipped, str(error)))
        slots = store.slots
        journal.first(store.bring_back)
        for module, each in modules:
            store.take(module, each)
            journal.did(partial(each.let_go, module))
            _audit(each, slots, module)
            _put(store, each, module, journal)
        return_memory()
        slots.reset()  # what was counted so far was none of the user's
        host.report.sections[SECTION] = OffloadStatistics(slots, store.modules)
        total, count = int(slots.sizes.sum()), len(slots.sizes)
        return Change(
            f"{count} experts of {len(modules)} layers ({total / 1e6:.1f} MB) lie in a file in {store.file.folder}, up "
            f"to {slots.budget / 1e6:.1f} MB of them in memory, too",
            skipped=tuple(skipped),
            weight_bytes=before - total + min(slots.budget, total),
        )


def _put(store: ExpertStore, stored: StoredExperts, module: Any, journal: Journal) -> None:
    """Give a module the class that computes with the experts in the file."""
    forward = offloaded_forward(stored, Guard(stored, module), store.slots)
    journal.swap_class(module, subclass(Offloaded, type(module), slots=store.slots, forward=forward))


def _audit(stored: StoredExperts, slots: Slots, module: Any) -> None:
    """Raise VerificationError if a few tokens come out otherwise than by the module's own code."""
    form, generator = stored.form, torch.Generator().manual_seed(0)
    hidden = torch.randn(_TOKENS, form.hidden, generator=generator).to(stored.dtype)
    ids = torch.stack([torch.randperm(form.experts, generator=generator)[:2] for _ in range(_TOKENS)])
    weights = torch.rand(ids.shape, generator=generator).to(stored.dtype)
    expected = module.forward(hidden, ids, weights)
    found = computed(stored, slots, hidden, ids, weights)
    difference = float((found.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30))
    bound = tolerances.of_layer_output(stored.dtype, stored.products is not None)
    if not difference <= bound:
        raise VerificationError(
            f"The experts {stored.path} ({type(module).__name__}) differ from their own code by {difference:.1e} when "
            f"run natively; rounding explains {bound:.0e}. They were not moved. "
            "Leave ExpertOffloadConfig out for this model."
        )


SECTIONS[SECTION] = "offloaded experts"
