"""What products read on calibration text: the second moments of their inputs, which calibrated rounding weighs by.

The text is read row by row, and hooks add up x x^T over all positions: in fp32 over some hundred of them, in fp64 over
all, in an order that does not vary. Products that read one tensor, one after the other, as q, k and v do, share one
moment. Memory: 8 K^2 bytes for every input of K columns that is observed at a time, and half as much for a product.
A model is observed as a whole, in portions that cost a forward pass over the text each, or layer by layer (see
`calibrating`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hf_accel.core.model.modes import evaluating
from hf_accel.errors import UnsupportedModelError
from hf_accel.measure.quality import CalibrationText
from hf_accel.quantization.modules.linear import linear_weight
from hf_accel.quantization.targets import Target

_POSITIONS = 512  # that are added up in fp32


@dataclass(eq=False)
class Moment:
    """The second moment of an input: `total` [K, K] is the fp64 sum of x x^T over `count` positions."""

    total: Tensor
    count: int = 0

    @staticmethod
    def of(columns: int, device: torch.device | None = None) -> Moment:
        """Return the moment of an input of so many columns that nothing was read of yet."""
        return Moment(torch.zeros(columns, columns, dtype=torch.float64, device=device))

    def add(self, inputs: Tensor) -> None:
        """Add all positions of inputs [..., K] of any floating dtype."""
        rows = inputs.detach().reshape(-1, inputs.shape[-1]).float()
        for part in rows.split(_POSITIONS):
            self.total += part.T @ part
        self.count += len(rows)


@dataclass(frozen=True)
class Observed:
    """Path of a product -> moment of what it read; sentences on products that nothing is known of."""

    moments: dict[str, Moment]
    skipped: tuple[str, ...]


def portions(targets: Sequence[Target], max_bytes: int) -> Iterator[list[Target]]:
    """Yield the targets in their order, as many at a time as have moments of at most `max_bytes`, but at least one.

    Bytes are counted as if no two products shared a moment.
    """
    portion: list[Target] = []
    total = 0
    for target in targets:
        needed = 0 if target.scheme is None else 8 * linear_weight(target.module).shape[1] ** 2
        if portion and total + needed > max_bytes:
            yield portion
            portion, total = [], 0
        portion.append(target)
        total += needed
    if portion:
        yield portion


def observe(model: Any, text: CalibrationText, targets: Sequence[Target]) -> Observed:
    """Return what `targets` of `model` read when it reads `text`; the model is left as it was, also after an error.

    Experts in 3-D parameters are computed without modules of their own and cannot be observed. Of experts that are
    modules the moments hold only the tokens sent to them; `count` says how many those were.

    Raises:
        UnsupportedModelError: two products read one tensor for some rows of the text and not for others.
    """
    products = {target.path: target.module for target in targets if target.scheme is not None}
    # tensors of inference mode have no versions, by which it is seen whether they change between two products
    with torch.inference_mode(False), torch.no_grad(), evaluating(model), Observer(products) as observer:
        for row in text.ids.to(model.device):
            model(row[None], use_cache=False)
            observer.end_row()
    found = {path: observer.moments[path] for path in products if path in observer.moments}
    finite = {path: moment for path, moment in found.items() if bool(moment.total.isfinite().all())}
    reasons = {
        "experts in 3-D parameters cannot be observed": [t.path for t in targets if t.scheme is None],
        "the text sends no token to": [path for path in products if path not in found],
        "NaN or infinity is read by": [path for path in found if path not in finite],
    }
    return Observed(finite, tuple(f"{reason}: {', '.join(paths)}" for reason, paths in reasons.items() if paths))


@dataclass(frozen=True)
class _Read:
    """The tensor that was read last, its version then, and the first product that read it."""

    tensor: Tensor
    version: int
    reader: str


class Observer:
    """Adds up what products, by path, read within the block; `moments` has those that read anything."""

    def __init__(self, products: Mapping[str, nn.Module]) -> None:
        self.moments: dict[str, Moment] = {}
        self._products = products
        self._hooks: list[Any] = []
        self._latest: _Read | None = None  # holds on to one tensor of the forward pass in progress
        self._owners: dict[str, str] = {}  # product -> the one whose moment it shares, mostly itself

    def __enter__(self) -> Observer:
        for path, module in self._products.items():
            self._hooks.append(module.register_forward_pre_hook(partial(self._add, path), with_kwargs=True))
        return self

    def __exit__(self, *error: Any) -> None:
        for hook in self._hooks:
            hook.remove()

    def end_row(self) -> None:
        """Say that the next input belongs to another row."""
        self._latest = None

    def _add(self, path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Add the input of a call of the product called `path`, unless that was added for the product before it."""
        tensor = args[0] if args else next(iter(kwargs.values()))
        if not tensor.numel():
            return
        latest = self._latest
        is_new = latest is None or latest.tensor is not tensor or latest.version != tensor._version
        if latest is None or is_new:
            latest = self._latest = _Read(tensor, tensor._version, path)
        owner = self._owners.setdefault(path, latest.reader)
        if owner != latest.reader:
            other = owner if owner != path else latest.reader
            raise UnsupportedModelError(
                f"{path} and {other} read one tensor for some rows of the calibration text and not for others, so "
                "their moments can neither be shared nor kept apart. Quantize one of them without calibration."
            )
        if not is_new:
            self.moments[path] = self.moments[owner]
            return
        if path not in self.moments:
            self.moments[path] = Moment.of(tensor.shape[-1], tensor.device)
        self.moments[path].add(tensor)
