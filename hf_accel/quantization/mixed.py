"""Puts weights in place whose bits were chosen product by product, within a budget (see `allocating`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from hf_accel.core.calls.hosting import Host
from hf_accel.core.calls.report import SECTIONS
from hf_accel.core.model.shadow import twin
from hf_accel.core.steps.goal import Goal, Offer
from hf_accel.core.steps.patcher import Change, Fidelity, Patcher, Stage
from hf_accel.core.steps.setting import Setting
from hf_accel.quantization.allocating.allocation import Option, allocate
from hf_accel.quantization.allocating.groups import Group, groups_of
from hf_accel.quantization.allocating.sensitivity import Sensitivity
from hf_accel.quantization.calibrating.products import widest_of
from hf_accel.quantization.calibrating.text import text_for
from hf_accel.quantization.config import KEPT_BITS, Bits, MixedPrecisionConfig, WeightOnlyConfig
from hf_accel.quantization.targets import Target, targets

SECTION = "mixed_precision"
SECTIONS[SECTION] = "mixed precision"
_TRIED = 8  # bits with which it is found out which products there are: they fit any number of columns


class MixedPrecision:
    """The section of a report: the options of every group of products, and which was chosen."""

    def __init__(self, groups: Sequence[Group], chosen: Sequence[int], notes: Sequence[str] = ()) -> None:
        self.groups, self.chosen, self.notes = list(groups), list(chosen), list(notes)

    @property
    def options(self) -> list[Option]:
        return [group.options[index] for group, index in zip(self.groups, self.chosen, strict=True)]

    @property
    def nbytes(self) -> int:
        """Bytes of all groups, scales and padding included."""
        return sum(option.nbytes for option in self.options)

    @property
    def kl(self) -> float:
        """The sum of what the groups cost alone: about what all of them cost together."""
        return sum(option.kl for option in self.options)

    @property
    def average_bits(self) -> float:
        return 8 * self.nbytes / max(1, sum(group.weights for group in self.groups))

    def layers(self) -> tuple[tuple[str, Bits], ...]:
        """Return bits, or bits and group size, for the name of each module."""
        return tuple(
            (path, None if o.bits == KEPT_BITS else (o.bits, o.group_size) if o.group_size else o.bits)
            for group, o in zip(self.groups, self.options, strict=True)
            for path in group.paths
        )

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        rows = [
            {"name": group.name, "weights": group.weights}
            | {"bits": o.bits, "group_size": o.group_size, "kl_alone": o.kl, "bytes": o.nbytes}
            for group, o in zip(self.groups, self.options, strict=True)
        ]
        return {
            "groups": rows,
            "average_bits": self.average_bits,
            "bytes": self.nbytes,
            "kl_sum": self.kl,
            "notes": self.notes,
        }

    def __str__(self) -> str:
        widest = max((len(group.name) for group in self.groups), default=0)
        lines = [
            f"{len(self.groups)} groups of products, {self.nbytes / 1e6:.1f} MB, {self.average_bits:.3f} bits per "
            f"weight with scales; KL alone, summed: {self.kl:.2g} nats per token",
            f"{'group':<{widest}}  bits/columns per scale  KL alone  KB",
        ]
        lines += [
            f"{group.name:<{widest}}  {option!s:>7}  {option.kl:.1e}  {option.nbytes / 1e3:.0f}"
            for group, option in zip(self.groups, self.options, strict=True)
        ]
        return "\n".join([*lines, *self.notes])


class MixedPrecisionPatcher(Patcher[MixedPrecisionConfig], config=MixedPrecisionConfig):
    stage = Stage.WEIGHTS
    fidelity = Fidelity.LOSSY
    occupies = "weights"
    saves_memory = True
    is_fitted_to_text = True

    @classmethod
    def candidates(cls, goal: Goal, setting: Setting) -> Offer:
        return Offer()

    def obstacles(self, setting: Setting) -> list[str]:
        if found := self._rounding().obstacles(setting):
            return found
        groups = self._groups(setting)
        if unfit := [group.name for group in groups if not group.options]:
            return [
                f"{unfit[0]} has rows that no groups of columns divide, so none of choices={self.config.choices} "
                f"fits it ({len(unfit)} such groups). Put 8 or 16 among the choices."
            ]
        if not groups:
            return ["the model has no linear product in its layers whose bits could be chosen."]
        least, most = (sum(pick(o.nbytes for o in group.options) for group in groups) for pick in (min, max))
        budget = self._budget(setting, groups)
        if least <= budget <= most:
            return []
        weights, other = sum(group.weights for group in groups), self._other_bytes(setting, groups)
        if self.config.average_bits is not None:
            asked = f"average_bits={self.config.average_bits:g}"
            span = f"{8 * least / weights:.3f} to {8 * most / weights:.3f} bits per weight, scales included"
        else:
            asked = f"budget_bytes={self.config.budget_bytes:,}"
            span = f"{least + other:,} to {most + other:,} bytes, of which {other:,} are other weights"
        which = "below the least" if budget < least else "above the most"
        return [f"{asked} is {which} that choices={self.config.choices} can make of this model: {span}."]

    def weight_bytes(self, setting: Setting) -> int:
        """Return the budget, which is filled but for less than a step of one group."""
        groups = self._groups(setting)
        return self._other_bytes(setting, groups) + self._budget(setting, groups)

    def patch(self, setting: Setting, host: Host) -> Change:
        groups = self._groups(setting)
        budget = self._budget(setting, groups)
        trial = twin(setting.model)
        text = text_for(trial, setting.calibration, widest_of([t for group in groups for t in group.targets]))
        bits = 8 * budget / sum(group.weights for group in groups)
        run = Sensitivity(trial, text, groups, self.config, bits, setting.anatomy.dtype, setting.advance)
        groups = run.measured()
        note = f"KL measured on {run.tokens:,} tokens of {text.source}"
        found = MixedPrecision(groups, allocate([group.options for group in groups], budget), [note, *run.notes])
        del trial, run
        change: Change = Patcher.for_config(self.config.of_products(found.layers())).patch(setting, host)
        host.report.sections[SECTION] = found
        return replace(change, summary=f"{found.average_bits:.2f} bits per weight: {change.summary}")

    def _rounding(self) -> Patcher[WeightOnlyConfig]:
        return Patcher.for_config(self.config.of_products((("*", _TRIED),)))

    def _groups(self, setting: Setting) -> list[Group]:
        """Return the groups of products whose bits are chosen, with options that have no cost yet."""
        head = setting.model.get_output_embeddings()
        chosen: list[Target] = targets(setting.anatomy, self.config.of_products((("*", _TRIED),)))[0]
        inner = [target for target in chosen if target.module is not head]
        return groups_of(inner, self.config, setting.anatomy.dtype)

    def _other_bytes(self, setting: Setting, groups: Sequence[Group]) -> int:
        """Return the bytes of all weights that are not in a group, as they will be."""
        without = self.config.of_products(tuple((target.path, None) for group in groups for target in group.targets))
        total = Patcher.for_config(without).weight_bytes(setting)
        return (total or 0) - sum(group.original_bytes for group in groups)

    def _budget(self, setting: Setting, groups: Sequence[Group]) -> int:
        """Return the bytes that the groups may take."""
        if self.config.budget_bytes is not None:
            return self.config.budget_bytes - self._other_bytes(setting, groups)
        return int((self.config.average_bits or 0) * sum(group.weights for group in groups) / 8)
