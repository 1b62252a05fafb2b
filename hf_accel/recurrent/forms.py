"""What a recurrent mixer is: a form, found from what the module holds; that it is right is for the audit to say.

A form names the projections, which are called as the modules they are, and says where in their rows the native call
finds what. It holds no tensors, so that layers of one kind have equal forms.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from hf_accel.kernels import native
from hf_accel.ops.recurrent import GatedNorm, gated_norm

Step = Callable[[Any, Tensor, Tensor, "Tensor | None"], "Tensor | None"]
"""(module, hidden [B, 1, E], conv_state, state) -> its result, the states moved in place; None: nothing done."""

_PROBES = 6  # rows of a norm that is run


class Sizes(NamedTuple):
    """Shapes of a mixer's states without the batch: conv [channels, taps]; state, None where there is none."""

    conv: tuple[int, ...]
    state: tuple[int, ...] | None


@dataclass(frozen=True, kw_only=True)
class Form:
    """One reading of a mixer.

    title: what it computes. inputs: the projections, by the names of the modules that are called one after the other on
    the hidden states; output: the last projection. conv, norm: the modules whose weights are read. factor: an attribute
    that multiplies hidden states; scales: a tensor that multiplies the first projection. decay: a module that makes
    logarithms of decays of hidden states.
    """

    title: str
    shape: native.MixerShape
    inputs: tuple[tuple[str, ...], ...]
    output: str
    conv: str
    norm: str | None = None
    factor: str | None = None
    scales: str | None = None
    decay: str | None = None

    @property
    def called(self) -> frozenset[str]:
        """Children that are called as they are."""
        return frozenset(name for chain in (*self.inputs, (self.output, self.decay)) for name in chain if name)

    def read(self, module: Any) -> list[nn.Module]:
        """Return the children whose weights are read without calling them."""
        names = (self.conv, self.norm)
        return [module._modules[name] for name in names if name is not None]

    def built(self, module: Any) -> Step:
        """Return the step over the module's tensors. Raises: ValueError with the reason if there is none."""
        conv = plain_conv(module._modules[self.conv])
        weights = native.MixerWeights(
            conv=conv.weight,
            conv_bias=conv.bias,
            norm=None if self.norm is None else one_weight(module._modules[self.norm]),
            **own_weights(module),
        )
        kernel = native.NativeMixer(self.shape, weights, conv.weight.dtype)

        def step(module: Any, hidden: Tensor, conv_state: Tensor, state: Tensor | None) -> Tensor | None:
            if self.factor is not None:
                hidden = hidden * getattr(module, self.factor)
            rows = [self._called(module, chain, hidden) for chain in self.inputs]
            if self.scales is not None:
                rows[0] = rows[0] * getattr(module, self.scales)
            decay = None if self.decay is None else module._modules[self.decay](hidden)
            value = kernel(rows, conv_state, state, decay)
            return None if value is None else module._modules[self.output](value)

        return step

    @staticmethod
    def _called(module: Any, chain: tuple[str, ...], hidden: Tensor) -> Any:
        for name in chain:
            hidden = module._modules[name](hidden)
        return hidden


_OWN = {"a_log": "A_log", "dt_bias": "dt_bias", "d": "D"}


def others_of(module: nn.Module) -> list[str]:
    """Return the names of a mixer's own tensors that recurrences do not have: a reading has to say what they are."""
    tensors = [*module._parameters.items(), *module._buffers.items()]
    return [name for name, tensor in tensors if tensor is not None and name not in _OWN.values()]


def own_weights(module: Any) -> dict[str, Tensor | None]:
    """Return the parameters that recurrences have beside their projections."""
    return {field: module._parameters.get(name) for field, name in _OWN.items()}


def plain_conv(conv: Any) -> Any:
    """Return a depthwise convolution. Raises: ValueError where another module has its place."""
    if type(conv) is not nn.Conv1d or type(conv.weight) is not Parameter or hasattr(conv, "_hf_hook"):
        raise ValueError("its convolution is not plain")
    return conv


def one_weight(norm: nn.Module) -> Tensor:
    """Return the only weight of a norm. Raises: ValueError where it has others."""
    tensors = [*norm.parameters(), *norm.buffers()]
    if len(tensors) != 1 or tensors[0].dim() != 1 or hasattr(norm, "_hf_hook"):
        raise ValueError("its norm has not one weight")
    return tensors[0]


def depthwise(module: nn.Module) -> list[str]:
    """Return the names of children that are short convolutions of each channel by itself."""
    convs = {name: child for name, child in module.named_children() if type(child) is nn.Conv1d}
    return [
        name
        for name, conv in convs.items()
        if conv.groups == conv.in_channels == conv.out_channels and conv.stride == conv.dilation == (1,)
    ]


def width_of(module: nn.Module | None) -> tuple[int, int]:
    """Return how many values a projection reads and returns, (0, 0) of what is none."""
    sizes = getattr(module, "in_features", None), getattr(module, "out_features", None)
    return sizes if isinstance(sizes[0], int) and isinstance(sizes[1], int) else (0, 0)  # type: ignore[return-value]


@torch.no_grad()
def norms_of(module: nn.Module, width: int, sizes: tuple[int, ...]) -> list[GatedNorm]:
    """Return how a norm of rows of `width` values is computed: at most one, found by running it on random values.

    sizes: of the groups that it may have.
    """
    weight = one_weight(module)
    generator = torch.Generator().manual_seed(0)
    x, gate = (torch.randn(_PROBES, width, generator=generator).to(weight.dtype) for _ in range(2))
    try:
        expected = module(x, gate)
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError):
        return []
    numbers = [value for value in vars(module).values() if isinstance(value, float) and 0 < value < 1e-2]
    for size in dict.fromkeys(sizes):
        for eps in dict.fromkeys(numbers):
            for flags in range(8):
                norm = GatedNorm(size, eps, bool(flags & 1), bool(flags & 2), bool(flags & 4))
                if width % weight.numel() == 0 and torch.equal(gated_norm(x, gate, weight, norm), expected):
                    return [norm]
    return []
