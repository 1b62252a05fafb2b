"""Takes over a model that transformers loaded through the compressed-tensors package: its codes, on our kernels.

That package expands all weights at the first forward pass; here they stay as small as they are stored. Cost: as the
codes; the stock modules stay beside them unless originals="drop".
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from hf_accel.core.calls.hosting import Host
from hf_accel.core.config import Config
from hf_accel.core.steps.patcher import Change, Fidelity, Patcher, Stage
from hf_accel.core.steps.setting import Setting
from hf_accel.errors import CheckpointError
from hf_accel.kernels import native
from hf_accel.kernels.weights import PackedWeight
from hf_accel.ops.affine import Affine, Scheme, dequantize
from hf_accel.quantization.files.formats import FORMAT, METHOD, from_tensors, stored_names, stored_shapes
from hf_accel.quantization.files.mxfp4 import PackMxfp4
from hf_accel.quantization.files.rules import Rules
from hf_accel.quantization.files.seal import Seal
from hf_accel.quantization.modules.linear import QuantizedLinear

_HOOK = "ct_decompress_hook"  # the model's handle on the hook that expands its weights


@dataclass(frozen=True, kw_only=True)
class CompressedTensorsConfig(Config):
    """Products that transformers loaded from a compressed-tensors checkpoint run on our kernels, on the same codes.

    Close, not exact: our kernels round activations (to 16 bits for weights of 8 bits, to 8 bits for weights of 4).
    """


class CompressedTensorsPatcher(Patcher[CompressedTensorsConfig], config=CompressedTensorsConfig):
    stage = Stage.WEIGHTS
    fidelity = Fidelity.CLOSE
    occupies = "weights"

    def obstacles(self, setting: Setting) -> list[str]:
        anatomy = setting.anatomy
        found = _compressed(anatomy.model)
        if not found:
            return ["the model was not loaded from a compressed-tensors checkpoint; no product of it has codes."]
        if anatomy.dtype not in native.DTYPES:
            return [f"products of {anatomy.dtype} have no kernels; load the model in bfloat16, float16 or float32."]
        problems = []
        for path, _, _, module in found:
            try:
                _weight(path, module)
            except CheckpointError as error:
                problems.append(str(error))
        return problems

    def patch(self, setting: Setting, host: Host) -> Change:
        anatomy, journal = setting.anatomy, host.journal
        model = anatomy.model
        before = anatomy.weight_bytes
        found = _compressed(model)
        for path, parent, name, module in found:
            packed = PackedWeight.pack(_weight(path, module))
            journal.swap_module(
                parent, name, QuantizedLinear(packed, module.bias, anatomy.dtype).train(module.training)
            )
        if (handle := vars(model).get(_HOOK)) is not None and handle.id in model._forward_pre_hooks:
            # it would expand the originals, of which there may be none, and take itself off for good
            hook = model._forward_pre_hooks.pop(handle.id)
            journal.did(partial(model._forward_pre_hooks.__setitem__, handle.id, hook))
        journal.set_attribute(model, "hf_quantizer", Seal())
        after = anatomy.weight_bytes
        return Change(
            f"{len(found)} products of a {METHOD} checkpoint; weights {before / 1e6:.1f} -> {after / 1e6:.1f} MB",
            extra_bytes=0 if journal.originals == "drop" else after,
            weight_bytes=after,
        )


def _compressed(model: nn.Module) -> list[tuple[str, nn.Module, str, Any]]:
    """Return path, parent, name and module of everything that the package has given a scheme."""
    return [
        (f"{path}.{name}" if path else name, parent, name, module)
        for path, parent in model.named_modules()
        for name, module in parent._modules.items()
        if getattr(module, "quantization_scheme", None) is not None
    ]


def _weight(path: str, module: Any) -> Affine:
    """Return codes, scales and zeros of a module, packed or expanded by the package.

    Raises:
        CheckpointError: it is no linear product with packed weights, or its weight was changed since.
    """
    linear: Any = module
    if not isinstance(module, nn.Linear):
        raise CheckpointError(f"{path} is a {type(module).__name__}; only linear products are taken over.")
    description = linear.quantization_scheme.model_dump(mode="json")
    group = description | {"targets": [path], "format": description.get("format") or FORMAT}
    rules = Rules({"quant_method": METHOD, "config_groups": {"group": group}}, path)
    layout = rules.layout(path, module)
    rows, columns = module.out_features, module.in_features
    scheme = None if layout is None else layout.scheme
    if isinstance(layout, PackMxfp4):
        raise CheckpointError(
            f"{path} is in MXFP4; load it by hf_accel.from_pretrained, which takes its bits as they are."
        )
    if layout is not None and layout.has_order and isinstance(getattr(module, "weight_g_idx", None), torch.Tensor):
        raise CheckpointError(
            f"{path} has groups of columns in an order of its own; load it by hf_accel.from_pretrained."
        )
    if scheme is None or columns % scheme.columns_per_scale(columns):
        raise CheckpointError(f"{path} has {columns} columns, which its groups do not divide.")
    tensors: dict[str, Any] = {name: getattr(module, name, None) for name in stored_names(scheme)}
    tensors = {name: tensor.detach() for name, tensor in tensors.items() if isinstance(tensor, torch.Tensor)}
    if "weight_packed" not in tensors:
        return _recovered(path, module, scheme)
    shapes = stored_shapes(scheme, rows, columns)
    for name, shape in shapes.items():
        if name not in tensors or tuple(tensors[name].shape) != shape:
            raise CheckpointError(f"{path}.{name} has not the shape {shape} that its scheme asks for.")
    return from_tensors(tensors, scheme, rows, columns)


def _recovered(path: str, module: Any, scheme: Scheme) -> Affine:
    """Return the codes of a weight that was expanded: dividing by the scales finds them, which is checked."""
    weight, scales = getattr(module, "weight", None), getattr(module, "weight_scale", None)
    zeros = getattr(module, "weight_zero_point", None)
    if weight is None or scales is None or (zeros is None and not scheme.symmetric):
        raise CheckpointError(f"{path} has neither packed codes nor a weight with its scales; load the model anew.")
    weight, scales = weight.detach(), scales.detach()
    rows, columns = weight.shape
    shared = scales.float()[..., None]
    codes = torch.round(weight.float().reshape(rows, scales.shape[1], -1) / torch.where(shared == 0, 1.0, shared))
    kept = None if scheme.symmetric or zeros is None else zeros.detach().to(torch.int8).contiguous()
    if kept is not None:
        codes = codes + kept[..., None]
    codes = codes.clamp_(scheme.lowest, scheme.highest).to(torch.int8).reshape(rows, columns)
    found = Affine(codes, scales.clone(), kept, scheme)
    if not torch.equal(dequantize(found, weight.dtype), weight):
        raise CheckpointError(f"{path}: its weight is not what codes and scales stand for (changed since loading?).")
    return found
