"""Decoder layers and calls that together show each pair of values that two fields of a description may have."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from hf_accel.kernels import native
from hf_accel.kernels.native import BlockShape, BlockWeights, Heads, NativeBlock, Norm, Projection, heads_in_order
from hf_accel.kernels.weights import PackedWeight
from hf_accel.ops.affine import Scheme, quantize

Case = dict[str, Any]
# H, G, D, E, I
SIZES = {"gqa": (6, 2, 16, 64, 96), "mha": (4, 4, 24, 96, 64), "mqa": (4, 1, 32, 64, 160), "odd": (2, 2, 10, 37, 23)}
FIELDS: dict[str, tuple[Any, ...]] = {
    "isa": native.supported_isas() or ("none",),
    "dtype": native.DTYPES,
    "size": tuple(SIZES),
    "norm": ("rms", "rms_unit", "rms_once", "layer", "layer with bias", "layer_unit with bias",
             "rms without weight"),
    "structure": ("pre", "post", "sandwich", "parallel", "parallel, two norms", "parallel, sandwich", "bare", "half",
                  "half, post", "attention", "attention with its norm"),
    "layout": ("one by one", "fused", "by heads", "by groups", "with a gate", "values are keys", "no keys"),
    "head norms": ("none", "head", "heads", "row", "head, values too", "row, values too", "heads after the rotary"),
    "rotary": ("halves", "halves of some", "pairs", "pairs of some, rounded once", "pairs_of_halves",
               "pairs_of_halves of half the angles", "halves, rounded once", "none"),
    "scores": ("plain", "softcap", "sinks", "sinks in fp32", "slopes"),
    "feed-forward": ("silu", "gelu_tanh", "relu2", "alone: relu2", "alone: quick_gelu", "alone: gelu", "alone: relu"),
    "scales": ("none", "residual", "both"),
    "weights": ("dense", "slices", "transposed", "8 bits", "4 bits", "mixed"),
    "call": ("a token", "tokens of two", "window", "mask", "additive mask", "rows apart", "prompt", "padded prompts",
             "two passes"),
}  # fmt: skip


def fits(case: Case) -> bool:
    """Whether there is such a layer."""
    part, norms, layout = case["structure"], case["head norms"], case["layout"]
    if norms.startswith("row") and layout in ("by heads", "by groups", "with a gate", "values are keys"):
        return False
    if case["scales"] != "none" and part.startswith(("half", "attention")):
        return False
    if case["size"] == "odd" and case["weights"] in ("4 bits", "mixed"):
        return False
    return layout != "no keys" or not norms.endswith("values too")


def pairs(case: Case) -> set[tuple[Any, ...]]:
    return {(a, case[a], b, case[b]) for a, b in itertools.combinations(FIELDS, 2)}


def some_case(generator: random.Random, start: Case) -> Case | None:
    """A random case with the values of `start`, if there is one."""
    for _ in range(50):
        case = {name: generator.choice(values) for name, values in FIELDS.items()} | start
        if fits(case):
            return case
    return None


def all_cases(seed: int = 0) -> Iterator[Case]:
    """Cases until each pair of values has been seen that can be."""
    generator = random.Random(seed)
    wanted = {(a, x, b, y) for a, b in itertools.combinations(FIELDS, 2) for x in FIELDS[a] for y in FIELDS[b]}
    for pair in sorted(wanted, key=repr):
        if pair not in wanted:
            continue
        a, x, b, y = pair
        found = [case for _ in range(20) if (case := some_case(generator, {a: x, b: y}))]
        if not found:
            wanted.discard(pair)
            continue
        best = max(found, key=lambda case: len(pairs(case) & wanted))
        wanted -= pairs(best)
        yield best


class Build:
    """The layer of a case."""

    def __init__(self, case: Case, seed: int) -> None:
        self.case, self.dtype = case, case["dtype"]
        self.generator = torch.Generator().manual_seed(seed)
        self.heads, self.kv_heads, self.head_dim, self.hidden, self.inner = SIZES[case["size"]]

    def random(self, *size: int, scale: float = 0.2) -> Tensor:
        return (torch.randn(*size, generator=self.generator) * scale).to(self.dtype)

    def projection(self, rows: int, columns: int) -> Projection:
        kind, bias = self.case["weights"], self.random(rows)
        weight = self.random(rows, columns)
        if kind == "slices":
            weight = self.random(rows + 3, columns + 5)[1 : rows + 1, 2 : columns + 2]
        elif kind == "transposed":
            weight = self.random(columns, rows + 3)[:, 1 : rows + 1].T
        elif kind == "mixed":
            kind = ("8 bits", "4 bits", "transposed", "dense")[rows // 16 % 4]
            weight = weight.T.contiguous().T if kind == "transposed" else weight
        if kind.endswith("bits"):
            scheme = Scheme(8) if kind[0] == "8" else Scheme(4, 32, symmetric=True)
            return Projection(PackedWeight.pack(quantize(weight, scheme)), bias)
        return Projection(weight, bias)

    def norm(self, *size: int) -> Norm:
        kind, _, rest = self.case["norm"].partition(" ")
        weight = self.random(*size) + (0.0 if "unit" in kind else 1.0)
        return Norm(
            kind=kind, eps=1e-5, weight=None if "without" in rest else weight.to(self.dtype),
            bias=self.random(*size) if "bias" in rest else None,
        )  # fmt: skip

    def layout(self) -> tuple[dict[str, Heads | None], list[int]]:
        """Where heads lie, and the rows of the projections."""
        d, group, kv = self.head_dim, self.heads // self.kv_heads, self.kv_heads
        plain: dict[str, Heads | None] = dict(heads_in_order(self.heads, kv, d))
        every = [self.heads * d, kv * d, kv * d]
        match self.case["layout"]:
            case "one by one":
                return plain, every
            case "fused":
                return plain, [sum(every)]
            case "by heads":  # a group's queries, its key, its value
                stride = (group + 2) * d
                return {name: Heads(at * d, stride, d) for name, at in (("q", 0), ("k", group), ("v", group + 1))}, [
                    kv * stride
                ]
            case "by groups":  # a group's key, its value, its queries backwards
                stride = (group + 2) * d
                places = {"k": Heads(0, stride, d), "v": Heads(d, stride, d)}
                return {**places, "q": Heads((group + 1) * d, stride, -d)}, [kv * stride - d, d]
            case "with a gate":  # each query beside its gate
                places = {"q": Heads(0, 2 * group * d, 2 * d), "gate": Heads(d, 2 * group * d, 2 * d)}
                places |= {"k": Heads(2 * self.heads * d, d, d), "v": Heads((2 * self.heads + kv) * d, d, d)}
                return dict(places), [2 * self.heads * d, kv * d, kv * d]
            case "values are keys":
                return plain | {"v": plain["k"]}, every[:2]
            case _:
                return plain | {"k": None, "v": None}, every[:1]

    def block(self) -> NativeBlock:
        case, e, d = self.case, self.hidden, self.head_dim
        part, head_norms = case["structure"], case["head norms"]
        places, rows = self.layout()
        rotary, some = case["rotary"], max(4, d // 4 * 2)
        activation = case["feed-forward"].removeprefix("alone: ")
        extent = head_norms.split(",")[0].split(" ")[0]
        shape = BlockShape(
            hidden=e, heads=self.heads, kv_heads=self.kv_heads, head_dim=d, inner=self.inner, activation=activation,
            scale=0.2, softcap=3.0 if case["scores"] == "softcap" else None,
            residual_scale=1.0 if case["scales"] == "none" else 0.3, out_scale=0.7 if case["scales"] == "both" else 1.0,
            is_parallel="parallel" in part, norm_extent="head" if extent == "none" else extent,
            norms_after_rotary="after" in head_norms,
            rotary=rotary.split(" ")[0].split(",")[0], rotates_once="once" in rotary,
            rotary_size=some if "some" in rotary else d if "half the angles" in rotary else None,
            part="half" if "half" in part else "attention" if "attention" in part else "layer", **places,
        )  # fmt: skip
        weights: dict[str, Any] = {
            "projections": tuple(self.projection(n, e) for n in rows),
            "o": self.projection(e + 5 if shape.part == "attention" else e, self.heads * d),
        }
        if shape.part == "layer":
            weights |= {"up": self.projection(self.inner, e), "down": self.projection(e, self.inner)}
            weights["gate"] = None if "alone" in case["feed-forward"] else self.projection(self.inner, e)
        names = {
            "pre": "im", "post": "AM", "sandwich": "imAM", "parallel": "i", "parallel, two norms": "im",
            "parallel, sandwich": "imAM", "half": "im", "half, post": "A", "attention with its norm": "i",
        }  # fmt: skip
        full = {"i": "input_norm", "m": "mlp_norm", "A": "attention_out_norm", "M": "mlp_out_norm"}
        weights |= {full[name]: self.norm(e) for name in names.get(part, "")}
        if head_norms != "none":
            counts = {"q": self.heads, "k": self.kv_heads if shape.k else 0,
                      "v": self.kv_heads if "values" in head_norms else 0}  # fmt: skip
            for name, count in counts.items():
                size = {"head": (d,), "heads": (count, d), "row": (count * d,)}[shape.norm_extent]
                weights[f"{name}_norm"] = self.norm(*size) if count else None
        if "sinks" in case["scores"]:
            sinks = self.random(self.heads, scale=2.0)
            weights["sinks"] = sinks.float() if "fp32" in case["scores"] else sinks
        if case["scores"] == "slopes":
            weights["slopes"] = torch.randn(self.heads, generator=self.generator)
        return NativeBlock(shape, BlockWeights(**weights))

    def call(self, block: NativeBlock) -> dict[str, Any]:
        """Arguments of a call of the block."""
        batch, tokens, past, first = {
            "a token": (1, 1, 300, 0), "tokens of two": (2, 3, 17, 0), "window": (2, 2, 270, 255), "mask": (2, 4, 9, 0),
            "additive mask": (2, 4, 9, 2), "rows apart": (3, 2, 258, 0), "prompt": (1, 40, 0, 0),
            "padded prompts": (3, 21, 0, 0), "two passes": (1, 150, 3, 0),
        }[self.case["call"]]  # fmt: skip
        shape = block.shape
        size = (batch, shape.kv_heads, past + tokens + 5, shape.head_dim)
        columns = shape.rotary_size or shape.head_dim
        columns = columns // 2 if "half the angles" in self.case["rotary"] else columns
        angles = torch.rand(batch, tokens, columns // 2 + columns % 2, generator=self.generator).mul(6)
        angles = angles.repeat_interleave(2, -1) if shape.rotary == "pairs" else angles.repeat(1, 1, 2)
        angles = angles[..., :columns]
        found: dict[str, Any] = {
            "hidden": self.random(batch, tokens, shape.hidden, scale=1.0),
            "cos": angles.cos().to(self.dtype), "sin": angles.sin().to(self.dtype),
            "keys": self.random(*size, scale=1.0), "values": self.random(*size, scale=1.0),
            "past": past, "first": first,
        }  # fmt: skip
        if shape.rotary == "none":
            found |= {"cos": None, "sin": None}
        length = past + tokens - first
        causal = torch.ones(tokens, length, dtype=torch.bool).tril(length - tokens).expand(batch, 1, -1, -1)
        if self.case["call"] in ("mask", "additive mask"):
            seen = causal & (torch.rand(causal.shape, generator=self.generator) < 0.7)
            bias = self.random(batch, 1, tokens, length, scale=1.0).masked_fill(~seen, torch.finfo(self.dtype).min)
            found["mask"] = seen if self.case["call"] == "mask" else bias
        if self.case["call"] == "padded prompts":
            found["mask"] = causal & (torch.arange(length) >= torch.tensor([0, 7, 14])[:, None, None, None])
        if self.case["call"] == "rows apart":
            found["row_past"] = torch.tensor([past, 3, 255])
        return found
