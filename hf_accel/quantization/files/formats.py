"""The `pack-quantized` layout of compressed-tensors: packed weights to tensors and back, schemes to its JSON and back.

A weight [N, K] is stored as `weight_packed` int32 [N, ceil(K bits / 32)] (codes plus half their range, the first in
the lowest bits), `weight_scale` [N, groups], `weight_shape` int64 [2] and, if zero has a code of its own,
`weight_zero_point` int32 [ceil(N bits / 32), groups], packed down the rows. Cost: a copy of one weight at a time.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from hf_accel.errors import CheckpointError
from hf_accel.ops.affine import Affine, Scheme

METHOD = "compressed-tensors"
FORMAT = "pack-quantized"
PRIVATE_METHOD = "hf_accel"
GROUP_MULTIPLE = 32  # groups the kernels can serve
SUFFIXES = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point")


def packed_shape(rows: int, columns: int, bits: int) -> tuple[int, int]:
    """Return the shape of int32 words that hold codes [rows, columns]."""
    return rows, -(-columns * bits // 32)


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Return int8 codes [rows, columns] of 4 or 8 bits as int32 [rows, words]."""
    rows, columns = codes.shape
    words = packed_shape(rows, columns, bits)[1]
    padded = torch.zeros(rows, words * 32 // bits, dtype=torch.uint8, device=codes.device)
    padded[:, :columns] = (codes.to(torch.int16) + (1 << bits - 1)).to(torch.uint8)
    if bits == 4:
        padded = padded[:, ::2] | padded[:, 1::2] << 4
    return _little(padded.contiguous()).view(torch.int32)


def unpack_codes(words: Tensor, bits: int, columns: int) -> Tensor:
    """Return the int8 codes [rows, columns] of int32 words [rows, words]."""
    values = _little(words.contiguous().view(torch.uint8))
    if bits == 4:
        values = torch.stack((values & 15, values >> 4), dim=-1).flatten(1)
    return (values[:, :columns].to(torch.int16) - (1 << bits - 1)).to(torch.int8)


def _little(values: Tensor) -> Tensor:
    """Bytes of 32-bit words, the lowest first, on machines of either order."""
    return values if sys.byteorder == "little" else values.view(len(values), -1, 4).flip(-1).reshape(len(values), -1)


def stored_names(scheme: Scheme) -> tuple[str, ...]:
    """Return the names of the tensors that a weight in `scheme` is stored as."""
    return SUFFIXES[:3] if scheme.symmetric else SUFFIXES


def stored_shapes(scheme: Scheme, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
    """Return name -> shape of the tensors that a weight [rows, columns] is stored as."""
    groups = columns // scheme.columns_per_scale(columns)
    shapes = (
        packed_shape(rows, columns, scheme.bits),
        (rows, groups),
        (2,),
        packed_shape(groups, rows, scheme.bits)[::-1],
    )
    return dict(zip(stored_names(scheme), shapes, strict=False))


def to_tensors(weight: Affine, scale_dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the tensors of a quantized weight; scales as `scale_dtype` where it holds them exactly, else fp32."""
    scales = weight.scales.to(scale_dtype)
    if not torch.equal(scales.float(), weight.scales.float()):
        scales = weight.scales.float()
    bits = weight.scheme.bits
    tensors = {
        "weight_packed": pack_codes(weight.codes, bits),
        "weight_scale": scales.contiguous(),
        "weight_shape": torch.tensor(weight.codes.shape, dtype=torch.int64),
    }
    if weight.zeros is not None:
        tensors["weight_zero_point"] = pack_codes(weight.zeros.T, bits).T.contiguous()
    return tensors


def from_tensors(tensors: Mapping[str, Tensor], scheme: Scheme, rows: int, columns: int) -> Affine:
    """Return the quantized weight [rows, columns] of tensors whose shapes were checked."""
    codes = unpack_codes(tensors["weight_packed"], scheme.bits, columns)
    zeros = None
    if not scheme.symmetric:
        zeros = unpack_codes(tensors["weight_zero_point"].T, scheme.bits, rows).T.contiguous()
    return Affine(codes, tensors["weight_scale"].clone(), zeros, scheme)


def to_config(schemes: Mapping[str, Scheme], ignore: Iterable[str], is_public: bool) -> dict[str, Any]:
    """Return the `quantization_config` of products with these schemes; every product is named in full."""
    names: dict[Scheme, list[str]] = {}
    for name, scheme in schemes.items():
        names.setdefault(scheme, []).append(name)
    groups = {}
    for index, (scheme, targets) in enumerate(names.items()):
        weights = {
            "num_bits": scheme.bits,
            "type": "int",
            "symmetric": scheme.symmetric,
            "strategy": "channel" if scheme.group_size is None else "group",
            "group_size": scheme.group_size,
            "dynamic": False,
        }
        groups[f"group_{index}"] = {
            "targets": targets, "weights": weights,
            "input_activations": None, "output_activations": None, "format": FORMAT,
        }  # fmt: skip
    return {
        "quant_method": METHOD if is_public else PRIVATE_METHOD,
        "format": FORMAT,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": list(ignore),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


class Rules:
    """Which module is stored in which scheme, read from a `quantization_config`.

    Raises:
        CheckpointError: it describes something else than weights of 4 or 8 bits in this layout.
    """

    def __init__(self, config: Mapping[str, Any], where: str) -> None:
        self.where = where
        method = config.get("quant_method")
        if method not in (METHOD, PRIVATE_METHOD):
            raise self._error(f"the quantization method {method!r}")
        if config.get("kv_cache_scheme"):
            raise self._error("a quantized key/value cache")
        if any(config.get(name) for name in ("sparsity_config", "transform_config", "moe_sparsity_config")):
            raise self._error("sparse or transformed weights")
        if config.get("quantization_status", "compressed") != "compressed":
            raise self._error(f"weights of the status {config['quantization_status']!r}")
        groups = config.get("config_groups")
        if not isinstance(groups, dict) or not groups or not all(isinstance(g, dict) for g in groups.values()):
            raise self._error("no config_groups that say how weights are stored")
        self.is_public = method == METHOD
        self.ignore = [str(name) for name in config.get("ignore") or ()]
        self._schemes: dict[str, Scheme] = {}
        for group in groups.values():
            layout = group.get("format") or config.get("format")
            if layout != FORMAT:
                raise self._error(f"weights in the format {layout!r}")
            scheme = self._scheme(group)
            self._schemes |= {str(target): scheme for target in group.get("targets") or ()}
        for target in [*self.ignore, *self._schemes]:
            try:
                _names(target, "")
            except re.error as error:
                raise self._error(f"modules by the pattern {target!r}, which is none ({error})") from error

    @property
    def targets(self) -> Iterable[str]:
        return self._schemes

    def scheme(self, name: str, module: Any) -> Scheme | None:
        """Return the scheme of the module called `name`: by its exact name, a pattern, or the name of its class."""
        if any(_names(target, name) or _is_class(target, module) for target in self.ignore):
            return None
        exact = self._schemes.get(name)
        if exact is not None:
            return exact
        for target in sorted(self._schemes):
            if _names(target, name):
                return self._schemes[target]
        for target in sorted(self._schemes):
            if _is_class(target, module):
                return self._schemes[target]
        return None

    def _scheme(self, group: Mapping[str, Any]) -> Scheme:
        for part in ("input_activations", "output_activations"):
            if group.get(part):
                raise self._error(f"quantized activations ({part})")
        weights = group.get("weights")
        if not isinstance(weights, dict):
            raise self._error("a group without a description of its weights")
        bits, kind, group_size = weights.get("num_bits"), weights.get("type", "int"), weights.get("group_size")
        strategy = weights.get("strategy") or {None: "tensor", -1: "channel"}.get(group_size, "group")
        if kind != "int" or bits not in (4, 8):
            raise self._error(f"weights of the type {kind!r} with {bits!r} bits")
        if weights.get("dynamic") or strategy not in ("channel", "group"):
            raise self._error(f"scales by the strategy {strategy!r}")
        if weights.get("actorder") in ("group", "dynamic", True):
            raise self._error("columns in the order of activations (actorder 'group')")
        if strategy == "channel":
            return Scheme(bits, None, weights.get("symmetric", True))
        if type(group_size) is not int or group_size <= 0 or group_size % GROUP_MULTIPLE:
            raise self._error(f"groups of {group_size!r} columns (multiples of {GROUP_MULTIPLE} are served)")
        return Scheme(bits, group_size, weights.get("symmetric", True))

    def _error(self, found: str) -> CheckpointError:
        return CheckpointError(
            f"{self.where} describes {found}. hf_accel reads weights of 4 or 8 bits in the {FORMAT!r} format of "
            f"{METHOD}; load the folder with AutoModelForCausalLM and the package of its own format."
        )


def _names(target: str, name: str) -> bool:
    return re.match(target[3:], name) is not None if target.startswith("re:") else target == name


def _is_class(target: str, module: Any) -> bool:
    return any(cls.__name__ == target for cls in type(module).__mro__)
