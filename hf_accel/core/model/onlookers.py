"""Who beside a model's own modules may see how many rows a pass has."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.modules import module as torch_module

from hf_accel.core.model.watching import are_hooked

# whose modules compute each row by itself, and keep nothing of a pass that has rows; adapters by rows come with hooks
LIBRARIES = frozenset({"torch", "transformers", "hf_accel", "peft"})


def onlooker(model: Any, rows: int) -> str | None:
    """Return who may see the rows of a pass through `model`, None if nobody does. Cost: some microseconds per module.

    Hooks, forwards set from outside, modules of classes of the user's, what was compiled for a number of rows, and
    modules that keep something of each of the `rows` from pass to pass, as those of RecurrentGemma do.
    """
    modules = list(model.modules())
    hooks = [hook for each in modules for hook in (each._forward_hooks, each._forward_pre_hooks) if hook]
    everywhere = [torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks]
    if are_hooked(hooks + everywhere):
        return "a hook of the model may see the rows of a pass"
    for module in modules:
        held = vars(module)
        if held.get("_compiled_call_impl") is not None or isinstance(module, torch._dynamo.OptimizedModule):
            return "a module is compiled for the rows of the batch"
        if "forward" in held:
            return f"the forward of a {type(module).__name__} is not its class's"
        if any(_is_of_rows(value, rows) for value in held.values()):
            return f"a {type(module).__name__} keeps something of each row"
        if type(module).__module__.partition(".")[0] not in LIBRARIES:
            return f"a {type(module).__name__} is of none of the libraries that are known to take each row by itself"
    return None


def _is_of_rows(value: Any, rows: int) -> bool:
    if isinstance(value, torch.Tensor):
        return value.dim() > 1 and value.shape[0] == rows
    return isinstance(value, (list, tuple)) and any(_is_of_rows(each, rows) for each in value)
