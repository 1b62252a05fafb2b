"""The `pack-quantized` layout of compressed-tensors: packed weights to tensors and back, and schemes to its JSON.

A weight [N, K] is stored as `weight_packed` int32 [N, ceil(K bits / 32)] (codes plus half their range, the first in
the lowest bits), `weight_scale` [N, groups], `weight_shape` int64 [2] and, if zero has a code of its own,
`weight_zero_point` int32 [ceil(N bits / 32), groups], packed down the rows; `weight_g_idx` int32 [K] where groups are
not of adjacent columns. Cost: a copy of one weight at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from hf_accel.ops.affine import Affine, Scheme
from hf_accel.quantization.files import bitstream, mxfp4
from hf_accel.quantization.files.grouping import group_index

METHOD = "compressed-tensors"
FORMAT = "pack-quantized"
MIXED = "mixed-precision"  # of the whole, where groups of products are in different formats
PRIVATE_METHOD = "hf_accel"
SUFFIXES = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx")


def packed_shape(rows: int, columns: int, bits: int) -> tuple[int, int]:
    """Return the shape of int32 words that hold codes [rows, columns]."""
    return rows, bitstream.word_count(columns, bits)


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Return signed int8 codes [rows, columns] as int32 [rows, words]."""
    return bitstream.pack((codes.to(torch.int16) + (1 << bits - 1)).to(torch.uint8), bits)


def unpack_codes(words: Tensor, bits: int, columns: int) -> Tensor:
    """Return the signed int8 codes [rows, columns] of int32 words [rows, words]."""
    return signed(bitstream.unpack(words, bits, columns), bits)


def signed(codes: Tensor, bits: int) -> Tensor:
    """Return codes from 0 to 2^bits - 1 as int8 from -2^(bits - 1) on."""
    return (codes.to(torch.int16) - (1 << bits - 1)).to(torch.int8)


def stored_names(scheme: Scheme) -> tuple[str, ...]:
    """Return the names of the tensors that a weight in `scheme` is stored as."""
    return SUFFIXES[:3] if scheme.symmetric else SUFFIXES[:4]


def stored_shapes(scheme: Scheme, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
    """Return name -> shape of the tensors that a weight [rows, columns] is stored as."""
    if scheme.code_book:
        return mxfp4.stored_shapes(rows, columns)
    groups = columns // scheme.columns_per_scale(columns)
    shapes = (
        packed_shape(rows, columns, scheme.bits),
        (rows, groups),
        (2,),
        packed_shape(groups, rows, scheme.bits)[::-1],
    )
    return dict(zip(stored_names(scheme), shapes, strict=False))


def to_tensors(weight: Affine, scale_dtype: torch.dtype, order: Tensor | None = None) -> dict[str, Tensor]:
    """Return the tensors of a quantized weight; scales as `scale_dtype` where it holds them exactly, else fp32.

    order: the column of the model that each column of the weight reads, where they differ; then there is a `g_idx`.
    """
    scales = weight.scales.to(scale_dtype)
    if not torch.equal(scales.float(), weight.scales.float()):
        scales = weight.scales.float()
    bits, codes = weight.scheme.bits, weight.codes
    tensors = {
        "weight_packed": pack_codes(codes if order is None else codes[:, torch.argsort(order)], bits),
        "weight_scale": scales.contiguous(),
        "weight_shape": torch.tensor(weight.codes.shape, dtype=torch.int64),
    }
    if weight.zeros is not None:
        tensors["weight_zero_point"] = pack_codes(weight.zeros.T, bits).T.contiguous()
    if order is not None:
        tensors["weight_g_idx"] = group_index(order, weight.scheme.columns_per_scale(len(order)))
    return tensors


def from_tensors(tensors: Mapping[str, Tensor], scheme: Scheme, rows: int, columns: int) -> Affine:
    """Return the quantized weight [rows, columns] of tensors whose shapes were checked."""
    codes = unpack_codes(tensors["weight_packed"], scheme.bits, columns)
    zeros = None
    if not scheme.symmetric:
        zeros = unpack_codes(tensors["weight_zero_point"].T, scheme.bits, rows).T.contiguous()
    return Affine(codes, tensors["weight_scale"].clone(), zeros, scheme)


def to_config(
    schemes: Mapping[str, Scheme], ignore: Iterable[str], is_public: bool, ordered: Iterable[str] = ()
) -> dict[str, Any]:
    """Return the `quantization_config` of products with these schemes; every product is named in full.

    ordered: names of products whose groups are not of adjacent columns.
    """
    names: dict[tuple[Scheme, bool], list[str]] = {}
    for name, scheme in schemes.items():
        names.setdefault((scheme, name in ordered), []).append(name)
    groups = {}
    for index, ((scheme, has_order), targets) in enumerate(names.items()):
        weights: dict[str, Any] = {
            "num_bits": scheme.bits,
            "type": "float" if scheme.code_book else "int",
            "symmetric": scheme.symmetric,
            "strategy": "channel" if scheme.group_size is None else "group",
            "group_size": scheme.group_size,
            "dynamic": False,
        }
        if has_order:
            weights["actorder"] = "group"
        if scheme.code_book:
            weights["scale_dtype"] = "torch.uint8"
        groups[f"group_{index}"] = {
            "targets": targets, "weights": weights,
            "input_activations": None, "output_activations": None,
            "format": mxfp4.FORMAT if scheme.code_book else FORMAT,
        }  # fmt: skip
    formats = {group["format"] for group in groups.values()}
    return {
        "quant_method": METHOD if is_public else PRIVATE_METHOD,
        "format": formats.pop() if len(formats) == 1 else MIXED if formats else FORMAT,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": list(ignore),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }
