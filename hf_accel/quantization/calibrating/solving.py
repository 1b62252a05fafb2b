"""Rounds a model layer by layer on calibration text: what each layer reads is known from the one before it.

One layer at a time is read, solved and done with. Beside the model there are what the layer reads and gives (see
`activations`), the moments of its products (8 K^2 bytes for each input of K columns), and the layer's codes. Every
layer reads what the original model gives it, so that no result depends on another; refining, which is there to make up
for the errors of the layers before, has what the rounded ones give as well. A model whose layers cannot be run by
themselves is read as a whole, as often as its moments need portions of memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_accel.core.fingerprint import fingerprint
from hf_accel.core.model.blocks import DecoderBlock, described_blocks
from hf_accel.core.model.modes import evaluating
from hf_accel.errors import UnsupportedModelError
from hf_accel.ops.affine import Affine, dequantize
from hf_accel.ops.gptq import Factor, Solved, rounded, solve
from hf_accel.quantization.calibrating.activations import Activations, Room, Stream
from hf_accel.quantization.calibrating.findings import Finding, found
from hf_accel.quantization.calibrating.folder import LayerFolder
from hf_accel.quantization.calibrating.layers import Layer, first_inputs, layers_of
from hf_accel.quantization.calibrating.powers import Powers
from hf_accel.quantization.calibrating.products import Product, products_of, within
from hf_accel.quantization.calibrating.refining import put_weights, refined
from hf_accel.quantization.calibrating.scaling import Scaled, notes_on_scaling, scale
from hf_accel.quantization.config import GPTQConfig
from hf_accel.quantization.observing import Moment, Observer
from hf_accel.quantization.patcher import scale_dtype
from hf_accel.quantization.rounding.nearest import nearest
from hf_accel.quantization.targets import Target

LEAST_TOKENS = 16  # that a product must have read to be solved; experts may have seen fewer
_MOMENTS_BYTES = 2 << 30  # of moments observed at a time, where the model is read as a whole
_ORIGINAL, _ROUNDED = "original-{}.bin", "rounded-{}.bin"  # what layer {} reads


@dataclass
class Calibrated:
    """What was made of some targets: path of a product -> its codes; path of another parameter -> its new value.

    powers: as of `Powers.found`.
    """

    targets: list[Target]
    affines: dict[str, Affine]
    findings: list[Finding]
    values: dict[str, Tensor] = field(default_factory=dict)
    powers: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class _Layer:
    """What was made of one layer, and what it gives: the original, then the rounded one, where that is wanted."""

    affines: dict[str, Affine]
    findings: list[Finding]
    values: dict[str, Tensor]
    powers: dict[str, Tensor]
    given: list[Activations]


@dataclass
class Calibrator:
    """One run over `model`, a copy whose modules may be changed, its tensors not; `ids` [N, T] is the text.

    Results are those of `config`; `dtype` is that of the model they are for.
    """

    model: Any
    ids: Tensor
    targets: Sequence[Target]
    config: GPTQConfig
    dtype: torch.dtype
    advance: Callable[[], None] = lambda: None
    notes: list[str] = field(default_factory=list)
    _scaled: list[Scaled] = field(default_factory=list)

    # as decorators they do not hold while the caller has what was yielded; leaving inference mode brings gradients back
    @torch.inference_mode(False)
    @torch.no_grad()
    def run(self) -> Iterator[Calibrated]:
        """Yield what was made of the targets, layer by layer; those outside of decoder layers are none of them.

        Raises:
            UnsupportedModelError: a product reads NaN or infinity.
            ConfigError, CheckpointError: the folder for finished layers is of another run, or damaged.
            StorageError: there is no room for activations.
        """
        with evaluating(self.model):
            layers, reason = layers_of(self.model, self.ids.to(self._device))
            if layers:
                yield from self._by_layers(layers)
            else:
                self.notes.append(f"the model was read as a whole: {reason}")
                config = self.config
                asked = (
                    (config.scaling, "scaled"),
                    (config.refine_steps, "refined"),
                    (config.folder, "kept in folder"),
                )
                for is_asked, done in asked:
                    if is_asked:
                        self.notes.append(f"nothing was {done}, since layers cannot be run by themselves")
                yield from self._as_a_whole()

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device  # type: ignore[no-any-return]

    def _by_layers(self, layers: list[Layer]) -> Iterator[Calibrated]:
        chosen = [within(self.targets, layer.path) for layer in layers]
        folder = self._folder()
        names = [_ORIGINAL, _ROUNDED] if self.config.refine_steps else [_ORIGINAL]
        done = 0
        if folder is not None:
            done = folder.finished(len(layers), names)
        blocks = self._blocks() if done < len(layers) else {}  # describing runs the model, with all of its weights
        if folder is not None:
            for index in range(done):
                yield Calibrated(chosen[index], *folder.load(index, self._device))
                self._forget(chosen[index])
        if done == len(layers):
            return

        def first(row: int) -> Tensor:
            return first_inputs(self.model, layers, self.ids[row : row + 1].to(self._device))

        with Room(self.config.max_activation_bytes, None if folder is None else folder.path) as room:
            streams = [Stream(room, name, done, len(self.ids), first) for name in names]
            for index in range(done, len(layers)):
                products = [p for target in chosen[index] for p in products_of(self.model, target, self.config)]
                made = self._layer(layers[index], blocks.get(id(layers[index].module)), products, streams)
                if folder is not None:
                    folder.save(index, made.affines, made.findings, made.values, made.powers)
                for stream, read in zip(streams, made.given, strict=True):
                    stream.go_on(read)
                self._forget(chosen[index])
                yield Calibrated(chosen[index], made.affines, made.findings, made.values, made.powers)
            for stream in streams:
                stream.read.delete()
        self.notes += notes_on_scaling(self._scaled)

    def _blocks(self) -> dict[int, DecoderBlock]:
        """Return the layers that can be scaled, by identity."""
        if self.config.scaling is None:
            return {}
        blocks, odd, missing = described_blocks(self.model)
        self.notes += [f"not scaled: {reason}" for reason in (*odd, missing) if reason]
        return {id(block.layer): block for block in blocks}

    def _layer(
        self, layer: Layer, block: DecoderBlock | None, products: list[Product], streams: list[Stream]
    ) -> _Layer:
        """Solve the products of a layer, and refine them where there is a second stream."""
        original = streams[0].room_for_next()
        powers = Powers(len(original))
        with Observer({product.path: product.module for product in products}) as observer:
            for row in range(len(original)):
                original.write(row, layer.run(streams[0].read.row(row)))
                observer.end_row()
                powers.end_row(row, observer.moments)
        scaled = Scaled()
        if block is not None:
            scaled = scale(layer, block, products, streams[0].read, self.model, self.dtype, self.advance)
            self._scaled.append(scaled)
        solved, findings = self._solve_all(products, scaled.moments(observer.moments), scaled)
        affines = {product.path: one.affine for product, one in solved}
        given = [original]
        if len(streams) > 1:
            if solved:
                read, steps = streams[1].read, self.config.refine_steps
                affines |= refined(layer, solved, read, original, steps, streams[1].index, self.advance).affines
            affines |= self._fallen(products, affines)
            put_weights([(product, dequantize(affines[product.path])) for product in products])
            rounded = streams[1].room_for_next()
            for row in range(len(rounded)):
                rounded.write(row, layer.run(streams[1].read.row(row)))
            given.append(rounded)
        return _Layer(
            affines | self._fallen(products, affines), findings, scaled.values, powers.found(scaled.columns), given
        )

    def _folder(self) -> LayerFolder | None:
        if self.config.folder is None:
            return None
        settings = self.config.to_dict() | {"folder": None, "torch": torch.__version__, "dtype": str(self.dtype)}
        run = fingerprint([self.model], [self.ids], settings)
        return LayerFolder(Path(self.config.folder), run)

    def _solve_all(
        self, products: list[Product], moments: dict[str, Moment], scaled: Scaled
    ) -> tuple[list[tuple[Product, Solved]], list[Finding]]:
        solved: list[tuple[Product, Solved]] = []
        findings = []
        moment: Moment | None = None
        factor: Factor | str | None = ""
        for product in products:
            if product.path not in moments or moments[product.path] is not moment:
                moment = moments.pop(product.path, None)
                factor = self._factor(product, moment)
            else:
                del moments[product.path]
            if isinstance(factor, str) or moment is None:
                bits, count = product.scheme.bits, moment.count if moment else 0
                findings.append(Finding(product.path, bits, product.weight.numel(), count, reason=str(factor)))
            else:
                dtype, refits = scale_dtype(product.scheme, self.dtype), 2 if product.scheme.bits == 2 else 1
                weight, damping = product.weight, None
                if factor is None:
                    one = rounded(weight, product.scheme, dtype)
                else:
                    one, damping = solve(weight, factor, product.scheme, dtype, refits), factor.damping
                solved.append((product, one))
                scales = scaled.of(product.path, weight)
                findings.append(found(product.path, weight, one, moment, damping, scales))
            self.advance()
        return solved, findings

    def _factor(self, product: Product, moment: Moment | None) -> Factor | str | None:
        """Return the factored Hessian of a product, or why there is none; None where none is asked for."""
        if moment is None:
            return "which read none of the text"
        if not bool(moment.total.isfinite().all()):
            raise UnsupportedModelError(
                f"{product.path} reads NaN or infinity on the calibration text. Look for such weights in the model, or "
                "give other text."
            )
        if moment.count < LEAST_TOKENS:
            return f"which read fewer than {LEAST_TOKENS} tokens"
        if self.config.solver == "nearest":
            return None
        try:
            return Factor.of(moment.total, self.config.damping, self.config.order is not None)
        except ValueError as error:
            return f"for {error}"

    def _fallen(self, products: list[Product], affines: dict[str, Affine]) -> dict[str, Affine]:
        """Return the products that were not solved, rounded to nearest."""
        return {
            product.path: nearest(product.weight.float(), product.scheme, None, scale_dtype(product.scheme, self.dtype))
            for product in products
            if product.path not in affines
        }

    def _forget(self, targets: Sequence[Target]) -> None:
        """Let the weights of a finished layer go, so that originals that are given up leave memory."""
        for target in targets:
            parent, _, name = target.path.rpartition(".")
            self.model.get_submodule(parent)._modules[name] = None

    def _as_a_whole(self) -> Iterator[Calibrated]:
        portions = list(_portions(self.model, self.targets, self.config))
        for portion, products in portions:
            powers = Powers(len(self.ids))
            with Observer({product.path: product.module for product in products}) as observer:
                for row in range(len(self.ids)):
                    self.model(self.ids[row : row + 1].to(self._device), use_cache=False)
                    observer.end_row()
                    powers.end_row(row, observer.moments)
            solved, findings = self._solve_all(products, observer.moments, Scaled())
            affines = {product.path: one.affine for product, one in solved}
            yield Calibrated(portion, affines | self._fallen(products, affines), findings, {}, powers.found({}))


def _portions(
    model: Any, targets: Sequence[Target], config: GPTQConfig
) -> Iterator[tuple[list[Target], list[Product]]]:
    """Yield targets with their products, as many at a time as have moments of `_MOMENTS_BYTES`, but at least one."""
    chosen: list[Target] = []
    products: list[Product] = []
    total = 0
    for target in targets:
        own = products_of(model, target, config)
        needed = sum(8 * product.weight.shape[1] ** 2 for product in own)
        if chosen and total + needed > _MOMENTS_BYTES:
            yield chosen, products
            chosen, products, total = [], [], 0
        chosen.append(target)
        products += own
        total += needed
    if chosen:
        yield chosen, products
