"""`convert_qat`: products that were trained under fake quantization become packed ones, and nothing is rounded anew."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import nn

from hf_accel.core.calls.hosting import host_of
from hf_accel.core.journal import Journal
from hf_accel.core.model.anatomy import Anatomy
from hf_accel.core.model.support import unwrap
from hf_accel.errors import UnsupportedModelError, VerificationError
from hf_accel.kernels.weights import PackedWeight
from hf_accel.ops.fake_quantize import fake_quantized
from hf_accel.quantization.files.seal import Seal
from hf_accel.quantization.learned import LearnedCodes, check_product, trained_products
from hf_accel.quantization.modules.fake_linear import FakeQuantizedLinear
from hf_accel.quantization.modules.linear import QuantizedLinear
from hf_accel.quantization.qat import SECTION, QATConfig

M = TypeVar("M")


@torch.inference_mode(False)
@torch.no_grad()
def convert_qat(model: M) -> M:
    """Pack the products that were trained under a `QATConfig`, in place, and return the same object.

    Codes and scales are those that the forward pass of training computes with: each packed weight is compared with
    it and equals it bit for bit. What differs afterwards is the arithmetic of the kernels, which round activations
    (to 8 bits in blocks of 32 columns for weights of 4 bits and fewer, to 16 bits for weights of 8).

    `hf_accel.report(model)` tells how many codes changed, `hf_accel.save_pretrained` saves it. `hf_accel.restore`
    puts back the original weights and gives up the trained ones: save before. The trained weights in floating point
    are given up here. A copy (`copy.deepcopy`) of a model in training can be converted, too, and then is a model as
    `hf_accel.from_pretrained` returns it: it may be optimised, and has nothing to restore.

    Args:
        model: the model that `optimize(model, QATConfig(...))` prepared, or a PeftModel around one whose adapters are
            merged.

    Raises:
        UnsupportedModelError: nothing is in training, or nothing was trained; fake quantization is off in a product;
            weights or scales are NaN, infinite or 0; adapters are not merged. The model is as it was.
        VerificationError: a packed weight is not what training computed with. The model is as it was.
    """
    unwrapped: Any = unwrap(model)
    found = list(trained_products(unwrapped)) if isinstance(unwrapped, nn.Module) else []
    modules = {path: module for path, _, _, module in found}
    if wrapped := [path for path, parent, _, _ in found if hasattr(parent, "base_layer")]:
        raise UnsupportedModelError(
            f"{wrapped[0]} and {len(wrapped) - 1} more products have adapters beside them. Merge them before: "
            "model = model.merge_and_unload(); hf_accel.convert_qat(model)."
        )
    _check(unwrapped, modules)
    packed = {path: _packed(path, module) for path, module in modules.items()}
    learned = LearnedCodes.of(modules).fixed()
    host = host_of(unwrapped)
    journal = Journal() if host is None else host.journal
    for path, parent, name, module in found:
        product = QuantizedLinear(packed[path], module.bias, unwrapped.dtype).train(module.training)
        journal.replace_module(parent, name, product)
    journal.set_attribute(unwrapped, "hf_quantizer", Seal())
    if host is not None:
        report, after = host.report, Anatomy.of(unwrapped).weight_bytes
        text = (
            f"{len(found)} products trained and packed; weights {report.weight_bytes / 1e6:.1f} -> {after / 1e6:.1f} MB"
        )
        report.patched_weight_bytes = after
        report.sections[SECTION] = learned
        extra = 0 if journal.originals == "drop" else sum(weight.nbytes for weight in packed.values())
        report.applied = [
            replace(step, summary=text, extra_bytes=extra) if isinstance(step.config, QATConfig) else step
            for step in report.applied
        ]
    return model


def _check(model: Any, modules: dict[str, FakeQuantizedLinear]) -> None:
    if not modules:
        what = type(model).__name__
        raise UnsupportedModelError(
            f"No product of this {what} is in training under fake quantization. Call hf_accel.optimize(model, "
            "[hf_accel.QATConfig(bits=...)]) and train it before; to round without training, WeightOnlyConfig."
        )
    for path, module in modules.items():
        if not module.is_on:
            raise UnsupportedModelError(
                f"Fake quantization is off in {path}, so that its weight was trained for another computation than the "
                "one that is deployed. Set is_on = True in all products and train on."
            )
        check_product(path, module)
    if not any(bool(module.log_factors.any()) or _has_changed(module) for module in modules.values()):
        raise UnsupportedModelError(
            f"Not one code and not one scale of {len(modules)} products differs from the start: nothing was trained. "
            "An optimizer made before hf_accel.optimize trains weights that are no longer in the model; make it after."
        )


def _has_changed(module: FakeQuantizedLinear) -> bool:
    return not torch.equal(module.affine().codes, module.start_codes)


def _packed(path: str, module: FakeQuantizedLinear) -> PackedWeight:
    """Return the packed weight of a product, which equals what training computes with bit for bit."""
    packed = PackedWeight.pack(module.affine())
    trained = fake_quantized(
        module.weight, module.start_scales, module.log_factors, module.zeros, module.scheme, module.scale_dtype,
        torch.float32,
    )  # fmt: skip
    if not torch.equal(packed.dequantize(), trained):
        raise VerificationError(
            f"The packed weight of {path} is not the one that training computed with; the model is as it was."
        )
    return packed
