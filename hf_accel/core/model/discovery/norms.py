"""Which norm a module computes, found by running it on values where the kinds and their epsilons differ."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_accel.core.model.discovery.readings import Unexplained, agreement, difference

_ROWS = (1.0, 3e-2, 1e-3, 1e-4, 1e-6)  # sizes of the values: small ones show epsilon
_EPSILONS = (1e-5, 1e-6, 1e-8, 1e-12, torch.finfo(torch.float32).eps)


@dataclass(frozen=True)
class NormForm:
    """A norm. path: of its module within the layer. kind: one of `hf_accel.kernels.native.NORM_KINDS`.

    weight, bias: names of its tensors, None where it has none. shape: of its weight, or None.
    """

    path: str
    kind: str
    eps: float
    weight: str | None
    bias: str | None
    shape: tuple[int, ...] | None

    @property
    def size(self) -> int:
        """The number of values in its weight; 0 without."""
        size = 1
        for length in self.shape or (0,):
            size *= length
        return size


def is_leaf(module: nn.Module) -> bool:
    """Return whether a module has no children."""
    return not any(child is not None for child in module._modules.values())


def described_norm(path: str, module: nn.Module, size: int) -> NormForm:
    """Return what `module` computes of rows of `size` values.

    Raises: Unexplained for what is no norm of the kinds known here.
    """
    tensors = {name: t for name, t in (*module._parameters.items(), *module._buffers.items()) if t is not None}
    names = [name for name in tensors if name != "bias"]
    if not is_leaf(module) or len(names) > 1:
        raise Unexplained(f"{path} is no norm with one weight")
    weight = names[0] if names else None
    shape = tuple(tensors[weight].shape) if weight else None
    bias = "bias" if "bias" in tensors else None
    wide = copy.deepcopy(module).float()
    generator = torch.Generator().manual_seed(0)
    rows = shape[:-1] if shape and len(shape) > 1 else ()
    device = next(iter(tensors.values())).device if tensors else torch.device("cpu")
    x = torch.randn(len(_ROWS), *rows, size, generator=generator) + 0.7
    x = (x * torch.tensor(_ROWS).view(-1, *[1] * (x.dim() - 1))).to(device)
    given = {name: value for name, value in vars(module).items() if isinstance(value, float) and 0 < value < 0.1}
    w, b = (None if name is None else tensors[name].detach().double() for name in (weight, bias))
    with torch.no_grad():
        try:
            expected = wide(x).double()
        except Exception as error:
            raise Unexplained(f"{path} is no norm of one input") from error
        found: dict[str, float] = {}  # the first epsilon of each kind that explains the results
        tried = [*dict.fromkeys((*given.values(), *_EPSILONS))]
        for kind in ("rms", "rms_unit", "layer", "layer_unit"):
            if kind.endswith("unit") and weight is None:
                continue
            made = normed(kind, torch.tensor(tried, device=device).double().view(-1, *[1] * x.dim()), x.double(), w, b)
            fits = _worst_rows(made, expected) < agreement(torch.float32)
            if fits.any():
                found[kind] = tried[int(fits.int().argmax())]
        if len(found) != 1:
            raise Unexplained(f"{path}, a {type(module).__name__}, is no norm of a known kind")
        kind, eps = found.popitem()
        if kind == "rms":
            kind = _rounding(module, tensors, x, eps, w)
    return NormForm(path, kind, eps, weight, bias, shape)


def normed(kind: str, eps: float | Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """Return rows of x, or their last dimension, normed; without roundings in between."""
    if kind.startswith("layer"):
        x = x - x.mean(-1, keepdim=True)
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        x = x * (1 + weight if kind.endswith("unit") else weight)
    return x if bias is None else x + bias


def _worst_rows(found: Tensor, expected: Tensor) -> Tensor:
    """Return the largest relative difference of a row of found [E, R, ...] to one of expected [R, ...], for each E."""
    if found.shape[1:] != expected.shape:
        return found.new_full(found.shape[:1], torch.inf)
    errors = (found - expected).flatten(2).norm(dim=2) / expected.flatten(1).norm(dim=1)
    return errors.nan_to_num(torch.inf).amax(1)


def _rounding(module: Any, tensors: dict[str, Tensor], x: Tensor, eps: float, weight: Tensor | None) -> str:
    """Return whether a norm rounds before its weight ("rms") or after it ("rms_once"), where it makes a difference."""
    dtype = next(iter(tensors.values())).dtype if tensors else torch.float32
    if weight is None or dtype in (torch.float32, torch.float64):
        return "rms"
    x = x[:2].to(dtype)
    plain = normed("rms", eps, x.float(), None, None)
    once = (plain * weight.float()).to(dtype)
    first = plain.to(dtype) * weight.to(dtype)
    expected = module(x)
    return "rms_once" if difference(once, expected) < difference(first, expected) else "rms"
