"""Writing packed weights as GPTQ and AutoRound do: which labels and rules describe them, and in which dtype scales are.

Tensors and labels are those of a symmetric or asymmetric checkpoint of these programs; negative scales are no exception
(AutoRound writes them, too). Cost: a pass over the scales.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from hf_accel.errors import UnsupportedModelError
from hf_accel.kernels.weights import PackedWeight, scale_values
from hf_accel.ops.affine import Scheme
from hf_accel.quantization.files import gptq
from hf_accel.quantization.files.description import GPTQ_FILE
from hf_accel.quantization.files.foreign import AUTOROUND, GPTQ, GPTQ_LABELS
from hf_accel.quantization.files.inventory import Inventory
from hf_accel.quantization.files.zeros import V1, V2

ENCODINGS = (*GPTQ_LABELS, AUTOROUND)
_JOINT = {("q_proj", "k_proj", "v_proj"): "qkv_proj", ("gate_proj", "up_proj"): "gate_up_proj"}
_NUMBERED = re.compile(r"\.\d+\.")


class GptqEncoding:
    """Writes the weights of an inventory in the tensors of GPTQ, described as `format`, one of `ENCODINGS`.

    Raises:
        UnsupportedModelError: a weight does not fit.
    """

    def __init__(self, found: Inventory, kind: str, format: str) -> None:
        self.found, self.format = found, format
        self.version = GPTQ_LABELS.get(format, V2)
        for name, weight in found.packed.items():
            if reason := self._misfit(name, weight):
                way = "head=None" if name == found.head else f"layers={{{name!r}: None}}"
                raise UnsupportedModelError(
                    f"This {kind} cannot be saved in the format {format!r}: {name} has {reason}, or quantize with "
                    f"{way}."
                )
        self.scale_dtypes = _scale_dtypes(found)
        self.base = Counter(weight.scheme for weight in found.packed.values()).most_common(1)[0][0]

    @property
    def packed(self) -> Iterable[str]:
        return self.found.packed

    @property
    def plain(self) -> dict[str, Tensor]:
        return self.found.plain

    @property
    def files(self) -> dict[str, dict[str, Any]]:
        """Return name -> content of files to write beside the config."""
        return {} if self.format == AUTOROUND else {GPTQ_FILE: self.config()}

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Return full name -> tensor of the packed weight called `name`, made on the spot."""
        made = gptq.to_tensors(
            self.found.packed[name].unpack(), self.found.orders.get(name), self.scale_dtypes[name], self.version
        )
        return {f"{name}.{suffix}": made[suffix] for suffix in self.sizes(name)}

    def sizes(self, name: str) -> dict[str, int]:
        """Return suffix -> bytes of the tensors of the packed weight called `name`."""
        weight = self.found.packed[name]
        sizes = gptq.stored_bytes(weight.scheme, weight.rows, weight.columns, self.scale_dtypes[name])
        if self.format == AUTOROUND:
            del sizes["g_idx"]
        return sizes

    def config(self) -> dict[str, Any]:
        """Return the `quantization_config` that describes the weights."""
        return self._autoround_config() if self.format == AUTOROUND else self._gptq_config()

    def _gptq_config(self) -> dict[str, Any]:
        found, config = self.found, _described(self.base)
        is_ordered = bool(found.orders)
        config |= {
            "desc_act": is_ordered,
            "lm_head": found.head in found.packed,
            "quant_method": GPTQ,
            "checkpoint_format": self.format,
            "pack_dtype": "int32",
            "true_sequential": False,
        }
        own: dict[str, dict[str, Any]] = {
            name: _described(weight.scheme) for name, weight in found.packed.items() if weight.scheme != self.base
        }
        own |= {name: {} for name in found.ignore if name != found.head}
        own |= _fused(own)
        rules = {f"{'+' if values else '-'}:^{re.escape(name)}$": values for name, values in own.items()}
        return config | {"dynamic": rules} if rules else config

    def _autoround_config(self) -> dict[str, Any]:
        found = self.found
        blocks = {name[: match.start()]: None for name in found.packed if (match := _NUMBERED.search(name))}
        extra: dict[str, dict[str, Any]] = {
            name: _described(weight.scheme) | {"data_type": "int"}
            for name, weight in found.packed.items()
            if weight.scheme != self.base or not _NUMBERED.search(name)
        }
        extra |= {name: {"bits": 16, "act_bits": 16} for name in found.ignore if name.startswith(tuple(blocks))}
        config = _described(self.base) | {
            "data_type": "int",
            "quant_method": AUTOROUND,
            "packing_format": "auto_round",
            "block_name_to_quantize": ",".join(blocks),
        }
        return config | {"extra_config": extra} if extra else config

    def _misfit(self, name: str, weight: PackedWeight) -> str:
        scheme = weight.scheme
        if weight.rows % gptq.MULTIPLE or weight.columns % gptq.MULTIPLE:
            return (
                f"{weight.rows} rows and {weight.columns} columns, and its words hold multiples of {gptq.MULTIPLE} of "
                "both. Save with format=None"
            )
        if scheme.code_book:
            return "MXFP4, and its words hold whole numbers next to one another. Save with format=None"
        if self.version == V1 and not (scheme.symmetric and scheme.bits in (4, 8)):
            kind = f"{scheme.bits} bits" + ("" if scheme.symmetric else " and zeros of its own")
            return f"{kind}; version 1 is written for symmetric weights of 4 and 8 bits. Save with format='gptq_v2'"
        if self.format == AUTOROUND and name in self.found.orders:
            return "groups of columns in an order of its own, which AutoRound does not read. Save with format='gptq_v2'"
        return ""


def _described(scheme: Scheme) -> dict[str, Any]:
    return {"bits": scheme.bits, "group_size": scheme.group_size or -1, "sym": scheme.symmetric}


def _fused(rules: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the rules of siblings that share one under the name of their joint product, by which vLLM asks for it."""
    found = {}
    for name, values in rules.items():
        parent, _, leaf = name.rpartition(".")
        for leaves, joint in _JOINT.items():
            if leaf == leaves[0] and all(rules.get(f"{parent}.{other}") == values for other in leaves):
                found[f"{parent}.{joint}"] = values
    return found


def _scale_dtypes(found: Inventory) -> dict[str, torch.dtype]:
    """Return name -> the dtype that holds all its scales exactly: the model's if that is a half, else fp16, bf16, fp32.

    Of the halves, the one that holds the scales of more weights is asked first: readers expect one dtype throughout.
    """
    fits = {
        name: [dtype for dtype in (torch.float16, torch.bfloat16) if _holds(dtype, weight.scales)]
        for name, weight in found.packed.items()
    }
    counts = Counter(dtype for dtypes in fits.values() for dtype in dtypes)
    preferred = found.dtype if found.dtype in counts else max(counts, key=counts.__getitem__, default=torch.float32)
    return {name: preferred if preferred in dtypes else [*dtypes, torch.float32][0] for name, dtypes in fits.items()}


def _holds(dtype: torch.dtype, bits: Tensor) -> bool:
    values = scale_values(bits)
    return torch.equal(values.to(dtype).float(), values)
