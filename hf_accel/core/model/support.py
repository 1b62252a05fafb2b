"""What can be optimised: the model inside wrappers, and why others are refused."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_accel.errors import UnsupportedModelError


def unwrap(model: Any) -> Any:
    """Return the transformers model inside a PeftModel or a pipeline; anything else as it is."""
    for name in ("get_base_model",):
        if callable(getattr(model, name, None)):
            return unwrap(getattr(model, name)())
    if not isinstance(model, nn.Module) and isinstance(getattr(model, "model", None), nn.Module):
        return unwrap(model.model)
    return model


def check_supported(model: Any) -> None:
    """Raise UnsupportedModelError, which says what to do, for what cannot generate token by token here."""
    name = type(model).__name__
    if isinstance(model, torch._dynamo.eval_frame.OptimizedModule):
        raise UnsupportedModelError(
            f"hf_accel was given what torch.compile made of a {type(model._orig_mod).__name__}. Optimise first, "
            "compile after: hf_accel.optimize(model), then torch.compile(model)."
        )
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(
            f"hf_accel optimises transformers models, PeftModels around them and pipelines; it was given {name}. "
            "Pass the model that `AutoModelForCausalLM.from_pretrained` returns."
        )
    if model.config.is_encoder_decoder:
        raise UnsupportedModelError(
            f"{name} is an encoder-decoder model; hf_accel optimises decoder-only models so far. Use it as it is."
        )
    if not callable(getattr(model, "generate", None)) or not model.can_generate():
        raise UnsupportedModelError(
            f"{name} has no `generate`. Load the model with its language-modelling head, "
            "for example by `AutoModelForCausalLM.from_pretrained`."
        )
    if any(p.device.type == "meta" for p in model.parameters()):
        raise UnsupportedModelError(
            f"{name} has weights on the meta device (not loaded, or offloaded by a device_map). "
            "Load all weights into memory first."
        )
    if _is_split(model):
        raise UnsupportedModelError(
            f"{name} is split by a device_map ({getattr(model, 'hf_device_map', 'accelerate hooks on its modules')}). "
            "Load it on one device, without device_map."
        )
    if getattr(model, "_pp_stage", None) is not None or getattr(model, "_tp_size", None) not in (None, 1):
        raise UnsupportedModelError(f"{name} is sharded over processes (tensor or pipeline parallel). Use it as it is.")


def _is_split(model: PreTrainedModel) -> bool:
    """Return whether accelerate has put parts of the model on several devices, or moves them while it runs."""
    devices = {parameter.device for parameter in model.parameters()}
    places = {str(place) for place in (getattr(model, "hf_device_map", None) or {}).values()}
    hooks = [hook for module in model.modules() for hook in _parts(getattr(module, "_hf_hook", None))]
    moves = any(getattr(hook, "offload", False) for hook in hooks) or "disk" in places
    targets = {torch.device(d) for hook in hooks if (d := getattr(hook, "execution_device", None)) is not None}
    return moves or len(devices | {_with_index(target) for target in targets}) > 1 or len(places) > 1


def _parts(hook: Any) -> list[Any]:
    return [] if hook is None else [part for inner in getattr(hook, "hooks", ()) for part in _parts(inner)] or [hook]


def _with_index(device: torch.device) -> torch.device:
    return torch.device("cuda", 0) if device.type == "cuda" and device.index is None else device


def foreign_inputs(model: Any) -> str | None:
    """Return who stands between the caller's tokens and what `model` is given in this call, None if nobody does."""
    owner = getattr(vars(model).get("prepare_inputs_for_generation"), "__self__", None)
    if owner is None or owner is model:
        return None
    if getattr(getattr(owner, "active_peft_config", None), "is_prompt_learning", False):
        return "peft's virtual tokens stand before the prompt"
    return f"a {type(owner).__name__} prepares the model's inputs"
