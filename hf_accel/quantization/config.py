"""What the user says of weights in few bits: how many, for which products, and in groups of which size."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from hf_accel.core.config import Config
from hf_accel.errors import ConfigError
from hf_accel.ops.affine import GROUP_SIZES, Scheme

BITS = (2, 3, 4, 8)
HEAD_BITS = (4, 8)  # every token's logits pass through the head: fewer are not offered


@dataclass(frozen=True, kw_only=True)
class ProductsConfig(Config):
    """What configs of weights in few bits have in common: bits, groups, and which products.

    bits: 8 (one scale per output channel) or 4, 3 or 2 (one scale per group of columns).
    group_size: columns that share a scale, 32, 64 or 128; fewer are more exact and cost 16 bits per group. None: the
        whole row at 8 bits, 64 below (32 where 64 does not divide the row).
    symmetric: zero is the code 0; False gives each group a zero of its own (not at 8 bits, which gain nothing from it).
    layers: name pattern -> bits for the products it matches (2, 3, 4, 8, or None: left as they are); the first match
        counts.
    head: bits of the output head (8 or 4); None leaves it alone.
    """

    bits: int = 4
    group_size: int | None = None
    symmetric: bool = True
    layers: Mapping[str, int | None] | tuple[tuple[str, int | None], ...] = ()
    head: int | None = None

    def __post_init__(self) -> None:
        name = type(self).__name__
        pairs = self.layers.items() if isinstance(self.layers, Mapping) else self.layers
        try:
            object.__setattr__(self, "layers", tuple((pattern, bits) for pattern, bits in pairs))
        except (TypeError, ValueError):
            raise ConfigError(f"{name}.layers maps name patterns to bits; {self.layers!r} was given.") from None
        if strange := [pattern for pattern, _ in self.pairs if not isinstance(pattern, str)]:
            raise ConfigError(f"{name}.layers maps name patterns, which are texts; {strange[0]!r} was given.")
        given = {"bits": self.bits} | {f"layers[{pattern!r}]": bits for pattern, bits in self.pairs if bits is not None}
        for field, bits in given.items():
            if type(bits) is not int or bits not in BITS:
                raise ConfigError(f"{name}.{field} is 2, 3, 4 or 8; {bits!r} was given.")
        if self.head is not None and (type(self.head) is not int or self.head not in HEAD_BITS):
            raise ConfigError(f"{name}.head is 4, 8 or None; {self.head!r} was given.")
        if self.group_size is not None and self.group_size not in GROUP_SIZES:
            raise ConfigError(f"{name}.group_size is one of {GROUP_SIZES} or None; {self.group_size!r} was given.")
        if type(self.symmetric) is not bool or (not self.symmetric and self.bits == 8):
            raise ConfigError(f"{name}.symmetric is True or False, and False only with bits below 8.")

    @property
    def pairs(self) -> tuple[tuple[str, int | None], ...]:
        return self.layers  # type: ignore[return-value]

    def bits_of(self, name: str) -> int | None:
        """Return the bits of the product called `name`, by the first pattern that matches it."""
        for pattern, bits in self.pairs:
            if fnmatchcase(name, pattern):
                return bits
        return self.bits

    def scheme(self, bits: int, columns: int) -> tuple[Scheme, str]:
        """Return the scheme for rows of `columns`, and why it is not the one asked for, or ""."""
        if bits == 8:
            fits = self.bits == 8 and self.group_size is not None and columns % self.group_size == 0
            return Scheme(8, self.group_size if fits else None), ""
        wanted = (64, 32) if self.group_size is None else (self.group_size,)
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
    layers: name pattern -> bits for the products it matches (2, 3, 4, 8, or None: left as they are); the first match
        counts.
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
    order: "static" solves inputs with large values first, by scales that are fixed before; None: in their order. What
        is stored is the same.
    damping: what is added to the diagonal of each Hessian, as a share of its mean.
    refine_steps: steps of gradient descent on codes and scales of each layer, behind solving; 40 are a good number.
        They take longer than solving.
    max_activation_bytes: what a layer reads, for the whole text, lies in memory up to this, beyond it in a file.
    folder: where finished layers are kept, so that a run that is interrupted goes on there; None: nowhere.
    """

    order: str | None = "static"
    damping: float = 0.01
    refine_steps: int = 0
    max_activation_bytes: int = 1 << 30
    folder: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.order not in ("static", None):
            raise ConfigError(f'GPTQConfig.order is "static" or None; {self.order!r} was given.')
        if type(self.damping) not in (int, float) or not 0 < self.damping <= 1:
            raise ConfigError(f"GPTQConfig.damping is a number in (0, 1]; {self.damping!r} was given.")
        self.check_integer("refine_steps", 0)
        self.check_integer("max_activation_bytes", 0)
        if self.folder is not None and not isinstance(self.folder, str):
            raise ConfigError(f"GPTQConfig.folder is the name of a folder or None; {self.folder!r} was given.")
