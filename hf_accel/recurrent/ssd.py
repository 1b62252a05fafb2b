"""Mamba-2 (mamba2, bamba, granitemoehybrid, nemotron_h, zamba2, falcon_h1): one projection makes the gate, what is
convolved (x, B and C) and the time steps."""

from __future__ import annotations

from typing import Any

from hf_accel.kernels import native
from hf_accel.kernels.native import Span
from hf_accel.recurrent.forms import Form, Sizes, depthwise, norms_of, others_of, width_of

TITLE = "Mamba-2 recurrence"


def forms(module: Any, sizes: Sizes) -> list[Form]:
    """Return the readings of a mixer as Mamba-2; none where it holds something else."""
    if sizes.state is None or len(sizes.state) != 3 or getattr(module, "D", None) is None:
        return []
    (channels, taps), (heads, width, state) = sizes.conv, sizes.state
    inner = heads * width
    groups = (channels - inner) // (2 * state)
    linear = {name: width_of(child) for name, child in module.named_children() if width_of(child)[0]}
    inputs = [name for name, (_, out) in linear.items() if out == inner + channels + heads]
    outputs = [name for name, (read, _) in linear.items() if read == inner and name not in inputs]
    if (len(linear), len(inputs), len(outputs)) != (2, 1, 1) or channels != inner + 2 * groups * state or not groups:
        return []
    others = [(name, child) for name, child in module.named_children() if name not in linear and [*child.parameters()]]
    norms = [(name, child) for name, child in others if name not in depthwise(module)]
    if len(norms) > 1:
        return []
    norm, found = None, []
    if norms:
        norm, found = norms[0][0], norms_of(norms[0][1], inner, (inner, inner // groups))
        if not found:
            return []

    def form(factor: str | None, scales: str | None) -> Form:
        shape = native.MixerShape(
            kind="ssd",
            parts=(Span(0, inner, channels),),
            channels=channels,
            taps=taps,
            is_silu=True,
            heads=heads,
            groups=groups,
            key_dim=state,
            value_dim=width,
            norm=found[0] if found else None,
            gate=Span(0, 0, inner),
            rate=Span(0, inner + channels, heads),
        )
        conv = depthwise(module)[0]
        return Form(
            title=TITLE,
            shape=shape,
            inputs=((inputs[0],),),
            output=outputs[0],
            conv=conv,
            norm=norm,
            factor=factor,
            scales=scales,
        )

    factors = [n for n, v in vars(module).items() if n.endswith("_multiplier") and isinstance(v, float) and v != 1.0]
    scales = others_of(module)
    if len(scales) > 1 or any(getattr(module, name).numel() != inner + channels + heads for name in scales):
        return []
    return [form(factor, scales[0] if scales else None) for factor in (*factors, None)]
