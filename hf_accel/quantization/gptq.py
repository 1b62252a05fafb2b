"""Puts weights in few bits in place that were chosen on calibration text, layer by layer (see `calibrating`)."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from hf_accel.core.calls.hosting import Host
from hf_accel.core.calls.report import SECTIONS
from hf_accel.core.journal import Journal
from hf_accel.core.model.shadow import twin
from hf_accel.core.steps.goal import Goal, Offer
from hf_accel.core.steps.patcher import Change
from hf_accel.core.steps.setting import Setting
from hf_accel.kernels.weights import PackedWeight
from hf_accel.ops.affine import Affine
from hf_accel.quantization.calibrating.findings import Calibration, Finding, check
from hf_accel.quantization.calibrating.places import most_places
from hf_accel.quantization.calibrating.powers import ends_of
from hf_accel.quantization.calibrating.products import widest_of
from hf_accel.quantization.calibrating.solving import Calibrated, Calibrator
from hf_accel.quantization.calibrating.text import notes_on, text_for
from hf_accel.quantization.config import GPTQConfig
from hf_accel.quantization.modules.experts import QuantizedExperts, packed_product
from hf_accel.quantization.modules.linear import QuantizedLinear
from hf_accel.quantization.patcher import WeightOnlyPatcher
from hf_accel.quantization.targets import Target, targets

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
            for norm in self._norms(setting):
                if (scaled := setting.prepared_for(norm).get(self.config)) is not None:
                    _swap(setting.model, norm, scaled, host.journal)
            yield from ((target, module) for target, (module, _) in zip(chosen, kept, strict=True))
            host.report.sections[SECTION] = Calibration([found for _, findings in kept for found in findings])
            return
        trial = twin(setting.model)
        widest = widest_of(chosen)
        text = text_for(trial, setting.calibration, widest)
        run = Calibrator(trial, text.ids, chosen, self.config, setting.anatomy.dtype, setting.advance)
        findings: list[Finding] = []
        powers: dict[str, torch.Tensor] = {}
        left = {target.path: target for target in chosen}
        for part in run.run():
            findings += part.findings
            powers |= part.powers
            self._put_norms(part, setting, host)
            for target in part.targets:
                del left[target.path]
                replacement = self._packed(target, part, setting)
                own = [found for found in part.findings if f"{found.path}.".startswith(f"{target.path}.")]
                setting.prepared_for(target.module)[self._key(target)] = replacement, own
                yield target, replacement
        del trial, run.model
        check(findings, is_solved=self.config.solver == "gptq")
        for target in left.values():
            replacement = self.prepared(target, target.module, setting)
            setting.prepared_for(target.module)[self._key(target)] = replacement, []
            yield target, replacement
        section = Calibration(findings, notes_on(text, widest) + run.notes)
        section.powers, section.row_tokens = powers, text.ids.shape[1]
        section.part_rows = next(iter(ends_of(len(text.ids))), 0)
        host.report.sections[SECTION] = section

    def obstacles(self, setting: Setting) -> list[str]:
        found = super().obstacles(setting)
        anatomy = setting.anatomy
        if self.config.solver == "nearest" and not self.config.refine_steps and not anatomy.blocks:
            found.append(f"there is nothing to scale: {anatomy.blocks_missing}. Leave scaling and solver out.")
        return found

    def parts(self, setting: Setting) -> int | None:
        """Every product is solved and put in place, every place scaled, and every layer refined in steps."""
        chosen, _ = targets(setting.anatomy, self.config)
        inner = [target for target in chosen if target.module is not setting.model.get_output_embeddings()]
        solved = sum(1 if target.layout is None else 2 * target.layout.experts for target in inner)
        layers = int(setting.model.config.get_text_config(decoder=True).num_hidden_layers)
        scaled = 0 if self.config.scaling is None else most_places(setting.anatomy.blocks)
        return len(chosen) + solved + scaled + self.config.refine_steps * layers

    @staticmethod
    def _norms(setting: Setting) -> list[nn.Module]:
        return [norm for block in setting.anatomy.blocks for norm in (block.norm("input"), block.norm("mlp")) if norm]

    def _put_norms(self, part: Calibrated, setting: Setting, host: Host) -> None:
        """Put copies of norms with their scaled weights in place; the user's own are not written to."""
        norms = {id(norm) for norm in self._norms(setting)}
        for name, value in part.values.items():
            norm = setting.model.get_submodule(name.rpartition(".")[0])
            if id(norm) not in norms:
                continue  # the bias of a product, which its replacement has
            scaled = copy.copy(norm)  # hooks and all, but for its weight
            before = norm._parameters["weight"]
            needs_gradient = before is not None and before.requires_grad
            scaled._parameters = {**norm._parameters, "weight": nn.Parameter(value, requires_grad=needs_gradient)}
            setting.prepared_for(norm)[self.config] = scaled
            _swap(setting.model, norm, scaled, host.journal)

    def _key(self, target: Target) -> tuple[Any, ...]:
        """Return by what the result of a target is kept: alone where it is solved alone."""
        config = self.config
        if config.refine_steps or config.scaling is not None:
            return (target.scheme, config)
        schemes = (scheme for _, _, scheme, _ in target.products(config))  # of experts
        return (target.scheme, *schemes, GPTQConfig, config.order, config.damping)

    def _packed(self, target: Target, part: Calibrated, setting: Setting) -> nn.Module:
        """Return the module that stands in for a target, with the codes that were found."""
        dtype, layout = setting.anatomy.dtype, target.layout
        if layout is None:
            bias = part.values.get(f"{target.path}.bias", getattr(target.module, "bias", None))
            return _linear(part.affines[target.path], bias, dtype)

        def packed(name: str) -> list[QuantizedLinear]:
            return [
                packed_product(target.module, layout, name, i, part.affines[f"{target.path}.{name}.{i}"], dtype)
                for i in range(layout.experts)
            ]

        return QuantizedExperts(packed("gate_up_proj"), packed("down_proj"), target.module)


def _swap(model: nn.Module, module: nn.Module, other: nn.Module, journal: Journal) -> None:
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is module:
                journal.swap_module(parent, name, other)


def _linear(affine: Affine, bias: torch.Tensor | None, dtype: torch.dtype) -> QuantizedLinear:
    return QuantizedLinear(PackedWeight.pack(affine), bias, dtype)
