"""Where quantization-aware training starts from: path of a product -> codes, scales and zeros.

A start is a function in `STARTS`: it sees the original model and its calibration text and decides on every product at
once, as methods do that read the text layer by layer. Training may then change each code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from hf_accel.core.steps.setting import Setting
from hf_accel.ops.affine import Affine, Scheme, quantize
from hf_accel.quantization.modules.linear import linear_weight
from hf_accel.quantization.patcher import scale_dtype
from hf_accel.quantization.targets import Target


class Start(Protocol):
    """Returns codes, scales and zeros for the products `chosen`, each of which has a scheme, by their paths.

    The model of `setting` is as the user gave it; `setting.calibration` is the user's text, None where none was given.
    Scales are values of `scale_dtype(target.scheme, model's dtype)`.
    """

    def __call__(self, setting: Setting, chosen: Sequence[Target]) -> Mapping[str, Affine]: ...


def nearest(setting: Setting, chosen: Sequence[Target]) -> dict[str, Affine]:
    """Start from rounding to nearest, which looks at the weights alone."""
    found = {}
    for target in chosen:
        scheme = target.scheme or Scheme(8)
        found[target.path] = quantize(
            linear_weight(target.module).detach(), scheme, scale_dtype(scheme, setting.anatomy.dtype)
        )
        setting.advance()
    return found


STARTS: dict[str, Start] = {"nearest": nearest}
