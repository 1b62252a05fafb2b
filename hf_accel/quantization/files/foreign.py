"""What GPTQ, AutoRound and AWQ say of a checkpoint in its `quantization_config` or beside it, in new names and old.

Which products are packed is seen from the tensors; the description says in how many bits and groups. Labels that are
not known are refused by name: layouts of other kernels have the same shapes and would be read as noise.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, ClassVar

from hf_accel.errors import CheckpointError
from hf_accel.quantization.files import awq, gptq
from hf_accel.quantization.files.awq import Awq
from hf_accel.quantization.files.bitstream import WIDTHS
from hf_accel.quantization.files.checkpoint import Checkpoint
from hf_accel.quantization.files.gptq import Gptq
from hf_accel.quantization.files.layout import Layout
from hf_accel.quantization.files.zeros import V1, V2, Zeros

GPTQ, AWQ, AUTOROUND = "gptq", "awq", "auto-round"
GPTQ_LABELS = {"gptq": V1, "gptq_v2": V2}
_AWQ_VERSIONS = {"gemm": False, "gemv": True}
_V1_PACKINGS = ("auto", "auto_round:auto_gptq", "auto_round:gptq")  # of AutoRound
_V2_PACKINGS = ("auto_round", "auto_round:gptqmodel")
_AWQ_PACKINGS = ("auto_round:auto_awq", "auto_round:awq")
_INTEGERS = (None, "int", "int_sym", "int_asym")
_OLD_NAMES = {"w_bit": "bits", "q_group_size": "group_size", "format": "checkpoint_format"}
_MOST_BITS = 8  # AutoRound says of products that stay as they are that they have more


def normalised(description: Mapping[str, Any]) -> dict[str, Any]:
    """Return a description with the names of today beside those it has."""
    found = dict(description)
    for old, name in _OLD_NAMES.items():
        if found.get(name) is None and description.get(old) is not None:
            found[name] = description[old]
    if found.get("sym") is None and type(found.get("zero_point")) is bool:
        found["sym"] = not found["zero_point"]
    return found


class Foreign:
    """The description of a checkpoint whose products are stored in the tensors of GPTQ or AWQ.

    Raises:
        CheckpointError: it describes a layout, or a number of bits, that is not served.
    """

    is_public = True
    names: ClassVar[tuple[str, ...]] = ("qweight", "qzeros", "scales")

    def __init__(self, description: Mapping[str, Any], where: str) -> None:
        self.where = where
        self.values = normalised(description)
        self.bits, self.group_size = self._bits(self.values.get("bits")), self._group(self.values.get("group_size", -1))
        self._check(self.values)

    def layout(self, name: str, module: Any, checkpoint: Checkpoint) -> Layout | None:
        """Return how the module called `name` is stored, None for one that is not packed.

        Raises:
            CheckpointError: it is packed, and the description says that it is not.
        """
        if not any(f"{name}.{suffix}" in checkpoint for suffix in self.names):
            return None
        overrides = self._overrides(name, checkpoint)
        if overrides is None:
            raise checkpoint.damaged(f"{name}.qweight", f"{self.where} says that it is not quantized")
        return self._layout(overrides)

    def _check(self, values: Mapping[str, Any]) -> None:
        raise NotImplementedError

    def _overrides(self, name: str, checkpoint: Checkpoint) -> Mapping[str, Any] | None:
        """Return what is said of one product alone; None: that it stays as it is."""
        return {}

    def _layout(self, overrides: Mapping[str, Any]) -> Layout:
        raise NotImplementedError

    def _bits(self, bits: Any) -> int:
        if type(bits) is not int or bits not in WIDTHS:
            raise self._error(f"weights of {bits!r} bits")
        return bits

    def _group(self, group_size: Any) -> int | None:
        if type(group_size) is not int or (group_size < 1 and group_size != -1):
            raise self._error(f"groups of {group_size!r} columns")
        return None if group_size == -1 else group_size

    def _flag(self, value: Any, name: str) -> bool | None:
        if value is not None and type(value) is not bool:
            raise self._error(f"{name}={value!r}, which is neither true nor false")
        return value

    def _error(self, found: str) -> CheckpointError:
        return CheckpointError(
            f"{self.where} describes {found}. Of GPTQ's layouts hf_accel reads 'gptq' and 'gptq_v2' in 2, 3, 4 and 8 "
            "bits, of AWQ's 'gemm' and 'gemv', of AutoRound's these; load the folder with the package that wrote it."
        )


class GptqDescription(Foreign):
    """The description that AutoGPTQ, optimum, GPTQModel and AutoRound (`auto_gptq`) write."""

    names = gptq.SUFFIXES

    def _check(self, values: Mapping[str, Any]) -> None:
        label = values.get("checkpoint_format") or "gptq"
        for found in ("marlin" if values.get("is_marlin_format") else label, values.get("format") or label):
            if not isinstance(found, str) or found not in GPTQ_LABELS:
                raise self._error(f"the GPTQ layout {found!r}")
            if found != label:
                raise self._error(f"both the GPTQ layout {label!r} and {found!r}")
        if values.get("pack_dtype", "int32") not in ("int32", "torch.int32"):
            raise self._error(f"codes in words of {values['pack_dtype']!r}")
        meta = values.get("meta")
        self.is_static = values.get("static_groups") is True or (
            isinstance(meta, dict) and meta.get("static_groups") is True
        )
        self.zeros = Zeros(GPTQ_LABELS[label])
        dynamic = values.get("dynamic") or {}
        if not isinstance(dynamic, dict) or not all(isinstance(value, dict) for value in dynamic.values()):
            raise self._error("rules (`dynamic`) that are no JSON objects")
        self.rules = [(pattern[:2], self._pattern(pattern), value) for pattern, value in dynamic.items()]
        self._layout({})
        for _, _, value in self.rules:
            self._layout(value)

    def _pattern(self, pattern: str) -> re.Pattern[str]:
        try:
            return re.compile(pattern.removeprefix("-:").removeprefix("+:"))
        except re.error as error:
            raise self._error(f"modules by {pattern!r}, which is not a valid regular expression ({error})") from error

    def _overrides(self, name: str, checkpoint: Checkpoint) -> Mapping[str, Any] | None:
        for kind, pattern, values in self.rules:
            if pattern.match(name):
                return None if kind == "-:" else values
        return {}

    def _layout(self, overrides: Mapping[str, Any]) -> Layout:
        values = self.values | normalised(overrides)
        return Gptq(
            self._bits(values.get("bits")),
            self._group(values.get("group_size", -1)),
            self._flag(values.get("sym"), "sym"),
            self._flag(values.get("desc_act"), "desc_act") is True and not self.is_static,
            self.zeros,
        )


class AutoRoundDescription(Foreign):
    """The description that AutoRound writes (`quant_method="auto-round"`)."""

    names = gptq.SUFFIXES

    def _check(self, values: Mapping[str, Any]) -> None:
        packing = values.get("packing_format") or values.get("backend") or "auto"
        if not isinstance(packing, str):
            raise self._error(f"the packing format {packing!r}")
        # names of before `packing_format` ended in the kernels that were to run them: auto_round:gptq:exllamav2
        is_v1 = packing in _V1_PACKINGS or packing.startswith(("auto_round:gptq:", "auto_round:auto_gptq:"))
        self.is_awq = packing in _AWQ_PACKINGS
        if not (is_v1 or self.is_awq or packing in _V2_PACKINGS):
            raise self._error(f"AutoRound's packing format {packing!r}")
        if any(values.get(name) for name in ("rotation_config", "spinquant_config", "transform_config")):
            raise self._error("rotated weights")
        self.zeros = Zeros(V1 if is_v1 else V2)
        extra = values.get("extra_config") or {}
        if not isinstance(extra, dict) or not all(isinstance(value, dict) for value in extra.values()):
            raise self._error("rules (`extra_config`) that are no JSON objects")
        self.rules: dict[str, Any] = extra
        self._layout({})
        self.patterns = [(pattern, value) for name, value in extra.items() if (pattern := _compiled(name)) is not None]
        for value in self.rules.values():
            if not _is_skipped(value):
                self._layout(value)

    def _overrides(self, name: str, checkpoint: Checkpoint) -> Mapping[str, Any] | None:
        found: Mapping[str, Any] | None = self.rules.get(name)
        if found is None:
            # full names are patterns, too, but of no other module: `mlp.gate` is not meant to match `mlp.gate_proj`
            others = (
                (pattern, value) for pattern, value in self.patterns if not _is_module(pattern.pattern, checkpoint)
            )
            found = next((value for pattern, value in others if pattern.search(name)), {})
        return None if _is_skipped(found) else found

    def _layout(self, overrides: Mapping[str, Any]) -> Layout:
        values = self.values | dict(overrides)
        if values.get("data_type") not in _INTEGERS:
            raise self._error(f"weights of the type {values['data_type']!r}")
        if values.get("act_bits") not in (None, 16, 32):
            raise self._error(f"activations of {values['act_bits']!r} bits")
        bits, group = self._bits(values.get("bits")), self._group(values.get("group_size", -1))
        if self.is_awq:
            if bits != awq.BITS:
                raise self._error(f"AWQ weights of {bits} bits")
            return Awq(group, is_gemv=False)
        symmetric = self._flag(values.get("sym"), "sym")
        return Gptq(bits, group, symmetric, False, self.zeros)


class AwqDescription(Foreign):
    """The description that AutoAWQ, LLM-AWQ and AutoRound (`auto_awq`) write."""

    def _check(self, values: Mapping[str, Any]) -> None:
        version = values.get("version", "gemm")
        if not isinstance(version, str) or version.lower() not in _AWQ_VERSIONS:
            raise self._error(f"the AWQ layout {version!r}")
        if self.bits != awq.BITS:
            raise self._error(f"AWQ weights of {self.bits} bits")
        self.is_gemv = _AWQ_VERSIONS[version.lower()]

    def _layout(self, overrides: Mapping[str, Any]) -> Layout:
        return Awq(self.group_size, self.is_gemv)


def _is_skipped(overrides: Mapping[str, Any]) -> bool:
    bits = overrides.get("bits")
    return type(bits) is int and bits > _MOST_BITS


def _is_module(name: str, checkpoint: Checkpoint) -> bool:
    return any(f"{name}.{suffix}" in checkpoint for suffix in ("weight", "qweight"))


def _compiled(name: str) -> re.Pattern[str] | None:
    try:
        return re.compile(name)
    except re.error:
        return None
