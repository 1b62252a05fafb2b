"""Which module of a compressed-tensors checkpoint is stored in which scheme, read from its `quantization_config`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from hf_accel.errors import CheckpointError
from hf_accel.ops import fp4
from hf_accel.ops.affine import Scheme
from hf_accel.quantization.files import mxfp4
from hf_accel.quantization.files.bitstream import WIDTHS
from hf_accel.quantization.files.checkpoint import Checkpoint
from hf_accel.quantization.files.formats import FORMAT, METHOD, PRIVATE_METHOD
from hf_accel.quantization.files.mxfp4 import PackMxfp4
from hf_accel.quantization.files.pack_quantized import PackQuantized

GROUP_MULTIPLE = 32  # groups the kernels can serve


class Rules:
    """The rules of a `quantization_config`: by them `layout` says how a module is stored.

    Raises:
        CheckpointError: it describes something else than weights of 2, 3, 4 or 8 bits in this layout.
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
        self._schemes: dict[str, PackQuantized | PackMxfp4] = {}
        for group in groups.values():
            layout = group.get("format") or config.get("format")
            if layout not in (FORMAT, mxfp4.FORMAT):
                raise self._error(f"weights in the format {layout!r}")
            scheme = self._scheme(group, layout == mxfp4.FORMAT)
            self._schemes |= {str(target): scheme for target in group.get("targets") or ()}
        for target in [*self.ignore, *self._schemes]:
            try:
                _names(target, "")
            except re.error as error:
                raise self._error(
                    f"modules by the pattern {target!r}, which is not a valid regular expression ({error})"
                ) from error

    @property
    def targets(self) -> Iterable[str]:
        return self._schemes

    def layout(self, name: str, module: Any, checkpoint: Checkpoint | None = None) -> PackQuantized | PackMxfp4 | None:
        """Return the layout of the module called `name`: by its exact name, a pattern, or the name of its class."""
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

    def _scheme(self, group: Mapping[str, Any], is_mxfp4: bool) -> PackQuantized | PackMxfp4:
        for part in ("input_activations", "output_activations"):
            if group.get(part):
                raise self._error(f"quantized activations ({part})")
        weights = group.get("weights")
        if not isinstance(weights, dict):
            raise self._error("a group without a description of its weights")
        bits, kind, group_size = weights.get("num_bits"), weights.get("type", "int"), weights.get("group_size")
        strategy = weights.get("strategy") or {None: "tensor", -1: "channel"}.get(group_size, "group")
        if is_mxfp4 and (kind, bits, group_size, strategy) == ("float", 4, fp4.GROUP, "group"):
            return PackMxfp4()
        if is_mxfp4 or kind != "int" or bits not in WIDTHS:
            raise self._error(f"weights of the type {kind!r} with {bits!r} bits")
        if weights.get("dynamic") or strategy not in ("channel", "group"):
            raise self._error(f"scales by the strategy {strategy!r}")
        has_order = weights.get("actorder") in ("group", "dynamic", True)
        if strategy == "channel":
            return PackQuantized(Scheme(bits, None, weights.get("symmetric", True)), has_order)
        if type(group_size) is not int or group_size <= 0 or group_size % GROUP_MULTIPLE:
            raise self._error(f"groups of {group_size!r} columns (multiples of {GROUP_MULTIPLE} are served)")
        return PackQuantized(Scheme(bits, group_size, weights.get("symmetric", True)), has_order)

    def _error(self, found: str) -> CheckpointError:
        return CheckpointError(
            f"{self.where} describes {found}. hf_accel reads weights of 2, 3, 4 or 8 bits in the {FORMAT!r} format "
            f"of {METHOD}, and in {mxfp4.FORMAT!r}; load the folder with AutoModelForCausalLM and the package of "
            "its own format."
        )


def _names(target: str, name: str) -> bool:
    return re.match(target[3:], name) is not None if target.startswith("re:") else target == name


def _is_class(target: str, module: Any) -> bool:
    return any(cls.__name__ == target for cls in type(module).__mro__)
