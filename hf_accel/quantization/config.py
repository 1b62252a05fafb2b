"""What the user says of weights in few bits: how many, for which products, and in groups of which size."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any

from hf_accel.core.config import Config
from hf_accel.errors import ConfigError
from hf_accel.ops.affine import GROUP_SIZES, Scheme

BITS = (2, 3, 4, 8)
HEAD_BITS = (4, 8)  # every token's logits pass through the head: fewer are not offered
KEPT_BITS = 16  # among choices of bits: the product is left as it is

Bits = int | tuple[int, int] | None


@dataclass(frozen=True, kw_only=True)
class ProductsConfig(Config):
    """What configs of weights in few bits have in common: bits, groups, and which products.

    bits: 8 (one scale per output channel) or 4, 3 or 2 (one scale per group of columns).
    group_size: columns that share a scale, 32, 64 or 128; fewer are more exact and cost 16 bits per group. None: the
        whole row at 8 bits, 64 below (32 where 64 does not divide the row).
    symmetric: zero is the code 0; False gives each group a zero of its own (not at 8 bits, which gain nothing from it).
    layers: name pattern -> bits for the products it matches (2, 3, 4, 8, or None: left as they are), or bits and a
        group size of their own; the first match counts.
    head: bits of the output head (8 or 4); None leaves it alone.
    """

    bits: int = 4
    group_size: int | None = None
    symmetric: bool = True
    layers: Mapping[str, Bits] | tuple[tuple[str, Bits], ...] = ()
    head: int | None = None

    def __post_init__(self) -> None:
        name = type(self).__name__
        pairs = self.layers.items() if isinstance(self.layers, Mapping) else self.layers
        try:
            plain = tuple((pattern, tuple(bits) if isinstance(bits, list) else bits) for pattern, bits in pairs)
            object.__setattr__(self, "layers", plain)
        except (TypeError, ValueError):
            raise ConfigError(f"{name}.layers maps name patterns to bits; {self.layers!r} was given.") from None
        if strange := [pattern for pattern, _ in self.pairs if not isinstance(pattern, str)]:
            raise ConfigError(f"{name}.layers maps name patterns, which are texts; {strange[0]!r} was given.")
        given: dict[str, Any] = {f"layers[{pattern!r}]": bits for pattern, bits in self.pairs if bits is not None}
        for field, value in ({"bits": self.bits} | given).items():
            bits, size = value if isinstance(value, tuple) and len(value) == 2 else (value, GROUP_SIZES[0])
            if type(bits) is not int or bits not in BITS:
                raise ConfigError(f"{name}.{field} is 2, 3, 4 or 8; {value!r} was given.")
            if type(size) is not int or size not in GROUP_SIZES:
                raise ConfigError(f"{name}.{field} has groups of one of {GROUP_SIZES} columns; {value!r} was given.")
        if self.head is not None and (type(self.head) is not int or self.head not in HEAD_BITS):
            raise ConfigError(f"{name}.head is 4, 8 or None; {self.head!r} was given.")
        if self.group_size is not None and self.group_size not in GROUP_SIZES:
            raise ConfigError(f"{name}.group_size is one of {GROUP_SIZES} or None; {self.group_size!r} was given.")
        if type(self.symmetric) is not bool or (not self.symmetric and self.bits == 8):
            raise ConfigError(f"{name}.symmetric is True or False, and False only with bits below 8.")

    @property
    def pairs(self) -> tuple[tuple[str, Bits], ...]:
        return self.layers  # type: ignore[return-value]

    def bits_of(self, *names: str) -> int | None:
        """Return the bits of the product called by one of `names`, by the first pattern that matches one."""
        bits = self._match(names)
        return bits[0] if isinstance(bits, tuple) else bits

    def group_size_of(self, *names: str) -> int | None:
        """Return the group size that the first pattern that matches one of `names` gives, None where it gives none."""
        bits = self._match(names)
        return bits[1] if isinstance(bits, tuple) else None

    def expert_scheme(self, path: str, product: str, index: int, columns: int) -> tuple[Scheme, str]:
        """Return the scheme of the product of an expert of the module `path`, and why it is not the one asked for.

        Patterns may speak of the module, or of a product by a name as `layers.0.mlp.experts.down_proj.7`.
        """
        names = f"{path}.{product}.{index}", path
        return self.scheme(self.bits_of(*names) or self.bits, columns, self.group_size_of(*names))

    def _match(self, names: tuple[str, ...]) -> Bits:
        found = min((places[name] for name in names if name in (places := self._places)), default=len(self.pairs))
        for place, pattern in self._patterns:
            if place > found:
                break
            if any(fnmatchcase(name, pattern) for name in names):
                return self.pairs[place][1]
        return self.pairs[found][1] if found < len(self.pairs) else self.bits

    @cached_property
    def _places(self) -> dict[str, int]:
        """The first place of every name among the patterns: there may be one for each of thousands of experts."""
        return {name: place for place, (name, _) in reversed(list(enumerate(self.pairs)))}

    @cached_property
    def _patterns(self) -> list[tuple[int, str]]:
        return [(place, pattern) for place, (pattern, _) in enumerate(self.pairs) if any(c in pattern for c in "*?[")]

    def scheme(self, bits: int, columns: int, group_size: int | None = None) -> tuple[Scheme, str]:
        """Return the scheme for rows of `columns`, and why it is not the one asked for, or "".

        group_size: of the product alone; None: the config's.
        """
        if bits == 8:
            size = group_size or (self.group_size if self.bits == 8 else None)
            return Scheme(8, size if size is not None and columns % size == 0 else None), ""
        size = group_size or self.group_size
        wanted = (64, 32) if size is None else (size,)
        for group in wanted:
            if columns % group == 0:
                return Scheme(bits, group, self.symmetric), ""
        return Scheme(8), f"groups of {wanted[-1]} do not divide {columns} columns; kept at 8 bits per channel"


@dataclass(frozen=True, kw_only=True)
class WeightOnlyConfig(ProductsConfig):
    """Weights of the linear products in 8, 4, 3 or 2 bits.

    bits: 8 (one scale per output channel) or 4, 3 or 2 (one scale per group of columns).
    group_size: columns that share a scale, 32, 64 or 128; fewer are more exact and cost 16 bits per group. None: the
        whole row at 8 bits, 64 below (32 where 64 does not divide the row).
    symmetric: zero is the code 0; False gives each group a zero of its own (not at 8 bits, which gain nothing from it).
    layers: name pattern -> bits for the products it matches (2, 3, 4, 8, or None: left as they are), or bits and a
        group size of their own; the first match counts.
    head: bits of the output head (8 or 4), 8 by default because every token's logits pass through it; None leaves it
        alone.
    embeddings: 8 stores the table of input embeddings in 8 bits too, sharing the codes of a tied head: less memory,
        not more speed.
    """

    head: int | None = 8
    embeddings: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        name = type(self).__name__
        if self.embeddings not in (None, 8):
            raise ConfigError(f"{name}.embeddings is 8 or None; {self.embeddings!r} was given.")
        if self.embeddings is not None and self.head == 4:
            raise ConfigError(f"{name}.embeddings=8 shares its codes with the head; head=4 contradicts it.")


@dataclass(frozen=True, kw_only=True)
class GPTQConfig(WeightOnlyConfig):
    """Weights of the linear products in 8, 4, 3 or 2 bits, chosen by what the products read on calibration text.

    Frantar et al. 2023 (arXiv:2210.17323). The text is that of `optimize(calibration=...)`; without one the model
    writes some. Products of decoder layers are solved; the head and what else there is are rounded to nearest.

    bits, group_size, symmetric, layers, head, embeddings: as of WeightOnlyConfig.
    scaling: "awq" divides what products read strongly in the norm or product before them, and multiplies their columns,
        so that these are rounded less (activation-aware scaling, arXiv:2306.00978); None: nothing is scaled.
    solver: "gptq", or "nearest", which rounds to nearest what was scaled or is to be refined.
    order: "static" solves inputs with large values first, by scales that are fixed before; None: in their order. What
        is stored is the same.
    damping: what is added to the diagonal of each Hessian, as a share of its mean.
    refine_steps: steps of gradient descent on codes and scales of each layer, behind solving; 40 are a good number.
        They take longer than solving.
    max_activation_bytes: what a layer reads, for the whole text, lies in memory up to this, beyond it in a file.
    folder: where finished layers are kept, so that a run that is interrupted goes on there; None: nowhere.
    """

    scaling: str | None = None
    solver: str = "gptq"
    order: str | None = "static"
    damping: float = 0.01
    refine_steps: int = 0
    max_activation_bytes: int = 1 << 30
    folder: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scaling not in ("awq", None):
            raise ConfigError(f'GPTQConfig.scaling is "awq" or None; {self.scaling!r} was given.')
        if self.solver not in ("gptq", "nearest"):
            raise ConfigError(f'GPTQConfig.solver is "gptq" or "nearest"; {self.solver!r} was given.')
        if self.order not in ("static", None):
            raise ConfigError(f'GPTQConfig.order is "static" or None; {self.order!r} was given.')
        if type(self.damping) not in (int, float) or not 0 < self.damping <= 1:
            raise ConfigError(f"GPTQConfig.damping is a number in (0, 1]; {self.damping!r} was given.")
        self.check_integer("refine_steps", 0)
        self.check_integer("max_activation_bytes", 0)
        if self.solver == "nearest" and self.scaling is None and not self.refine_steps:
            raise ConfigError(
                'GPTQConfig(solver="nearest") needs scaling="awq" or refine_steps; without them it rounds plainly, as '
                "WeightOnlyConfig does without any text."
            )
        if self.folder is not None and not isinstance(self.folder, str):
            raise ConfigError(f"GPTQConfig.folder is the name of a folder or None; {self.folder!r} was given.")


@dataclass(frozen=True, kw_only=True)
class MixedPrecisionConfig(Config):
    """Bits where they matter: few for products that cost little in few, more for others, within a budget of bytes.

    The model is measured on the text of `optimize(calibration=...)`; without one it writes some. Products that run
    together (q, k and v; gate and up; the experts of a layer) have the same bits.

    experts: "apart" gives each expert of a layer bits of its own, by how many tokens it is sent and what rounding it
        changes of the layer's output; "together": the experts of a layer have the same.

    average_bits: bits per weight that the products of decoder layers take, scales included: 3 bits in groups of 64
        are 3.25. The head and the embeddings are not counted.
    budget_bytes: of all weights of the model afterwards, in place of `average_bits`.
    choices: bits to choose from; 16 leaves a product as it is.
    group_size: columns that share a scale below 8 bits, 32, 64 or 128; None: all three are choices, too.
    method: "gptq" rounds as GPTQConfig, "nearest" as WeightOnlyConfig.
    head, embeddings: as of WeightOnlyConfig.
    refine_steps: as of GPTQConfig, once bits are chosen.
    """

    average_bits: float | None = None
    budget_bytes: int | None = None
    choices: tuple[int, ...] = (2, 3, 4, 8, 16)
    group_size: int | None = None
    method: str = "gptq"
    head: int | None = 8
    embeddings: int | None = None
    refine_steps: int = 0
    experts: str = "together"

    def __post_init__(self) -> None:
        name = type(self).__name__
        if self.experts not in ("together", "apart"):
            raise ConfigError(f'{name}.experts is "together" or "apart"; {self.experts!r} was given.')
        if (self.average_bits is None) == (self.budget_bytes is None):
            raise ConfigError(
                f"{name} takes average_bits or budget_bytes, one of them; {self.average_bits!r} and "
                f"{self.budget_bytes!r} were given."
            )
        average = self.average_bits
        if average is not None and not (type(average) in (int, float) and 0 < average <= 32):
            raise ConfigError(f"{name}.average_bits is a number in (0, 32]; {average!r} was given.")
        if self.budget_bytes is not None:
            self.check_integer("budget_bytes", 1)
        known = (*BITS, KEPT_BITS)
        given = self.choices
        if not isinstance(given, (tuple, list)) or not all(type(bits) is int and bits in known for bits in given):
            raise ConfigError(f"{name}.choices are some of {known}; {given!r} was given.")
        object.__setattr__(self, "choices", tuple(sorted(set(given))))
        if not self.choices:
            raise ConfigError(f"{name}.choices are some of {known}; none was given.")
        if self.method not in ("gptq", "nearest"):
            raise ConfigError(f'{name}.method is "gptq" or "nearest"; {self.method!r} was given.')
        self.check_integer("refine_steps", 0)
        if self.refine_steps and self.method != "gptq":
            raise ConfigError(f'{name}.refine_steps belong to the method "gptq"; "{self.method}" was given.')
        self.of_products()

    def of_products(self, layers: tuple[tuple[str, Bits], ...] = ()) -> WeightOnlyConfig:
        """Return the config that rounds as this one says, with such bits for each product.

        Raises:
            ConfigError: a value that this config shares with it does not fit.
        """
        shared = {"group_size": self.group_size, "head": self.head, "embeddings": self.embeddings, "layers": layers}
        if self.method == "gptq":
            return GPTQConfig(refine_steps=self.refine_steps, **shared)  # type: ignore[arg-type]
        return WeightOnlyConfig(**shared)  # type: ignore[arg-type]
