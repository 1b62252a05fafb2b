"""Whether a step runs on fake tensors, which have shapes but no data: then nothing depends on data or the host."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)

from hf_accel.compilation.slots import Slot
from hf_accel.compilation.step import StaticStep
from hf_accel.compilation.step_layers import AskedForLength

_log = logging.getLogger("torch._subclasses.fake_tensor")


def trace_obstacle(model: Any, slot: Slot, tokens: int) -> str | None:
    """Return what in a step of `tokens` tokens asks the device or has a size that depends on data, None if nothing.

    Asked only of models on the CPU whose modules are torch's and transformers' own: kernels of others would take the
    addresses of fake tensors for real ones. On CUDA devices a capture shows the same.
    """
    if model.device.type != "cpu" or not all(map(_is_plain, list(model.modules())[1:])):
        return None
    before = _log.level
    _log.setLevel(logging.CRITICAL + 1)  # it logs what is raised, too
    try:
        run_on_fakes(model, slot, tokens)
    except DataDependentOutputException as error:
        return f"a step of it waits for the device ({error.func})"
    except DynamicOutputShapeException as error:
        return f"a size in a step of it depends on data ({error.func})"
    except AskedForLength as error:
        return str(error)
    except Exception:  # operations that are not defined on fake tensors
        return None
    finally:
        _log.setLevel(before)
    return None


def _is_plain(module: torch.nn.Module) -> bool:
    """Return whether a module runs code of torch's and transformers' alone, or of the user's, but no kernel of ours."""
    own = getattr(vars(module).get("forward"), "__module__", "")
    return own.partition(".")[0] != "hf_accel" and all(
        kind.__module__.partition(".")[0] in ("torch", "transformers", "builtins") for kind in type(module).__mro__
    )


def run_on_fakes(model: Any, slot: Slot, tokens: int) -> None:
    """Run a step over fake buffers like those of `slot`. Raises: whatever keeps it from running so."""
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
        fake = Slot(slot.rows, slot.capacity, slot.fill.bits, slot.device)
        for index, layer in slot.layers.items():
            shapes = [
                torch.empty((slot.rows, kept.shape[1], 0, size), dtype=dtype, device=slot.device)
                for kept, size, dtype in zip((layer.keys, layer.values), layer.sizes, layer.dtypes, strict=True)
            ]
            fake.layer(index, layer.sliding_window, *shapes)
        StaticStep(model, fake, tokens).run_and_advance()
