"""Mamba's selective scan (mamba, falcon_mamba, jamba): time steps, B and C are made of what was convolved."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import Parameter

from hf_accel.kernels import native
from hf_accel.kernels.native import Span
from hf_accel.recurrent.forms import Form, Sizes, Step, depthwise, others_of, own_weights, plain_conv, width_of

TITLE = "selective scan"
_INPUTS, _TIMES = "x_proj", "dt_proj"


@dataclass(frozen=True, kw_only=True)
class ScanForm(Form):
    """shape: of the convolution; scan: of what follows it. norms: modules that time steps, B and C go through."""

    scan: native.MixerShape
    rank: int
    norms: tuple[str, ...] = ()

    @property
    def called(self) -> frozenset[str]:
        return super().called | {_INPUTS, *self.norms}

    def read(self, module: Any) -> list[nn.Module]:
        return [*super().read(module), module._modules[_TIMES]]

    def built(self, module: Any) -> Step:
        conv, times = plain_conv(module._modules[self.conv]), module._modules[_TIMES]
        weight, bias, dtype = times._parameters.get("weight"), times._parameters.get("bias"), conv.weight.dtype
        if type(weight) is not Parameter or type(bias) is not Parameter or hasattr(times, "_hf_hook"):
            raise ValueError("the projection of its time steps is no plain product with a bias")
        if weight.dtype is not dtype or weight.dim() != 2 or weight.stride(1) != 1:
            raise ValueError("the projection of its time steps has another dtype or layout")
        if hasattr(getattr(module, "config", None), "_is_quantized"):  # its forward multiplies in another way then
            raise ValueError("its model was quantized by transformers")
        convolve = native.NativeMixer(self.shape, native.MixerWeights(conv=conv.weight, conv_bias=conv.bias), dtype)
        weights = native.MixerWeights(**own_weights(module) | {"dt_bias": bias})
        scan = native.NativeMixer(self.scan, weights, dtype)
        rank, states = self.rank, self.scan.key_dim

        def step(module: Any, hidden: Tensor, conv_state: Tensor, state: Tensor | None) -> Tensor | None:
            children = module._modules
            rows, before = children[self.inputs[0][0]](hidden), conv_state.clone()
            x = convolve([rows], conv_state)
            if x is None:
                return None
            parts = children[_INPUTS](x).split([rank, states, states], dim=-1)
            if self.norms:
                parts = [children[name](part) for name, part in zip(self.norms, parts, strict=True)]
            time, b, c = parts
            steps = native.linear(time.contiguous(), weight, None)
            value = scan([x, steps, b, c, rows], None, state)
            if value is None:
                conv_state.copy_(before)
                return None
            return children[self.output](value)  # type: ignore[no-any-return]

        return step


def forms(module: Any, sizes: Sizes) -> list[Form]:
    """Return the readings of a mixer as Mamba's scan; none where it holds something else."""
    if sizes.state is None or len(sizes.state) != 2 or others_of(module):
        return []
    (channels, taps), (inner, states) = sizes.conv, sizes.state
    children = dict(module.named_children())
    linear = {name: width_of(child) for name, child in children.items() if width_of(child)[0]}
    rank = width_of(children.get(_TIMES))[0]
    inputs = [name for name, (_, out) in linear.items() if out == 2 * inner and name not in (_TIMES, _INPUTS)]
    outputs = [name for name, (read, _) in linear.items() if read == inner and name not in (_INPUTS, *inputs)]
    if (
        channels != inner
        or (len(linear), len(inputs), len(outputs)) != (4, 1, 1)
        or width_of(children.get(_INPUTS)) != (inner, rank + 2 * states)
        or width_of(children.get(_TIMES)) != (rank, inner)
    ):
        return []
    norms = tuple(
        name for part in ("dt", "b", "c") for name in children if name.startswith(f"{part}_") and "norm" in name
    )
    if len(norms) not in (0, 3):
        return []
    if set(children) - {*linear, *norms, *depthwise(module), "act"}:  # the last an activation that is read by name
        return []
    conv = native.MixerShape(kind="conv", parts=(Span(0, 0, inner),), channels=inner, taps=taps, is_silu=True)
    scan = native.MixerShape(
        kind="scan",
        parts=(Span(0, 0, inner), Span(2, 0, states), Span(3, 0, states)),
        heads=inner,
        key_dim=states,
        rate=Span(1, 0, inner),
        gate=Span(4, inner, inner),
    )
    found = ScanForm(
        title=TITLE,
        shape=conv,
        scan=scan,
        rank=rank,
        norms=norms,
        inputs=((inputs[0],),),
        output=outputs[0],
        conv=depthwise(module)[0],
    )
    return [found]
