"""What the three generations of FlashAttention have in common: how their packages are found and called.

Padded batches run with variable lengths: the rows' tokens one after the other, [sum of lengths, H, D], and where each
row begins (`cu_seqlens`), so that padding costs a copy and no arithmetic. Causal masks end in the lower right corner.
What a release can do beyond that is read from the signature of its functions.
"""

from __future__ import annotations

import importlib
from typing import Any, ClassVar

import torch
from torch.nn import functional

from hf_accel.attention.flash_packages import (
    FlashFunctions,
    failure,
    from_hub,
    functions_of,
    has_kernels,
    is_installed,
    parameters,
)
from hf_accel.attention.kernel import HALF, AttentionKernel
from hf_accel.attention.question import Question, Visible
from hf_accel.attention.ragged import packed, ragged_rows
from hf_accel.errors import described

MAX_HEAD_DIM = 256
SINKS = ("learnable_sink", "s_aux")  # the names that releases have for sinks


class FlashAttention(AttentionKernel):
    """One generation. module: what its package is imported as; hub: its kernel for the package `kernels`."""

    extra = "flash"
    module: ClassVar[str]
    hub: ClassVar[str]
    hub_version: ClassVar[int]
    capability: ClassVar[tuple[int, int]]  # the oldest cards that it runs on
    newest: ClassVar[int] = 99
    devices: tuple[str, ...] = ("cuda",)

    def is_tried(self, device: torch.device) -> bool:
        # kernels from the hub are loaded where they are asked for by name: that may download them
        return device.type in self.devices and is_installed(self.module)

    def missing(self) -> str | None:
        if is_installed(self.module):
            return failure(self.module)
        if not has_kernels():
            return f"neither the package {self.module} nor kernels (for {self.hub}) is installed"
        found = from_hub(self.hub, self.hub_version)
        return found if isinstance(found, str) else None

    def functions(self) -> FlashFunctions:
        """Return the package's functions. Raises: ImportError."""
        if is_installed(self.module):
            return functions_of(importlib.import_module(self.module))
        found = from_hub(self.hub, self.hub_version)
        if isinstance(found, str):
            raise ImportError(found)
        return functions_of(found)

    def obstacle(self, question: Question) -> str | None:
        if question.device.type not in self.devices:
            return f"FlashAttention is for CUDA, not for {question.device.type}"
        if question.device.type == "cuda":
            capability = torch.cuda.get_device_capability(question.device)
            if capability < self.capability or capability[0] > self.newest:
                name = torch.cuda.get_device_name(question.device)
                return f"it is not for a {name} (compute capability {capability[0]}.{capability[1]})"
        if question.dtype not in HALF:
            return f"it has no {str(question.dtype).removeprefix('torch.')}"
        if max(question.sizes) > MAX_HEAD_DIM or question.sizes[1] > question.sizes[0]:
            return f"heads of {question.sizes} values; it takes up to {MAX_HEAD_DIM}, values no larger than keys"
        if question.mask in ("boolean", "additive"):
            return "it takes no masks but causal ones, with padding and windows"
        try:
            options = self.functions().options
        except ImportError as error:
            return described(error)
        if question.softcap is not None and "softcap" not in options:
            return "this release caps no scores"
        if question.window is not None and "window_size" not in options:
            return "this release has no windows"
        return "this release has no sinks" if question.has_sinks and not options & {*SINKS} else None

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        visible: Visible,
        scale: float,
        softcap: float | None = None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        batched, ragged, options = self.functions()
        own: dict[str, Any] = {"softmax_scale": scale, "causal": visible.is_causal}
        if softcap is not None:
            own["softcap"] = softcap
        if visible.window is not None:
            own["window_size"] = (visible.window - 1, 0)  # columns to the left of a query's own
        if sinks is not None:
            own[next(name for name in SINKS if name in options)] = sinks.to(torch.bfloat16)
        size = value.shape[3]
        if size < query.shape[3]:
            value = functional.pad(value, (0, query.shape[3] - size))
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        if visible.starts is None or visible.band is None:
            return _output(batched(q, k, v, **own))[..., :size].contiguous()
        rows = ragged_rows(visible.band, query.device)
        lengths = {"max_seqlen_q": rows.most_queries, "max_seqlen_k": rows.most_columns}
        own |= {name: length for name, length in lengths.items() if name in parameters(ragged)}
        states = (packed(x, rows.queries if x is q else rows.columns) for x in (q, k, v))
        found = ragged(*states, cu_seqlens_q=rows.query_ends, cu_seqlens_k=rows.column_ends, **own)
        output = query.new_zeros((q.shape[0] * q.shape[1], q.shape[2], size))
        output.index_copy_(0, rows.queries, _output(found)[..., :size])
        return output.view(q.shape[0], q.shape[1], q.shape[2], size)


def _output(found: Any) -> torch.Tensor:
    """Return the output of a function that may return the log-sum-exp beside it."""
    return found[0] if isinstance(found, (tuple, list)) else found
