"""Gated short convolutions (LFM2): three rows of one projection, of which two are multiplied before and one after."""

from __future__ import annotations

from itertools import product
from typing import Any

from hf_accel.kernels import native
from hf_accel.kernels.native import Span
from hf_accel.recurrent.forms import Form, Sizes, depthwise, others_of, width_of

TITLE = "short convolution"


def forms(module: Any, sizes: Sizes) -> list[Form]:
    """Return the readings of a mixer as a gated short convolution; none where it holds something else."""
    channels, taps = sizes.conv
    linear = {name: width_of(child) for name, child in module.named_children() if width_of(child)[0]}
    inputs = [name for name, (_, out) in linear.items() if out == 3 * channels]
    outputs = [name for name, (read, _) in linear.items() if read == channels and name not in inputs]
    own = [*module.parameters(recurse=False), *others_of(module)]
    if sizes.state is not None or own or (len(linear), len(inputs), len(outputs)) != (2, 1, 1):
        return []

    def shape(after: int, is_silu: bool) -> native.MixerShape:
        rows = [Span(0, place * channels, channels) for place in range(3)]
        gate = rows.pop(after)
        return native.MixerShape(
            kind="conv", parts=(rows[1],), before=rows[0], gate=gate, channels=channels, taps=taps, is_silu=is_silu
        )

    return [
        Form(title=TITLE, shape=shape(*reading), inputs=((inputs[0],),), output=outputs[0], conv=depthwise(module)[0])
        for reading in product((1, 2, 0), (False, True))
    ]
