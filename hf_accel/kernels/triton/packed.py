"""Products of 1 to 32 rows with packed weights of 8, 4 and 2 bits and of MXFP4, on a GPU, in the layout they lie in.

A word of a row (`_WORD` bytes) holds 2 to 16 columns of it, and the words of sixteen rows lie side by side: a thread's
16 bytes are neighbouring rows. Codes become floats exactly and are summed in fp32; a group's scale multiplies the sum
of the group, so that only sums are rounded, and activations are read in their dtype. One row: as many operations per
code as bits and exponents allow (4 bits: shift, mask, multiply-add), over whole rows; more rows: tensor cores on the
codes. Twin: `hf_accel.ops.products`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_accel.kernels.layout import LANES, QUANTUM
from hf_accel.kernels.triton import on_its_device, tuning
from hf_accel.kernels.triton.activation import KINDS
from hf_accel.kernels.triton.packed_rows import few_rows, one_row
from hf_accel.kernels.weights import PackedWeight

MAX_ROWS = 32
MAX_PARTS = 3
BITS = (8, 4, 2)
_WORDS = {8: torch.int16, 4: torch.int32, 2: torch.int32}
_TOP = 0x3F000000  # see `packed_codes.read_codes`
_FP4 = 4 + 16  # the number that stands for MXFP4 in kernels, beside bits
# activations that one load brings, as integers, by whether they are to be read one by one, and are two per word
_TOGETHER = {(True, True): (1, None), (True, False): (1, None), (False, True): (2, torch.int32),
             (False, False): (4, torch.int64)}  # fmt: skip
_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


def is_served(weight: PackedWeight) -> bool:
    """Return whether there is a kernel for a weight: 3 bits have none."""
    return weight.scheme.bits in BITS


def linear(
    x: Tensor,
    weights: Sequence[PackedWeight],
    biases: Sequence[Tensor | None] | None = None,
    residual: Tensor | None = None,
    residual_scale: float = 1.0,
    config: tuning.Config | None = None,
) -> Tensor:
    """Return x W_iᵀ + b_i side by side, as `linear.linear` does with dense weights; all weights have one scheme."""
    return _launched(x, weights, biases, residual, residual_scale, None, config)


def gated(
    x: Tensor,
    gate: PackedWeight,
    up: PackedWeight,
    activation: str,
    biases: Sequence[Tensor | None] | None = None,
    config: tuning.Config | None = None,
) -> Tensor:
    """Return activation(x gateᵀ) · (x upᵀ), [..., N]."""
    return _launched(x, (gate, up), biases, None, 1.0, activation, config)


@on_its_device
def _launched(
    x: Tensor,
    weights: Sequence[PackedWeight],
    biases: Sequence[Tensor | None] | None,
    residual: Tensor | None,
    residual_scale: float,
    activation: str | None,
    config: tuning.Config | None,
) -> Tensor:
    x = x.contiguous()
    inner = x.shape[-1]
    rows = x.numel() // inner
    scheme = weights[0].scheme
    sizes = [weight.rows for weight in weights]
    parts, width = len(weights), sizes[0] if activation else sum(sizes)
    group, number = _group(weights[0]), _FP4 if scheme.code_book else scheme.bits
    if config is None:
        key = _key(x, weights, activation)
        config = tuning.chosen("packed", x.device, x.dtype, key, defaults(rows, width, inner, group, number))
    kept = [*weights, *[weights[0]] * (MAX_PARTS - parts)]
    codes = [weight.codes.view(_WORDS[scheme.bits]) for weight in kept]
    offsets = [weight.scales if weight.offsets is None else weight.offsets for weight in kept]
    has_bias = biases is not None and biases[0] is not None
    added = [x] * MAX_PARTS if biases is None or not has_bias else [*biases, *[biases[0]] * (MAX_PARTS - parts)]
    counts = [*sizes, *[0] * (MAX_PARTS - parts)]
    y = torch.empty(*x.shape[:-1], width, dtype=x.dtype, device=x.device)
    per_program = config["BLOCK_N"]
    programs = -(-width // per_program) if activation else sum(-(-size // per_program) for size in sizes)
    arguments = (x, *codes, *(weight.scales for weight in kept), *offsets, *added,
                 x if residual is None else residual, y, *counts, residual_scale, _TOP)  # fmt: skip
    constants: dict[str, Any] = {
        "K": inner,
        "GROUP": group,
        "GROUPS": weights[0].scales.shape[1],
        "FORMAT": number,
        "HAS_OFFSETS": weights[0].offsets is not None,
        "PARTS": parts,
        "HAS_BIAS": has_bias,
        "HAS_RESIDUAL": residual is not None,
        "KIND": KINDS[activation],
    }
    if "STAGES" in config:
        together, integers = _TOGETHER[x.element_size() > 2 or inner % 4 != 0, number == 8]
        constants |= {"TOGETHER": together, "DTYPE": _DTYPES[x.dtype]}
        if integers is not None:
            arguments = (x.view(-1).view(integers), *arguments[1:])
        constants["IN_GROUP"] = min(config["BLOCK_J"], max(1, (group & -group) // _columns(number)))
        at_once = min(4, triton.next_power_of_2(rows))
        one_row[(-(-rows // at_once), programs)](*arguments, rows, width, **constants, ROWS=at_once, **config)
    else:
        precision = "ieee" if x.dtype is torch.float32 else "tf32"
        few_rows[(programs,)](
            *arguments, rows, width, **constants, PRECISION=precision, BLOCK_M=16 if rows <= 16 else 32, **config
        )
    return y


def _group(weight: PackedWeight) -> int:
    """Return the columns that share a scale."""
    found = weight.scheme.group_size
    return -(-weight.columns // QUANTUM) * QUANTUM if found is None else found


def _key(x: Tensor, weights: Sequence[PackedWeight], activation: str | None) -> tuple[Any, ...]:
    inner, scheme = x.shape[-1], weights[0].scheme
    width = sum(weight.rows for weight in weights)
    rows = x.numel() // inner
    return rows, width, inner, len(weights), activation is not None, scheme.code_book or scheme.bits, _group(weights[0])


def tune(x: Tensor, weights: Sequence[PackedWeight], activation: str | None = None) -> tuning.Config | None:
    """Return the fastest configuration of `linear`, or with an activation of `gated`, and keep it for this device."""

    def seconds(config: tuning.Config) -> float:
        return tuning.seconds_of(lambda: _launched(x, weights, None, None, 1.0, activation, config), x.device)

    inner, scheme = x.shape[-1], weights[0].scheme
    number = _FP4 if scheme.code_book else scheme.bits
    tried = candidates(x.numel() // inner, inner, _group(weights[0]), number)
    return tuning.tune("packed", x.device, x.dtype, _key(x, weights, activation), tried, seconds)


def _columns(number: int) -> int:
    """Return the columns of a word."""
    return {8: 2, _FP4: 8}.get(number, 32 // number)


def defaults(rows: int, width: int, inner: int, group: int, number: int) -> tuning.Config:
    """Return the configuration that runs untuned."""
    words = triton.next_power_of_2(-(-inner // QUANTUM) * QUANTUM // _columns(number))
    if rows == 1:
        warps = 8 if width < 8192 else 4
        return {
            "BLOCK_N": LANES,
            "BLOCK_J": min((64 if number == 8 else 32) * warps, words),
            "STAGES": 3,
            "num_warps": warps,
        }
    if rows <= 8:
        return {"BLOCK_N": LANES, "BLOCK_J": min(64, words), "STAGES": 3, "num_warps": 4}
    return {"BLOCK_N": 32, "BLOCK_K": _block(group, 128), "num_warps": 4, "num_stages": 5}


def _block(group: int, most: int) -> int:
    """Return the largest power of two that divides a group, from 32 to `most`."""
    return max(32, min(most, group & -group))


def candidates(rows: int, inner: int, group: int, number: int) -> list[tuning.Config]:
    """Return the configurations that tuning tries."""
    words = triton.next_power_of_2(-(-inner // QUANTUM) * QUANTUM // _columns(number))
    found: list[tuning.Config] = []
    few = [(32, 2, 3), (32, 4, 3), (64, 4, 1), (64, 4, 3), (128, 8, 3)]
    one = [(64, 4, 1), (64, 2, 4), (128, 4, 1), (128, 4, 3), (128, 8, 1), (256, 4, 1), (256, 8, 1), (256, 8, 3),
           (512, 8, 1), (512, 16, 1)]  # fmt: skip
    if rows <= 16:
        found += [
            {"BLOCK_N": LANES, "BLOCK_J": j, "STAGES": stages, "num_warps": warps}
            for j, warps, stages in (one if rows == 1 else few)
            if j <= words
        ]
    found += [
        {"BLOCK_N": n, "BLOCK_K": _block(group, k), "num_warps": warps, "num_stages": stages}
        for n, k, warps, stages in ((16, 128, 1, 6), (16, 128, 2, 6), (32, 128, 2, 5), (32, 128, 4, 5), (64, 128, 4, 5),
                                    (64, 64, 4, 5), (128, 128, 8, 4))
    ]  # fmt: skip
    return found
