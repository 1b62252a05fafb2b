"""Calls of every kernel in Triton, at small shapes like those of real models."""

from __future__ import annotations

import itertools

import torch

from hf_accel.kernels.layout import codes_shape
from hf_accel.kernels.triton import attention, choose, linear, norm, packed, rotary
from hf_accel.kernels.weights import PackedWeight
from hf_accel.ops import cached
from hf_accel.ops.affine import Scheme

BF16 = torch.bfloat16
SCHEMES = (Scheme(4, 128), Scheme(4, 32, symmetric=False), Scheme(8), Scheme(2, 64), Scheme(4, 32, code_book="fp4"))


def empty_weight(rows: int, columns: int, scheme: Scheme) -> PackedWeight:
    """Return a packed weight without values."""
    kind = torch.int8 if scheme.bits == 8 else torch.uint8
    codes = torch.empty(codes_shape(rows, columns, scheme.bits), dtype=kind)
    groups = 1 if scheme.group_size is None else columns // scheme.group_size
    shape = (len(codes), groups, 16)
    scales = torch.empty(shape, dtype=torch.uint8 if scheme.code_book else torch.int16)
    return PackedWeight(scheme, rows, columns, codes, scales, None if scheme.symmetric else torch.empty(shape).int())


def every_launch() -> None:
    """Call every kernel with every format."""
    for rows, dtype in ((1, BF16), (12, BF16), (1, torch.float32), (4, torch.float16)):
        x = torch.empty(rows, 1024, dtype=dtype)
        weights = [torch.empty(n, 1024, dtype=dtype) for n in (256, 128, 128)]
        biases = [torch.empty(n, dtype=dtype) for n in (256, 128, 128)]
        linear.linear(x, weights, biases, torch.empty(rows, 512, dtype=dtype), 0.5)
        linear.linear(x[:, :100].contiguous(), [torch.empty(30, 100, dtype=dtype)])
        linear.gated(x, weights[0], weights[0], "silu")
        for scheme in SCHEMES if dtype is BF16 else SCHEMES[:1]:
            three = [empty_weight(n, 1024, scheme) for n in (256, 128, 128)]
            packed.linear(x, three, biases, torch.empty(rows, 512, dtype=dtype))
            packed.gated(x, three[0], three[0], "gelu_tanh")
    hidden, weight = torch.empty(2, 1, 1024, dtype=BF16), torch.empty(1024, dtype=BF16)
    for style in ("llama", "gemma"):
        norm.add_norm(hidden, None, weight, eps=1e-5, style=style)
        norm.add_norm(hidden, hidden, weight, eps=1e-5, style=style, inner_weight=weight, residual_scale=0.5)
        norm.add_norm(hidden, hidden, None, eps=1e-5, style=style)
    lengths = torch.zeros(2, dtype=torch.int32)
    cos = torch.empty(1, 1, 128, dtype=BF16)
    for bits, normed in itertools.product((None, 8, 4), (True, False)):
        row = 128 if bits is None else cached.row_bytes(bits, 128)
        kind = BF16 if bits is None else torch.uint8
        keys, values = (torch.empty(2, 4, 256, row, dtype=kind) for _ in "kv")
        factor = torch.empty(128, dtype=BF16) if normed else None
        query = rotary.rotary_write(
            torch.empty(2, 1, 24 * 128, dtype=BF16), cos, cos, keys, values, lengths,
            kv_heads=4, head_dim=128, bits=bits, q_norm=factor, k_norm=factor, eps=1e-6,
        )  # fmt: skip
        more = {"window": 64, "softcap": 5.0, "sinks": torch.empty(16)} if normed else {}
        attention.decode_attention(
            query, keys, values, lengths, lengths, scale=0.1, bits=bits, head_dims=(128, 128), **more
        )
    choose.choose(torch.empty(2, 32000, dtype=BF16), torch.empty(2, 8).long(), lengths)
