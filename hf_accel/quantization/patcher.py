"""Puts weights in 8 bits or fewer in place: decoding is reading weights, so fewer bytes take proportionally less time.

One product is quantized at a time: beside the model only the packed copy of the product at hand exists, and with
originals="drop" the original goes before the next one is made.
"""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from hf_accel.core.calls.hosting import Host
from hf_accel.core.journal import Journal
from hf_accel.core.model.anatomy import Anatomy
from hf_accel.core.model.hf_config import own_configs
from hf_accel.core.steps.goal import Goal, Offer
from hf_accel.core.steps.patcher import Change, Fidelity, Patcher, Stage
from hf_accel.core.steps.setting import Setting
from hf_accel.kernels import native
from hf_accel.kernels.weights import LANES, QUANTUM, PackedWeight
from hf_accel.ops.affine import Scheme
from hf_accel.quantization.candidates import offered
from hf_accel.quantization.config import WeightOnlyConfig
from hf_accel.quantization.files.seal import Seal
from hf_accel.quantization.modules.embedding import QuantizedEmbedding
from hf_accel.quantization.modules.experts import PRODUCTS, QuantizedExperts, packed_product, weight_of
from hf_accel.quantization.modules.linear import QuantizedLinear, linear_weight
from hf_accel.quantization.observing import Moment
from hf_accel.quantization.rounding import METHODS
from hf_accel.quantization.targets import Target, targets

FINITE = "holds numbers only"  # what the setting keeps of a product


class WeightOnlyPatcher(Patcher[WeightOnlyConfig], config=WeightOnlyConfig):
    stage = Stage.WEIGHTS
    fidelity = Fidelity.LOSSY
    occupies = "weights"
    saves_memory = True
    is_preferred = True

    @classmethod
    def candidates(cls, goal: Goal, setting: Setting) -> Offer:
        return offered(goal, setting) if goal.is_lossy else Offer()

    def obstacles(self, setting: Setting) -> list[str]:
        anatomy = setting.anatomy
        if (method := quantization_method(anatomy.model)) and not are_experts_alone(anatomy.model):
            return [f"the model is quantized already ({method}); quantize the original weights instead."]
        found = self.misfits(anatomy)
        if anatomy.dtype in native.DTYPES:
            for target in targets(anatomy, self.config)[0]:
                if not is_finite(target.module, setting):
                    found.append(f"the weight of {target.path} holds NaN or infinity.")
        return found

    def misfits(self, anatomy: Anatomy) -> list[str]:
        """Return why a model of such parts cannot be rounded as the config says, whatever its weights hold."""
        if anatomy.dtype not in native.DTYPES:
            return [f"weights of {anatomy.dtype} are not quantized; load the model in bfloat16, float16 or float32."]
        chosen, _ = targets(anatomy, self.config)
        names = dict.fromkeys(path for path, _ in anatomy.model.named_modules())
        names |= dict.fromkeys(path for target in chosen for path, *_ in target.products(self.config))
        found = [
            f"the layer pattern {pattern!r} matches no module of the model."
            for pattern, _ in self.config.pairs
            if pattern not in names and not any(fnmatchcase(name, pattern) for name in names)
        ]
        kept = [path for target in chosen for path, *_ in target.products(self.config)
                if self.config.bits_of(path, target.path) is None]  # fmt: skip
        if kept:
            found.append(f"{kept[0]} cannot stay as it is where others of its layer's experts are packed.")
        if not chosen:
            found.append("the model has no linear product that could be quantized.")
        return found

    def weight_bytes(self, setting: Setting) -> int:
        anatomy = setting.anatomy
        model, total = anatomy.model, anatomy.weight_bytes
        table, head = model.get_input_embeddings(), model.get_output_embeddings()
        is_tied = head is not None and getattr(head, "weight", None) is table.weight
        for target in targets(anatomy, self.config)[0]:
            for _, (rows, columns), scheme, _ in target.products(self.config):
                total += packed_bytes(scheme, rows, columns, anatomy.dtype)
            for weight in target.weights:
                if target.scheme is not None:
                    rows, columns = weight.shape
                    total += packed_bytes(target.scheme, rows, columns, anatomy.dtype)
                if not (is_tied and target.module is head):
                    total -= weight.numel() * weight.element_size()
        if self.config.embeddings is not None and type(table) is nn.Embedding:
            if not (is_tied and self.config.head is None):  # then the head goes on reading it
                total -= table.weight.numel() * table.weight.element_size()
            if not (is_tied and self.config.head == 8):
                total += packed_bytes(Scheme(8), table.num_embeddings, table.embedding_dim, anatomy.dtype)
        return total

    def parts(self, setting: Setting) -> int | None:
        return len(targets(setting.anatomy, self.config)[0])

    def patch(self, setting: Setting, host: Host) -> Change:
        anatomy, journal = setting.anatomy, host.journal
        model = anatomy.model
        before = anatomy.weight_bytes
        chosen, skipped = targets(anatomy, self.config)
        table, head = model.get_input_embeddings(), model.get_output_embeddings()
        is_tied = head is not None and getattr(head, "weight", None) is table.weight
        counts: dict[str, int] = {}
        added = 0
        for target, replacement in self.replacements(chosen, setting, host):
            original = target.module
            replacement.train(original.training)
            if original is head and is_tied:
                untie(model, journal)
            journal.swap_module(target.parent, target.name, replacement)
            for product in replacement.modules():
                if isinstance(product, QuantizedLinear):
                    kind = f"{product.scheme.bits} bits"
                    counts[kind] = counts.get(kind, 0) + 1
                    added += product.nbytes
            del original
            setting.advance()
        if self.config.embeddings is not None:
            skipped += self._quantize_table(anatomy, journal, is_tied)
        journal.set_attribute(model, "hf_quantizer", Seal())
        after = anatomy.weight_bytes
        summary = ", ".join(f"{count} products in {kind}" for kind, count in counts.items())
        return Change(
            f"{summary}; weights {before / 1e6:.1f} -> {after / 1e6:.1f} MB",
            extra_bytes=added if journal.originals != "drop" else 0,
            skipped=tuple(skipped),
            weight_bytes=after,
        )

    def replacements(self, chosen: list[Target], setting: Setting, host: Host) -> Iterator[tuple[Target, nn.Module]]:
        """Yield every target with its replacement, one at a time, made when it is asked for."""
        for target in chosen:
            yield target, self.prepared(target, target.module, setting)

    def prepared(self, target: Target, original: Any, setting: Setting) -> nn.Module:
        """Return the replacement of a product, rounded to nearest; while steps are timed, the one made before."""
        dtype = setting.anatomy.dtype
        if not setting.keeps_prepared:
            return self._replacement(target, original, dtype)
        made = setting.prepared_for(original)
        key = self._rounded_key(target)
        if key not in made:
            made[key] = self._replacement(target, original, dtype)
        return made[key]

    def prepare(self, target: Target, replacement: nn.Module, setting: Setting) -> None:
        """Keep the replacement of a product that was made elsewhere, for `patch` to put in place."""
        setting.prepared_for(target.module)[self._rounded_key(target)] = replacement

    def _rounded_key(self, target: Target) -> tuple[Scheme | None, ...]:
        return (target.scheme, *(scheme for _, _, scheme, _ in target.products(self.config)))

    def _replacement(self, target: Target, original: Any, dtype: torch.dtype) -> nn.Module:
        if target.scheme is not None:
            return quantized(linear_weight(original), original.bias, target.scheme, dtype)
        layout: Any = target.layout
        schemes = (scheme for _, _, scheme, _ in target.products(self.config))

        def packed(name: str, index: int, scheme: Scheme) -> QuantizedLinear:
            weight = weight_of(original, layout, name, index)
            codes = METHODS["nearest"](weight, scheme, None, scale_dtype(scheme, dtype))
            return packed_product(original, layout, name, index, codes, dtype)

        gate_up, down = ([packed(name, i, next(schemes)) for i in range(layout.experts)] for name in PRODUCTS)
        return QuantizedExperts(gate_up, down, original)

    def _quantize_table(self, anatomy: Anatomy, journal: Journal, is_tied: bool) -> list[str]:
        model = anatomy.model
        table, head = model.get_input_embeddings(), model.get_output_embeddings()
        if type(table) is not nn.Embedding:
            return [f"the embeddings are a {type(table).__name__}, not a plain nn.Embedding, and stay as they are"]
        if is_tied and not isinstance(head, QuantizedLinear):
            untie(model, journal)
        shared = is_tied and isinstance(head, QuantizedLinear) and head.scheme == Scheme(8)
        packed = head.packed if shared else quantized(table.weight, None, Scheme(8), anatomy.dtype).packed
        for parent, name in _places(model, table):
            journal.swap_module(parent, name, QuantizedEmbedding(packed, table).train(table.training))
        return []


def is_finite(module: Any, setting: Setting) -> bool:
    """Return whether the weights of a product are numbers; they are read once in a session."""
    known = setting.prepared_for(module)
    if FINITE not in known:
        weights = [w.detach() for w in module.parameters() if w.dim() > 1]
        known[FINITE] = all(bool(torch.isfinite(torch.stack(w.aminmax())).all()) for w in weights)
    return bool(known[FINITE])


def packed_bytes(scheme: Scheme, rows: int, columns: int, dtype: torch.dtype) -> int:
    """Return the bytes of a packed weight [rows, columns] in a model of `dtype`, scales and padding included."""
    lanes, padded = -(-rows // LANES) * LANES, -(-columns // QUANTUM) * QUANTUM
    scale = scale_dtype(scheme, dtype).itemsize
    groups = columns // scheme.columns_per_scale(columns)
    return lanes * padded * scheme.bits // 8 + lanes * groups * (scale + (0 if scheme.symmetric else 4))


def scale_dtype(scheme: Scheme, dtype: torch.dtype) -> torch.dtype:
    """Return whose values the scales of a weight in `scheme` are, in a model of `dtype`."""
    return dtype if scheme.group_size is None or dtype is torch.float16 else torch.bfloat16


def quantized(
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    scheme: Scheme,
    dtype: torch.dtype,
    *,
    method: str = "nearest",
    observed: Moment | None = None,
) -> QuantizedLinear:
    """Return the product of a weight [N, K] and a bias [N] in `scheme`, for a model of `dtype`.

    Scales are values of bfloat16 (float16 in a float16 model), so that they take two bytes in memory and can be
    saved in the model's own dtype without loss; per channel, of the model's dtype.

    Args:
        method: which of the rounding methods chooses codes and scales.
        observed: what the product reads on calibration text, for methods that ask for it.
    """
    codes = METHODS[method](weight, scheme, observed, scale_dtype(scheme, dtype))
    return QuantizedLinear(PackedWeight.pack(codes), bias, dtype)


def are_experts_alone(model: Any) -> bool:
    """Return whether experts that were read in MXFP4 are all that is packed, so that the rest is as it was."""
    stored = {
        product
        for experts in model.modules()
        if isinstance(experts, QuantizedExperts)
        for product in experts.modules()
        if isinstance(product, QuantizedLinear) and product.scheme.code_book
    }
    packed = {module for module in model.modules() if isinstance(module, (QuantizedLinear, QuantizedEmbedding))}
    return bool(stored) and packed == stored and isinstance(getattr(model, "hf_quantizer", None), Seal)


def quantization_method(model: Any) -> str | None:
    """Return the name of the method a model's weights are quantized by already, None if they are not."""
    if any(isinstance(module, (QuantizedLinear, QuantizedEmbedding)) for module in model.modules()):
        return "hf_accel"
    quantizer = getattr(model, "hf_quantizer", None)
    config = getattr(model.config, "quantization_config", None) or getattr(quantizer, "quantization_config", None)
    if quantizer is None and config is None:
        return None
    method = config.get("quant_method") if isinstance(config, dict) else getattr(config, "quant_method", None)
    return str(getattr(method, "value", method) or "an unknown method")


def untie(model: Any, journal: Journal) -> None:
    """Let head and embeddings go separate ways: transformers would tie them again at the next opportunity."""
    for config in own_configs(model, journal):
        if getattr(config, "tie_word_embeddings", False):
            journal.set_attribute(config, "tie_word_embeddings", False)
    for module in model.modules():
        if getattr(module, "all_tied_weights_keys", None):
            journal.set_attribute(module, "all_tied_weights_keys", {})


def _places(model: nn.Module, module: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is module:
                yield parent, name
