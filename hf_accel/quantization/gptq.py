"""Puts weights in few bits in place that were chosen on calibration text, layer by layer (see `calibrating`)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from hf_accel.core.calls.hosting import Host
from hf_accel.core.calls.report import SECTIONS
from hf_accel.core.model.shadow import twin
from hf_accel.core.steps.goal import Goal, Offer
from hf_accel.core.steps.patcher import Change
from hf_accel.core.steps.setting import Setting
from hf_accel.kernels.weights import PackedWeight
from hf_accel.ops.affine import Affine
from hf_accel.quantization.calibrating.findings import Calibration, check
from hf_accel.quantization.calibrating.products import widest_of
from hf_accel.quantization.calibrating.solving import Calibrated, Calibrator
from hf_accel.quantization.calibrating.text import notes_on, text_for
from hf_accel.quantization.config import GPTQConfig
from hf_accel.quantization.modules.experts import QuantizedExperts
from hf_accel.quantization.modules.linear import QuantizedLinear
from hf_accel.quantization.patcher import WeightOnlyPatcher
from hf_accel.quantization.targets import Target

SECTION = "gptq"
SECTIONS[SECTION] = "calibration"


class GPTQPatcher(WeightOnlyPatcher, config=GPTQConfig):
    config: GPTQConfig
    is_fitted_to_text = True
    is_preferred = False

    @classmethod
    def candidates(cls, goal: Goal, setting: Setting) -> Offer:
        return Offer()

    @torch.inference_mode(False)  # what is made under it has no versions and no gradients
    def patch(self, setting: Setting, host: Host) -> Change:
        return super().patch(setting, host)

    def replacements(self, chosen: list[Target], setting: Setting, host: Host) -> Iterator[tuple[Target, nn.Module]]:
        known = [setting.prepared_for(target.module).get(self._key(target)) for target in chosen]
        kept = [made for made in known if made is not None]
        if kept and len(kept) == len(chosen):
            yield from ((target, module) for target, (module, _) in zip(chosen, kept, strict=True))
            host.report.sections[SECTION] = Calibration([found for _, findings in kept for found in findings])
            return
        trial = twin(setting.model)
        widest = widest_of(chosen)
        text = text_for(trial, setting.calibration, widest)
        run = Calibrator(trial, text.ids, chosen, self.config, setting.anatomy.dtype, setting.advance)
        findings = []
        left = {target.path: target for target in chosen}
        for part in run.run():
            findings += part.findings
            for target in part.targets:
                del left[target.path]
                replacement = self._packed(target, part, setting)
                own = [found for found in part.findings if f"{found.path}.".startswith(f"{target.path}.")]
                setting.prepared_for(target.module)[self._key(target)] = replacement, own
                yield target, replacement
        del trial, run.model
        check(findings)
        for target in left.values():
            replacement = self.prepared(target, target.module, setting)
            setting.prepared_for(target.module)[self._key(target)] = replacement, []
            yield target, replacement
        host.report.sections[SECTION] = Calibration(findings, notes_on(text, widest) + run.notes)

    def _key(self, target: Target) -> tuple[Any, ...]:
        """Return by what the result of a target is kept: where nothing is refined, no other product plays a part."""
        config = self.config
        if config.refine_steps:
            return (target.scheme, config)
        scheme: tuple[Any, ...] = (target.scheme,)
        if target.scheme is None:  # of experts, whose products have schemes of their own
            bits, size = config.bits_of(target.path) or config.bits, config.group_size_of(target.path)
            scheme = (None, bits, size or config.group_size, config.symmetric)
        return (*scheme, GPTQConfig, config.order, config.damping)

    def _packed(self, target: Target, part: Calibrated, setting: Setting) -> nn.Module:
        """Return the module that stands in for a target, with the codes that were found."""
        dtype = setting.anatomy.dtype
        if target.scheme is not None:
            return _linear(part.affines[target.path], getattr(target.module, "bias", None), dtype)

        def packed(name: str, count: int) -> list[QuantizedLinear]:
            return [_linear(part.affines[f"{target.path}.{name}.{index}"], None, dtype) for index in range(count)]

        count = len(target.module.gate_up_proj)
        return QuantizedExperts(packed("gate_up_proj", count), packed("down_proj", count), target.module)


def _linear(affine: Affine, bias: torch.Tensor | None, dtype: torch.dtype) -> QuantizedLinear:
    return QuantizedLinear(PackedWeight.pack(affine), bias, dtype)
