"""The step that moves the experts of a model to a file, and has calls keep some of them in memory."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from hf_accel.core.calls.hosting import Host
from hf_accel.core.calls.report import SECTIONS
from hf_accel.core.journal import subclass
from hf_accel.core.model.anatomy import holds_experts
from hf_accel.core.model.packed_experts import packed_products
from hf_accel.core.steps.goal import Goal, Offer
from hf_accel.core.steps.patcher import Change, Fidelity, Patcher, Stage
from hf_accel.core.steps.setting import Setting
from hf_accel.errors import IrreversibleError, StorageError, VerificationError
from hf_accel.experts.active import active_experts
from hf_accel.experts.offload.ahead import ReadAhead, router_of
from hf_accel.experts.offload.config import ExpertOffloadConfig
from hf_accel.experts.offload.file import ExpertsFile, Extent
from hf_accel.experts.offload.module import Offloaded, computed, offloaded_forward
from hf_accel.experts.offload.slots import Slots
from hf_accel.experts.offload.statistics import OffloadStatistics
from hf_accel.experts.offload.stored import StoredExperts
from hf_accel.kernels import native
from hf_accel.ops import tolerances

SECTION = "offloaded_experts"
_TOKENS = 4  # of the audit


class ExpertOffloadPatcher(Patcher[ExpertOffloadConfig], config=ExpertOffloadConfig):
    stage = Stage.PRODUCTS
    fidelity = Fidelity.EXACT
    occupies = "experts"
    saves_memory = True

    @classmethod
    def candidates(cls, goal: Goal, setting: Setting) -> Offer:
        return Offer()  # it trades time for memory as no goal does: whoever wants that says how much

    def obstacles(self, setting: Setting) -> list[str]:
        anatomy = setting.anatomy
        found = []
        if not native.is_available():
            found.append(f"the native library is not there: {native.status().reason}")
        if anatomy.device.type != "cpu":
            found.append(f"the native library is for CPUs, the model is on {anatomy.device}.")
        if not hasattr(os, "preadv"):
            found.append("this system has no preadv, by which experts are read.")
        stored, skipped = described(anatomy.model, anatomy.dtype)
        if not stored:
            reasons = f" ({skipped[0]})" if skipped else ""
            return [*found, f"the model has no stacked experts that can be moved to a file{reasons}."]
        least, active = self._least(anatomy.model, stored)
        budget = self._budget(stored)
        if budget < least:
            found.append(
                f"a budget of {budget:,} bytes is below the {active} experts of {least // active:,} bytes that one "
                f"token wants in one layer; give budget_bytes of {least:,} at least."
            )
        folder = tempfile.gettempdir() if self.config.folder is None else self.config.folder
        size = stored[-1][1].end
        if not os.path.isdir(folder) or not os.access(folder, os.W_OK | os.X_OK):
            found.append(
                f"no file can be written in the folder {folder!r}; name one that exists and can be written to."
            )
        elif (free := shutil.disk_usage(folder).free) < size:
            found.append(f"the experts take {size:,} bytes, and {free:,} are free in {folder!r}; name another folder.")
        return found

    def _budget(self, stored: list[tuple[nn.Module, StoredExperts]]) -> int:
        if self.config.budget_bytes is not None:
            return self.config.budget_bytes
        return int(self.config.share * sum(sum(each.bytes_of) for _, each in stored))

    @staticmethod
    def _least(model: Any, stored: list[tuple[nn.Module, StoredExperts]]) -> tuple[int, int]:
        """Return the bytes that a token wants of one layer, and of how many experts."""
        active = min(active_experts(model) or 1, *(each.form.experts for _, each in stored))
        return active * max(max(each.bytes_of) for _, each in stored), active

    @torch.inference_mode(False)
    @torch.no_grad()
    def patch(self, setting: Setting, host: Host) -> Change:
        anatomy, journal = setting.anatomy, host.journal
        model, before = anatomy.model, anatomy.weight_bytes
        stored, skipped = described(model, anatomy.dtype)
        modules = [each for _, each in stored]
        file = ExpertsFile(self.config.folder, modules[-1].end)
        for each in modules:
            for tensor, offset in each.tensors:
                file.write(tensor, offset)
        slots = Slots(file, modules, self._budget(stored))
        mapping = file.mapped()
        journal.first(partial(_bring_back, file, modules))
        ahead = self._read_ahead(model, slots, stored)
        if ahead is not None:
            journal.did(ahead.close)
        for module, each in stored:
            each.move(mapping, module)
            _audit(each, slots, module)
            forward: Callable[..., Any] = offloaded_forward(each, slots, ahead)
            journal.swap_class(module, subclass(Offloaded, type(module), slots=slots, forward=forward))
            each.watch(module)
        slots.reset()  # what was counted so far was none of the user's
        host.report.sections[SECTION] = OffloadStatistics(slots, modules)
        total, count = int(slots.sizes.sum()), len(slots.sizes)
        return Change(
            f"{count} experts of {len(stored)} layers ({total / 1e6:.1f} MB) lie in a file in {file.folder}, up to "
            f"{slots.budget / 1e6:.1f} MB of them in memory, too",
            skipped=tuple(skipped),
            weight_bytes=before - total + min(slots.budget, total),
        )

    def _read_ahead(self, model: Any, slots: Slots, stored: list[tuple[nn.Module, StoredExperts]]) -> ReadAhead | None:
        most = active_experts(model)
        if not self.config.read_ahead or most is None:
            return None
        routers = []
        for _, each in stored:
            parent = model.get_submodule(each.path.rpartition(".")[0])
            routers.append(router_of(parent, each.form.experts, each.form.hidden))
        return ReadAhead(slots, [each for _, each in stored], routers, most) if any(
            router is not None for router in routers) else None  # fmt: skip


def described(model: Any, dtype: torch.dtype) -> tuple[list[tuple[nn.Module, StoredExperts]], list[str]]:
    """Return the modules whose experts can be moved to a file, and sentences on those that cannot."""
    found: list[tuple[nn.Module, StoredExperts]] = []
    skipped: list[str] = []
    start = first = 0
    for path, module in model.named_modules():
        if not holds_experts(module) and packed_products(module) is None:
            continue
        try:
            each = StoredExperts(path, module, dtype, start, first)
        except ValueError as error:
            skipped.append(f"the experts {path} stay as they are: {error}")
            continue
        found.append((module, each))
        start, first = each.end, first + each.form.experts
    return found, skipped


def _bring_back(file: ExpertsFile, stored: list[StoredExperts]) -> None:
    """Put the weights back into memory, one tensor at a time.

    Raises:
        IrreversibleError: the file is no longer whole; what could be read is in memory, and all else as it was.
    """
    for each in stored:
        written = each.written()
        for place, (tensor, offset) in enumerate(each.tensors):
            if place in written:
                tensor.data = tensor.detach().clone()
                continue
            found = torch.empty_like(tensor, memory_format=torch.contiguous_format)
            size = found.numel() * found.element_size()
            try:
                file.read([Extent(offset, size)], found.detach().reshape(-1).view(torch.uint8).numpy())
            except StorageError as error:
                raise IrreversibleError(
                    f"The experts of {each.path} cannot be restored, those before them are. {error}"
                ) from error
            tensor.data = found


def _audit(stored: StoredExperts, slots: Slots, module: Any) -> None:
    """Raise VerificationError if a few tokens come out otherwise than by the module's own code."""
    form, generator = stored.form, torch.Generator().manual_seed(0)
    hidden = torch.randn(_TOKENS, form.hidden, generator=generator).to(stored.dtype)
    ids = torch.stack([torch.randperm(form.experts, generator=generator)[:2] for _ in range(_TOKENS)])
    weights = torch.rand(ids.shape, generator=generator).to(stored.dtype)
    expected = module.forward(hidden, ids, weights)
    found = computed(stored, slots, None, hidden, ids, weights)
    difference = float((found.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30))
    bound = tolerances.of_layer_output(stored.dtype, stored.products is not None)
    if not difference <= bound:
        raise VerificationError(
            f"The experts {stored.path} ({type(module).__name__}) differ from their own code by {difference:.1e} when "
            f"run natively; rounding explains {bound:.0e}. They were not moved. "
            "Leave ExpertOffloadConfig out for this model."
        )


SECTIONS[SECTION] = "offloaded experts"
