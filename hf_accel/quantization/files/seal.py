"""Saving a model whatever its weights are, and the seal that keeps other code from saving packed weights wrongly.

Cost: the seal is an attribute; saving keeps one shard in memory, 5 GB unless asked otherwise.
"""

from __future__ import annotations

import copy
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion
from transformers.quantizers.base import HfQuantizer

from hf_accel.errors import ConfigError, UnsupportedModelError
from hf_accel.quantization.files.integrity import changed_values, stamp
from hf_accel.quantization.files.inventory import Inventory, take_inventory, written
from hf_accel.quantization.files.rebuilding import loaded_names
from hf_accel.quantization.files.saving import unshared, write
from hf_accel.quantization.modules.embedding import QuantizedEmbedding
from hf_accel.quantization.modules.fake_linear import FakeQuantizedLinear
from hf_accel.quantization.modules.linear import QuantizedLinear
from hf_accel.quantization.modules.permuted import PermutedLinear

# options of transformers' save_pretrained that change nothing where there is no adapter and nothing is uploaded
_WITHOUT_EFFECT = {"save_peft_format", "save_original_format", "safe_serialization", "token"}


def save_pretrained(model: Any, folder: str | os.PathLike[str], *, format: str | None = None, **options: Any) -> None:
    """Save a model so that `hf_accel.from_pretrained(folder)` computes the same bits.

    With packed weights the folder is a compressed-tensors checkpoint (`pack-quantized`) where that format can hold the
    model, and otherwise in a layout that only `hf_accel.from_pretrained` opens. Without, it is what the model's own
    `save_pretrained` writes.

    Args:
        model: a transformers model, optimised or not.
        folder: created if need be; weights in it are replaced.
        format: of packed weights. None: as above. "compressed-tensors", or else an error. "gptq": version 1, for
            symmetric weights of 4 and 8 bits. "gptq_v2": any. "auto-round": any whose groups are of adjacent columns.
            These three take products of multiples of 32 rows and columns, and no packed embeddings. "mxfp4": models
            whose experts, and nothing else, are in MXFP4, as gpt-oss checkpoints are published.
        options: of transformers' `save_pretrained`; with packed weights `max_shard_size` and `is_main_process`.

    Raises:
        UnsupportedModelError: parts of the model, as those of an adapter, cannot be saved with packed weights, or not
            in this format; or its products are in training under fake quantization.
        ConfigError: an option that cannot be served with packed weights, or a format that does not exist.
        CheckpointError: the folder holds weights that stock code would take for those of this model, or is a file.
    """
    seal = getattr(model, "hf_quantizer", None)
    if isinstance(seal, Seal) and not getattr(model, "_hf_peft_config_loaded", False):
        seal.save_packed(model, folder, format=format, **options)
        return
    if any(isinstance(module, FakeQuantizedLinear) for module in getattr(model, "modules", list)()):
        raise UnsupportedModelError(
            f"Products of this {type(model).__name__} are in training in few bits; stock code would load their "
            "weights and not round them. Call hf_accel.convert_qat(model) and save then; to go on training later, "
            "keep model.state_dict()."
        )
    if format is None:
        model.save_pretrained(folder, **options)
    else:
        raise UnsupportedModelError(
            f"The format {format!r} is one of packed weights, and this {type(model).__name__} has none to save. Leave "
            "format out, or quantize the model first."
        )


class Seal(HfQuantizer):
    """Stands as `hf_quantizer` in a model with packed weights and goes with its copies, so that stock code saves them
    in the published layout where that can hold them, and refuses with the way out where it cannot."""

    requires_calibration = False

    def __init__(self) -> None:
        # what transformers and peft read of a quantizer's config
        self.quantization_config = SimpleNamespace(quant_method="hf_accel")  # type: ignore[assignment]
        self.pre_quantized = True

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return True  # adapters beside the packed weights

    def is_serializable(self) -> bool:
        return True

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor] | None, dict[str, Any]]:
        """Return the tensors to save, and describe them in the model's config, which is saved after this call.

        Raises:
            UnsupportedModelError: the published layout cannot hold the model.
        """
        if getattr(model, "_hf_peft_config_loaded", False):
            return None, {}  # only the adapter is saved
        found = take_inventory(model)
        reason = found.private_reason or _reverted(model, found)
        config = copy.deepcopy(model.config)
        config.dtype, config.architectures = found.saved_config.dtype, found.saved_config.architectures
        config.quantization_config = found.config()
        changed = changed_values(written(found.saved_config), written(config))
        if reason or changed:
            raise UnsupportedModelError(
                f"The packed weights of this {type(model).__name__} do not fit a published format "
                f"({reason or changed[0] + ' of its config is not what the model is'}). "
                "Save it by hf_accel.save_pretrained(model, folder)."
            )
        state = dict(found.plain)
        for name in found.packed:
            state |= found.tensors(name)
        state = unshared(state)
        model.config.quantization_config = _Passing(model.config, found.config())
        return state, stamp(written(config), state)

    def dequantize(self, model: Any, dtype: Any = None) -> Any:
        """Refuse: the codes are all there is of the weights.

        Raises:
            UnsupportedModelError: always.
        """
        raise UnsupportedModelError(
            f"The packed weights of this {type(model).__name__} are not unpacked; hf_accel.restore(model) puts the "
            "original weights back where they were kept."
        )

    def check_resize(self, model: Any, rows: int | None, multiple: int | None) -> None:
        """Refuse to resize the vocabulary of an optimised model whose table or head is packed.

        Raises:
            UnsupportedModelError: it is, and would get another number of rows; the model has not changed.
        """
        for module in (model.get_input_embeddings(), model.get_output_embeddings()):
            if not isinstance(module, (QuantizedEmbedding, QuantizedLinear, PermutedLinear)):
                continue
            here = module.weight.shape[0]
            wanted = -(-(rows or here) // (multiple or 1)) * (multiple or 1)
            if wanted != here:
                raise UnsupportedModelError(
                    f"A vocabulary of {wanted} tokens was asked for; the {type(module).__name__} of this "
                    f"{type(model).__name__} and its original have rows for {here}. Resize before optimising: "
                    "hf_accel.restore(model), resize, and optimise again."
                )

    def save_packed(
        self,
        model: Any,
        folder: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: Any = None,
        push_to_hub: bool = False,
        max_shard_size: int | str = "5GB",
        format: str | None = None,
        **options: Any,
    ) -> None:
        """Save in the published layout or our own; takes the arguments of transformers' `save_pretrained`.

        Raises: as `save_pretrained`.
        """
        for name, value in {"state_dict": state_dict, "push_to_hub": push_to_hub, **options}.items():
            if name not in _WITHOUT_EFFECT and value is not None and value is not False:
                raise ConfigError(
                    f"save_pretrained with {name!r} is not served for packed weights; leave it out. "
                    "To publish the folder, upload it with huggingface_hub.upload_folder."
                )
        if not isinstance(folder, (str, os.PathLike)) or not os.fspath(folder):
            raise ConfigError(f"A model is saved into a folder, named by a text or a path; {folder!r} was given.")
        if is_main_process:
            write(model, Path(folder), max_shard_size, format)


class _Passing:
    """Stands as `quantization_config` until transformers has saved the config, then puts back what was there before."""

    def __init__(self, owner: Any, content: dict[str, Any]) -> None:
        self.owner, self.content = owner, content
        self.before = vars(owner).get("quantization_config")
        self.reads = 1 if self.before is None else 2  # transformers asks twice where one is left

    def __deepcopy__(self, memo: Any) -> dict[str, Any]:
        return copy.deepcopy(self.content, memo)

    def to_dict(self) -> dict[str, Any]:
        self.reads -= 1
        if not self.reads:
            if self.before is None:
                del self.owner.quantization_config
            else:
                self.owner.quantization_config = self.before
        return self.content


def _reverted(model: Any, found: Inventory) -> str:
    """Return why what transformers stores under names of its own would not come back under the model's, or ""."""
    names = found.shapes().keys()
    stored = revert_weight_conversion(model, {name: torch.empty(0, device="meta") for name in names}).keys()
    lost = names - set(loaded_names(model, stored).values())
    return f"transformers stores {min(lost)} under a name that does not lead back" if lost else ""
