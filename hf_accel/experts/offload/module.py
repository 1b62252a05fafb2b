"""The forward of a module whose experts lie in a file."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hf_accel.core.journal import beneath
from hf_accel.experts.offload.guard import Guard
from hf_accel.experts.offload.rounds import computed
from hf_accel.experts.offload.slots import Slots
from hf_accel.experts.offload.stored import StoredExperts


class Offloaded:
    """Marks modules whose `forward` is an `offloaded_forward`; all else is as the class it is mixed over does.

    `slots` is of the class that is made for a module. Copies, pickles and saved files take the weights out of the
    mapped file, once it is known to be whole.
    """

    slots: Slots

    def __getstate__(self) -> Any:
        self.slots.file.check()
        return beneath(Offloaded, self, "__getstate__")()

    def _save_to_state_dict(self, *args: Any, **options: Any) -> None:
        self.slots.file.check()
        beneath(Offloaded, self, "_save_to_state_dict")(*args, **options)


def offloaded_forward(stored: StoredExperts, guard: Guard, slots: Slots) -> Callable[..., Tensor]:
    """Return the `forward` of a module whose experts are `stored`, as long as `guard` holds.

    All is bound here and not read from the module, whose class another thread may put back while this runs.
    """

    def forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        if not _fits(stored, hidden_states, top_k_index, top_k_weights) or not guard.holds(self):
            slots.file.check()
            stored.handed_on += 1
            return beneath(Offloaded, self, "forward")(hidden_states, top_k_index, top_k_weights)  # type: ignore[no-any-return]
        return computed(stored, slots, hidden_states, top_k_index, top_k_weights)

    return forward


def _fits(stored: StoredExperts, hidden: Tensor, ids: Tensor, weights: Tensor) -> bool:
    return (
        not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and not torch.is_autocast_enabled("cpu")
        and hidden.dtype is stored.dtype
        and hidden.is_cpu
        and hidden.dim() == 2
        and ids.dim() == 2
        and ids.dtype is torch.int64
        and weights.shape == ids.shape
        and weights.dtype in (stored.dtype, torch.float32)
    )
