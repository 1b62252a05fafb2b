"""Where quantization-aware training starts from: path of a product -> codes, scales and zeros.

A start is a function in `STARTS`: it sees the original model and its calibration text and decides on every product at
once, as methods do that read the text layer by layer. Training may then change each code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Protocol

import torch

from hf_accel.core.model.shadow import twin
from hf_accel.core.steps.setting import Setting
from hf_accel.ops.affine import Affine, Scheme, quantize
from hf_accel.quantization.calibrating.findings import check
from hf_accel.quantization.calibrating.products import widest_of
from hf_accel.quantization.calibrating.solving import Calibrator
from hf_accel.quantization.calibrating.text import text_for
from hf_accel.quantization.config import GPTQConfig, ProductsConfig
from hf_accel.quantization.modules.linear import linear_weight
from hf_accel.quantization.patcher import scale_dtype
from hf_accel.quantization.targets import Target


class Start(Protocol):
    """Returns codes, scales and zeros for the products `chosen`, each of which has a scheme, by their paths.

    The model of `setting` is as the user gave it; `setting.calibration` is the user's text, None where none was given.
    Scales are values of `scale_dtype(target.scheme, model's dtype)`. `refine_steps`: as of GPTQConfig.
    """

    def __call__(
        self, setting: Setting, chosen: Sequence[Target], config: ProductsConfig, refine_steps: int = 0
    ) -> Mapping[str, Affine]: ...


def nearest(
    setting: Setting, chosen: Sequence[Target], config: ProductsConfig, refine_steps: int = 0
) -> dict[str, Affine]:
    """Start from rounding to nearest, which looks at the weights alone."""
    found = {}
    for target in chosen:
        scheme = target.scheme or Scheme(8)
        weight = linear_weight(target.module).detach()
        found[target.path] = quantize(weight, scheme, scale_dtype(scheme, setting.anatomy.dtype))
        setting.advance()
    return found


@torch.inference_mode(False)
def gptq(
    setting: Setting, chosen: Sequence[Target], config: ProductsConfig, refine_steps: int = 0
) -> dict[str, Affine]:
    """Start from what `GPTQConfig` chooses on the calibration text; products outside of decoder layers from nearest.

    Raises: as optimising with a `GPTQConfig`.
    """
    trial = twin(setting.model)
    text = text_for(trial, setting.calibration, widest_of(chosen))
    shared = {field.name: getattr(config, field.name) for field in fields(ProductsConfig)}
    run = Calibrator(
        trial, text.ids, chosen, GPTQConfig(**shared, refine_steps=refine_steps), setting.anatomy.dtype, setting.advance
    )
    found: dict[str, Affine] = {}
    findings = []
    for part in run.run():
        found |= part.affines
        findings += part.findings
    check(findings)
    return found | nearest(setting, [target for target in chosen if target.path not in found], config)


STARTS: dict[str, Start] = {"gptq": gptq, "nearest": nearest}
