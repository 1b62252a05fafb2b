"""Which products share their bits, because they run together, and what each group may choose from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_accel.core.model.anatomy import SIBLING_NAMES
from hf_accel.ops.affine import GROUP_SIZES, Scheme
from hf_accel.quantization.allocating.allocation import Option
from hf_accel.quantization.config import KEPT_BITS, MixedPrecisionConfig
from hf_accel.quantization.modules.experts import PRODUCTS
from hf_accel.quantization.patcher import packed_bytes
from hf_accel.quantization.targets import Target

_EXPERTS = ".experts."


@dataclass(frozen=True)
class Group:
    """Products that have the same bits, as a reader finds them: `name` is a path, with siblings joined by a slash.

    options: with no cost yet. A width whose groups of columns do not fit every product is none of them.
    weights: their number; original_bytes: what they take before. expert: the index of the only expert that is meant of
    the only target, None: all of every target.
    """

    name: str
    targets: tuple[Target, ...]
    options: tuple[Option, ...]
    weights: int
    original_bytes: int
    expert: int | None = None

    @property
    def paths(self) -> list[str]:
        """The names of the modules, or of the products of an expert, that have the bits of this group."""
        if self.expert is None:
            return [target.path for target in self.targets]
        return [f"{self.targets[0].path}.{name}.{self.expert}" for name in PRODUCTS]


def groups_of(targets: Sequence[Target], config: MixedPrecisionConfig, dtype: torch.dtype) -> list[Group]:
    """Return the groups of products of a model of `dtype`, in the order of the model."""
    members: dict[tuple[str, ...], list[Target]] = {}
    for target in targets:
        members.setdefault(_key(target.path), []).append(target)
    found = []
    for key, chosen in members.items():
        parent, *_ = key
        names = dict.fromkeys(target.path.removeprefix(f"{parent}.") for target in chosen)
        is_whole = len(chosen) == 1 or parent.endswith(_EXPERTS.rstrip("."))
        name = chosen[0].path if len(chosen) == 1 else parent if is_whole else f"{parent}.{'/'.join(names)}"
        weights = [weight for target in chosen for weight in target.weights]
        layout = chosen[0].layout
        if config.experts == "apart" and layout is not None:
            own = [_group(f"{name}.{i}", chosen, [w[i] for w in weights], config, dtype, i)
                   for i in range(layout.experts)]  # fmt: skip
            found += own
        else:
            found.append(_group(name, chosen, weights, config, dtype))
    return found


def _group(
    name: str,
    chosen: Sequence[Target],
    weights: Sequence[Tensor],
    config: MixedPrecisionConfig,
    dtype: torch.dtype,
    expert: int | None = None,
) -> Group:
    options = [o for o in _options(weights, config, dtype) if expert is None or o.bits != KEPT_BITS]
    nbytes = sum(weight.numel() * weight.element_size() for weight in weights)
    return Group(name, tuple(chosen), tuple(options), sum(map(Tensor.numel, weights)), nbytes, expert)


def _key(path: str) -> tuple[str, ...]:
    """Return what the paths of products that run together have in common."""
    if _EXPERTS in path:  # experts that are modules of their own
        return (path[: path.index(_EXPERTS) + len(_EXPERTS) - 1],)
    parent, _, name = path.rpartition(".")
    siblings = next((names for names in SIBLING_NAMES if name in names), (name,))
    return (parent, *siblings)


def _options(weights: Sequence[Tensor], config: MixedPrecisionConfig, dtype: torch.dtype) -> list[Option]:
    found = []
    for bits in config.choices:
        if bits == KEPT_BITS:
            found.append(Option(bits, None, sum(w.numel() * w.element_size() for w in weights), 0.0))
            continue
        sizes: tuple[int | None, ...] = GROUP_SIZES if config.group_size is None else (config.group_size,)
        for size in (None,) if bits == 8 else sizes:
            if size is not None and any(weight.shape[-1] % size for weight in weights):
                continue
            scheme, nbytes = Scheme(bits, size), 0
            for weight in weights:
                rows, columns = weight.shape[-2:]
                nbytes += math.prod(weight.shape[:-2]) * packed_bytes(scheme, rows, columns, dtype)
            found.append(Option(bits, size, nbytes, 0.0))
    return found
