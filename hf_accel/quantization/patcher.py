"""Weights in 8 and 4 bits: decoding is reading weights, so fewer bytes take less time in the same proportion.

Rounding to nearest with scales by least squared error, one product at a time: beside the model only the packed copy
of the product at hand exists, and with originals="drop" the original goes before the next one is made.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from hf_accel.core.calls.hosting import Host
from hf_accel.core.config import Config
from hf_accel.core.journal import Journal
from hf_accel.core.model.anatomy import Anatomy, holds_experts
from hf_accel.core.model.hf_config import own_configs
from hf_accel.core.steps.goal import Goal, Offer
from hf_accel.core.steps.patcher import Change, Fidelity, Patcher, Stage
from hf_accel.core.steps.setting import Setting
from hf_accel.errors import ConfigError
from hf_accel.kernels import native
from hf_accel.kernels.packed import LANES, QUANTUM, PackedWeight
from hf_accel.ops.affine import GROUP_SIZES, Scheme, quantize
from hf_accel.quantization.files.seal import Seal
from hf_accel.quantization.modules.embedding import QuantizedEmbedding
from hf_accel.quantization.modules.experts import QuantizedExperts, has_known_layout
from hf_accel.quantization.modules.linear import QuantizedLinear, linear_weight


@dataclass(frozen=True, kw_only=True)
class WeightOnlyConfig(Config):
    """Weights of the linear products in 8 or 4 bits.

    bits: 8 (one scale per output channel) or 4 (one scale per group of columns).
    group_size: columns that share a scale, 32, 64 or 128; fewer are more exact and cost 16 bits per group. None: the
        whole row at 8 bits, 64 at 4 bits (32 where 64 does not divide the row).
    symmetric: zero is the code 0; False gives each group a zero of its own (4 bits only: 8 bits gain nothing from it).
    layers: name pattern -> bits for the products it matches (4, 8, or None: left as they are); the first match counts.
    head: bits of the output head, 8 by default because every token's logits pass through it; None leaves it alone.
    embeddings: 8 stores the table of input embeddings in 8 bits too, sharing the codes of a tied head: less memory,
        not more speed.
    """

    bits: int = 4
    group_size: int | None = None
    symmetric: bool = True
    layers: Mapping[str, int | None] | tuple[tuple[str, int | None], ...] = ()
    head: int | None = 8
    embeddings: int | None = None

    def __post_init__(self) -> None:
        pairs = self.layers.items() if isinstance(self.layers, Mapping) else self.layers
        try:
            object.__setattr__(self, "layers", tuple((pattern, bits) for pattern, bits in pairs))
        except (TypeError, ValueError):
            raise ConfigError(
                f"WeightOnlyConfig.layers maps name patterns to bits; {self.layers!r} was given."
            ) from None
        if strange := [pattern for pattern, _ in self.pairs if not isinstance(pattern, str)]:
            raise ConfigError(f"WeightOnlyConfig.layers maps name patterns, which are texts; {strange[0]!r} was given.")
        given = {"bits": self.bits} | {f"layers[{pattern!r}]": bits for pattern, bits in self.pairs if bits is not None}
        given |= {"head": self.head} if self.head is not None else {}
        for name, bits in given.items():
            if type(bits) is not int or bits not in (4, 8):
                raise ConfigError(f"WeightOnlyConfig.{name} is 4 or 8; {bits!r} was given.")
        if self.embeddings not in (None, 8):
            raise ConfigError(f"WeightOnlyConfig.embeddings is 8 or None; {self.embeddings!r} was given.")
        if self.embeddings is not None and self.head == 4:
            raise ConfigError("WeightOnlyConfig.embeddings=8 shares its codes with the head; head=4 contradicts it.")
        if self.group_size is not None and self.group_size not in GROUP_SIZES:
            raise ConfigError(
                f"WeightOnlyConfig.group_size is one of {GROUP_SIZES} or None; {self.group_size!r} was given."
            )
        if type(self.symmetric) is not bool or (not self.symmetric and self.bits == 8):
            raise ConfigError("WeightOnlyConfig.symmetric is True or False, and False only with bits=4.")

    @property
    def pairs(self) -> tuple[tuple[str, int | None], ...]:
        return self.layers  # type: ignore[return-value]

    def bits_of(self, name: str) -> int | None:
        """Bits for the product called `name`, by the first pattern that matches it."""
        for pattern, bits in self.pairs:
            if fnmatchcase(name, pattern):
                return bits
        return self.bits

    def scheme(self, bits: int, columns: int) -> tuple[Scheme, str]:
        """Return the scheme for a row of `columns`, and what stood against the wanted one."""
        if bits == 8:
            fits = self.bits == 8 and self.group_size is not None and columns % self.group_size == 0
            return Scheme(8, self.group_size if fits else None), ""
        wanted = (64, 32) if self.group_size is None else (self.group_size,)
        for group in wanted:
            if columns % group == 0:
                return Scheme(4, group, self.symmetric), ""
        return Scheme(8), f"groups of {wanted[-1]} do not divide {columns} columns; kept at 8 bits per channel"


@dataclass
class Target:
    """A product to quantize: the child `name` of `parent`, called `path` in the model."""

    path: str
    parent: nn.Module
    name: str
    scheme: Scheme | None = None  # None: a module of experts, whose products have schemes of their own

    @property
    def module(self) -> Any:
        return self.parent._modules[self.name]


def targets(anatomy: Anatomy, config: WeightOnlyConfig) -> tuple[list[Target], list[str]]:
    """Return what `config` quantizes in a model, and sentences on what it leaves out."""
    found: list[Target] = []
    left_out: dict[str, list[str]] = {}
    adapters: set[str] = set()
    head = anatomy.model.get_output_embeddings()
    for parent_path, parent in anatomy.model.named_modules():
        for name, module in parent._modules.items():
            path = f"{parent_path}.{name}" if parent_path else name
            if module is None:
                continue
            if parent_path in adapters or _is_adapter(parent, name):  # parents come before what they hold
                adapters.add(path)
                continue
            if holds_experts(module):
                bits = config.bits_of(path)
                if bits is not None and has_known_layout(module):
                    found.append(Target(path, parent, name))
                elif bits is not None:
                    left_out.setdefault("experts in a layout that is not known stay as they are", []).append(path)
                continue
            if type(module) not in anatomy.PRODUCTS:
                continue
            bits = config.head if module is head else config.bits_of(path)
            rows, columns = linear_weight(module).shape
            if bits is None:
                continue
            if rows < LANES:
                left_out.setdefault(f"products of fewer than {LANES} rows stay as they are", []).append(path)
                continue
            scheme, reason = config.scheme(bits, columns)
            if reason:
                left_out.setdefault(reason, []).append(path)
            found.append(Target(path, parent, name, scheme))
    return found, [f"{reason}: {_listed(paths)}" for reason, paths in left_out.items()]


def _is_adapter(parent: nn.Module, name: str) -> bool:
    """Return whether a child belongs to an adapter and not to the model: PEFT keeps the model's in `base_layer`."""
    return (hasattr(parent, "base_layer") and name != "base_layer") or name.startswith(("lora_", "modules_to_save"))


def _listed(paths: list[str]) -> str:
    return ", ".join(paths[:3]) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")


class WeightOnlyPatcher(Patcher[WeightOnlyConfig], config=WeightOnlyConfig):
    stage = Stage.WEIGHTS
    fidelity = Fidelity.LOSSY
    occupies = "weights"
    saves_memory = True
    is_preferred = True

    @classmethod
    def candidates(cls, goal: Goal, setting: Setting) -> Offer:
        from hf_accel.quantization.candidates import offered

        return offered(goal, setting) if goal.is_lossy else Offer()

    def obstacles(self, setting: Setting) -> list[str]:
        anatomy = setting.anatomy
        if method := quantization_method(anatomy.model):
            return [f"the model is quantized already ({method}); quantize the original weights instead."]
        if anatomy.dtype not in native.DTYPES:
            return [f"weights of {anatomy.dtype} are not quantized; load the model in bfloat16, float16 or float32."]
        names = [path for path, _ in anatomy.model.named_modules()]
        found = [
            f"the layer pattern {pattern!r} matches no module of the model."
            for pattern, _ in self.config.pairs
            if not any(fnmatchcase(name, pattern) for name in names)
        ]
        chosen, _ = targets(anatomy, self.config)
        if not chosen:
            found.append("the model has no linear product that could be quantized.")
        for target in chosen:
            if not _is_finite(target.module, setting):
                found.append(f"the weight of {target.path} holds NaN or infinity.")
        return found

    def weight_bytes(self, setting: Setting) -> int:
        anatomy = setting.anatomy
        model, total = anatomy.model, anatomy.weight_bytes
        table, head = model.get_input_embeddings(), model.get_output_embeddings()
        is_tied = head is not None and getattr(head, "weight", None) is table.weight
        for target in targets(anatomy, self.config)[0]:
            weights = [w for w in target.module.parameters() if w.dim() > 1]
            for weight in weights:
                if target.scheme is None:
                    bits = self.config.bits_of(target.path) or self.config.bits
                    count, rows, columns = weight.shape
                    scheme = self.config.scheme(bits, columns)[0]
                else:
                    count, (rows, columns), scheme = 1, linear_weight(target.module).shape, target.scheme
                total += count * packed_bytes(scheme, rows, columns, anatomy.dtype)
                if not (is_tied and target.module is head):
                    total -= weight.numel() * weight.element_size()
        if self.config.embeddings is not None and type(table) is nn.Embedding:
            if not (is_tied and self.config.head is None):  # then the head goes on reading it
                total -= table.weight.numel() * table.weight.element_size()
            if not (is_tied and self.config.head == 8):
                total += packed_bytes(Scheme(8), table.num_embeddings, table.embedding_dim, anatomy.dtype)
        return total

    def patch(self, setting: Setting, host: Host) -> Change:
        anatomy, journal = setting.anatomy, host.journal
        model = anatomy.model
        before = anatomy.weight_bytes
        chosen, skipped = targets(anatomy, self.config)
        table, head = model.get_input_embeddings(), model.get_output_embeddings()
        is_tied = head is not None and getattr(head, "weight", None) is table.weight
        counts: dict[str, int] = {}
        added = 0
        for target in chosen:
            original = target.module
            replacement = self._prepared(target, original, setting)
            replacement.train(original.training)
            if original is head and is_tied:
                _untie(model, journal)
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

    def _prepared(self, target: Target, original: Any, setting: Setting) -> nn.Module:
        """Return the replacement of a product; while steps are timed, the one made before."""
        dtype = setting.anatomy.dtype
        if not setting.keeps_prepared:
            return self._replacement(target, original, dtype)
        made = setting.prepared_for(original)
        key = (target.scheme, self.config.bits_of(target.path), self.config.group_size, self.config.symmetric)
        if key not in made:
            made[key] = self._replacement(target, original, dtype)
        return made[key]

    def _replacement(self, target: Target, original: Any, dtype: torch.dtype) -> nn.Module:
        if target.scheme is not None:
            return quantized(linear_weight(original), original.bias, target.scheme, dtype)
        bits = self.config.bits_of(target.path) or self.config.bits

        def products(weights: torch.Tensor) -> list[QuantizedLinear]:
            scheme, _ = self.config.scheme(bits, weights.shape[-1])
            return [quantized(weight, None, scheme, dtype) for weight in weights]

        return QuantizedExperts(products(original.gate_up_proj), products(original.down_proj), original)

    def _quantize_table(self, anatomy: Anatomy, journal: Journal, is_tied: bool) -> list[str]:
        model = anatomy.model
        table, head = model.get_input_embeddings(), model.get_output_embeddings()
        if type(table) is not nn.Embedding:
            return [f"the embeddings are a {type(table).__name__}, not a plain nn.Embedding, and stay as they are"]
        if is_tied and not isinstance(head, QuantizedLinear):
            _untie(model, journal)
        shared = is_tied and isinstance(head, QuantizedLinear) and head.scheme == Scheme(8)
        packed = head.packed if shared else quantized(table.weight, None, Scheme(8), anatomy.dtype).packed
        for parent, name in _places(model, table):
            journal.swap_module(parent, name, QuantizedEmbedding(packed, table).train(table.training))
        return []


def _is_finite(module: Any, setting: Setting) -> bool:
    """Return whether the weights of a product are numbers; they are read once in a session."""
    known = setting.prepared_for(module)
    if "is finite" not in known:
        weights = [w.detach() for w in module.parameters() if w.dim() > 1]
        known["is finite"] = all(bool(torch.isfinite(torch.stack(w.aminmax())).all()) for w in weights)
    return bool(known["is finite"])


def packed_bytes(scheme: Scheme, rows: int, columns: int, dtype: torch.dtype) -> int:
    """Return the bytes of a packed weight [rows, columns] in a model of `dtype`, scales and padding included."""
    lanes, padded = -(-rows // LANES) * LANES, -(-columns // QUANTUM) * QUANTUM
    scale = 2 if _scale_dtype(scheme, dtype) is torch.bfloat16 else 4
    groups = columns // scheme.columns_per_scale(columns)
    return lanes * padded * scheme.bits // 8 + lanes * groups * (scale + (0 if scheme.symmetric else 4))


def _scale_dtype(scheme: Scheme, dtype: torch.dtype) -> torch.dtype:
    return dtype if scheme.group_size is None or dtype is torch.float16 else torch.bfloat16


def quantized(weight: torch.Tensor, bias: torch.Tensor | None, scheme: Scheme, dtype: torch.dtype) -> QuantizedLinear:
    """Return the product of a weight [N, K] and a bias [N] in `scheme`, for a model of `dtype`.

    Scales are values of bfloat16 (float16 in a float16 model), so that they take two bytes in memory and can be
    saved in the model's own dtype without loss; per channel, of the model's dtype.
    """
    return QuantizedLinear(PackedWeight.pack(quantize(weight, scheme, _scale_dtype(scheme, dtype))), bias, dtype)


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


def _untie(model: Any, journal: Journal) -> None:
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
