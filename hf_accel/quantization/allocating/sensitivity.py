"""What each group of products costs in each width: the KL divergence of the final distribution, with that group alone.

It is measured for one width of each group, the one closest to the budget, and follows for the others from how much
more or less their rounding changes the outputs of the products, on the second moments of what they read. On a trained
model of 7.5 million parameters this agreed with measuring every width to 5 to 8 % at 3 and 4 bits and 14 % at 2, and
led to the same KL within 2 %, for a ninth of the passes. A sum of squared gradients times rounding errors (Fisher's
information, one backward pass per row) takes half the time again and orders groups nearly as well, but its noise led
to choices that cost 14 % more.

Cost: the layers once over the text, a solution of every product in every width, and for each group a pass over some
rows from its layer on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import cycle
from typing import Any

import torch
from torch import Tensor

from hf_accel.core.model.modes import evaluating
from hf_accel.measure.quality import CalibrationText, QualityReference
from hf_accel.ops.affine import Affine, Scheme, dequantize
from hf_accel.ops.gptq import Factor, loss, solve
from hf_accel.quantization.allocating.allocation import Option
from hf_accel.quantization.allocating.apart import costs_apart, joined
from hf_accel.quantization.allocating.groups import Group
from hf_accel.quantization.allocating.listening import Listener
from hf_accel.quantization.calibrating.activations import Room, Stream
from hf_accel.quantization.calibrating.layers import Layer, first_inputs, layers_of
from hf_accel.quantization.calibrating.products import Product, products_of
from hf_accel.quantization.calibrating.refining import put_weights
from hf_accel.quantization.calibrating.solving import LEAST_TOKENS
from hf_accel.quantization.config import KEPT_BITS, GPTQConfig, MixedPrecisionConfig
from hf_accel.quantization.observing import Moment, Observer, portions
from hf_accel.quantization.patcher import scale_dtype
from hf_accel.quantization.rounding.nearest import nearest
from hf_accel.quantization.targets import Target

KL_TOKENS = 4096  # of the text, on which KL is measured
_MOMENTS_BYTES = 2 << 30  # of moments at a time, where the model is read as a whole
_DAMPING = 0.01


@dataclass
class Sensitivity:
    """One run over `model`, a copy whose modules may be changed, its tensors not; `text` is what it reads.

    bits: near which KL is measured, stored bits per weight; dtype: of the model that is to be quantized.
    """

    model: Any
    text: CalibrationText
    groups: Sequence[Group]
    config: MixedPrecisionConfig
    bits: float
    dtype: torch.dtype
    advance: Callable[[], None] = lambda: None
    notes: list[str] = field(default_factory=list)
    _experts: dict[str, list[Group]] = field(default_factory=dict)  # path -> groups of experts with bits of their own

    @torch.inference_mode(False)
    @torch.no_grad()
    def measured(self) -> list[Group]:
        """Return the groups with the cost of each of their options.

        Raises:
            StorageError: there is no room for activations.
        """
        rows = self.text.ids.shape[0]
        wanted = max(1, min(rows, KL_TOKENS // self.text.ids.shape[1]))
        self._places = torch.linspace(0, rows - 1, wanted).round().long().tolist()
        text = CalibrationText(self.text.ids[self._places], self.text.source, self.text.is_own)
        found: dict[str, Group] = {}
        with evaluating(self.model):
            self._reference = QualityReference(self.model, text)
            self._places = self._places[: len(self._reference.kept)]
            layers, reason = layers_of(self.model, self.text.ids.to(self._device))
            if reason:
                self.notes.append(f"the model was read as a whole: {reason}")
            members = joined(self.groups)
            waiting = [group for group, _ in members]
            self._experts = {group.name: own for group, own in members if own[0].expert is not None}
            for group, moments in self._by_layers(layers, waiting) if layers else self._as_a_whole(waiting):
                for made in self._with_costs(group, moments):
                    found[made.name] = made
                    self.advance()
        return [found[group.name] for group in self.groups]

    @property
    def tokens(self) -> int:
        """Predictions that each KL is a mean of."""
        return sum(len(row) for row in self._reference.kept)

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device  # type: ignore[no-any-return]

    def _products(self, group: Group) -> list[Product]:
        return [p for target in group.targets for p in products_of(self.model, target, self.config.of_products())]

    def _by_layers(self, layers: list[Layer], waiting: list[Group]) -> Iterator[tuple[Group, dict[str, Moment]]]:
        def first(row: int) -> Tensor:
            return first_inputs(self.model, layers, self.text.ids[row : row + 1].to(self._device))

        with Room(GPTQConfig().max_activation_bytes, None) as room:
            stream = Stream(room, "original-{}.bin", 0, len(self.text.ids), first)
            give_tensors = self._give_tensors(layers)
            for index, layer in enumerate(layers):
                own = [group for group in waiting if group.targets[0].path.startswith(f"{layer.path}.")]
                given = stream.room_for_next()
                with self._observing(own) as observer:
                    for row in range(len(given)):
                        self._listener.keeps = row in self._places
                        given.write(row, layer.run(stream.read.row(row)))
                        observer.end_row()
                begin = index if give_tensors else 0
                with _beginning_at(layers[:begin], [stream.read.row(place) for place in self._places]):
                    for group in own:
                        waiting.remove(group)
                        yield group, observer.moments
                stream.go_on(given)
            stream.read.delete()
        yield from ((group, {}) for group in waiting)  # outside of decoder layers

    def _give_tensors(self, layers: list[Layer]) -> bool:
        """Return whether each layer gives one tensor and nothing beside it, so that it can be skipped."""
        given: list[object] = []
        hooks = [layer.module.register_forward_hook(lambda module, args, out: given.append(out)) for layer in layers]
        try:
            self.model(self.text.ids[:1, :2].to(self._device), use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        return all(isinstance(out, Tensor) for out in given)

    def _as_a_whole(self, groups: list[Group]) -> Iterator[tuple[Group, dict[str, Moment]]]:
        of_target: dict[str, Group] = {group.targets[0].path: group for group in groups}
        firsts: list[Target] = [group.targets[0] for group in groups]
        for portion in portions(firsts, _MOMENTS_BYTES):
            own = [of_target[target.path] for target in portion]
            with self._observing(own) as observer:
                for row, ids in enumerate(self.text.ids.to(self._device)):
                    self._listener.keeps = row in self._places
                    self.model(ids[None], use_cache=False)
                    observer.end_row()
            for group in own:
                yield group, observer.moments

    @contextmanager
    def _observing(self, groups: Sequence[Group]) -> Iterator[Observer]:
        """Observe the products of some groups, and listen to what experts are given whose bits are chosen apart."""
        products = {p.path: p.module for group in groups for p in self._products(group)}
        apart = {group.name: self.model.get_submodule(group.name) for group in groups if group.name in self._experts}
        self._listener = Listener(apart)
        with Observer(products) as observer, self._listener:
            yield observer

    def _with_costs(self, group: Group, moments: dict[str, Moment]) -> list[Group]:
        """Return the group, or those that it is made of, with the cost of its options."""
        rounded = [i for i, option in enumerate(group.options) if option.bits != KEPT_BITS]
        if not rounded:
            return [group]
        wanted = self.bits * group.weights / 8
        measured = min(rounded, key=lambda i: abs(group.options[i].nbytes - wanted))
        products = self._products(group)
        if (experts := self._experts.get(group.name)) is not None:

            @lru_cache(maxsize=2)  # an expert has two products
            def factor_of(path: str) -> Factor | None:
                return self._factor(moments.get(path))

            def codes_of(product: Product, i: int) -> Affine:
                path = product.path
                return self._rounded(product, group.options[i], moments.get(path), factor_of(path))[0]

            module, given = self.model.get_submodule(group.name), self._listener.given[group.name]
            return costs_apart(module, experts, products, given, moments, measured, codes_of, self._kl)
        losses: dict[int, list[float]] = {i: [] for i in rounded}
        codes: list[tuple[Product, Affine]] = []
        factors: dict[int, Factor | None] = {}
        for product in products:
            moment = moments.get(product.path)
            if id(moment) not in factors:
                factors[id(moment)] = self._factor(moment)
            factor = factors[id(moment)]
            for i in rounded:
                affine, lost = self._rounded(product, group.options[i], moment, factor)
                losses[i].append(lost)
                if i == measured:
                    codes.append((product, affine))
        kl = max(0.0, self._kl(codes))
        options = list(group.options)
        for i in rounded:
            ratios = [lost / base for lost, base in zip(losses[i], losses[measured], strict=True) if base > 0]
            options[i] = replace(options[i], kl=kl * (sum(ratios) / len(ratios) if ratios else 1.0))
        return [replace(group, options=tuple(options))]

    def _factor(self, moment: Moment | None) -> Factor | None:
        if self.config.method != "gptq" or moment is None or moment.count < LEAST_TOKENS:
            return None
        try:
            return Factor.of(moment.total, _DAMPING, is_ordered=True)
        except ValueError:  # plain rounding then, as at calibration, which says so
            return None

    def _rounded(
        self, product: Product, option: Option, moment: Moment | None, factor: Factor | None
    ) -> tuple[Affine, float]:
        """Return the codes of a product, and the squared error of its outputs, or of its weight where none are known.

        Scales are not fitted to codes here, which takes as long again: options are compared without.
        """
        scheme = Scheme(option.bits, option.group_size)
        dtype = scale_dtype(scheme, self.dtype)
        if factor is not None and option.bits < 8:
            solved = solve(product.weight, factor, scheme, dtype, refits=0)
            return solved.affine, solved.loss
        affine = nearest(product.weight.float(), scheme, None, dtype)
        if moment is None or not bool(moment.total.isfinite().all()):
            return affine, float((dequantize(affine) - product.weight.float()).double().square().sum())
        return affine, loss(product.weight, affine, moment.total)

    def _kl(self, codes: list[tuple[Product, Affine]]) -> float:
        originals = [product.module._parameters["weight"] for product, _ in codes]
        try:
            put_weights([(product, dequantize(affine)) for product, affine in codes])
            return self._reference.compare().kl
        finally:
            for (product, _), original in zip(codes, originals, strict=True):
                product.module._parameters["weight"] = original


@contextmanager
def _beginning_at(before: Sequence[Layer], reads: list[Tensor]) -> Iterator[None]:
    """Skip the layers `before` some layer for the block: it is given what it reads, row after row, over and over."""
    skipped_layers: list[Any] = [layer.module for layer in before]
    upcoming = cycle(reads)

    def skipped(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden_states

    def given(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return next(upcoming)

    own = [vars(module).get("forward") for module in skipped_layers]
    try:
        for module in skipped_layers:
            module.forward = given if module is skipped_layers[-1] else skipped
        yield
    finally:
        for module, forward in zip(skipped_layers, own, strict=True):
            del module.forward
            if forward is not None:
                module.forward = forward
