"""The attention kernel `cudnn`: cuDNN's fused attention through torch, row by row where a batch is padded."""

from __future__ import annotations

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from hf_accel.attention.kernel import HALF, AttentionKernel
from hf_accel.attention.question import Question, Visible
from hf_accel.attention.sdpa import by_rows

MAX_HEAD_DIM = 128


class Cudnn(AttentionKernel):
    """cuDNN through torch, for whole prompts in half precision."""

    name = "cudnn"
    devices: tuple[str, ...] = ("cuda",)

    def is_tried(self, device: torch.device) -> bool:
        return device.type in self.devices

    def missing(self) -> str | None:
        return None if torch.backends.cudnn.is_available() else "torch was built without cuDNN"

    def obstacle(self, question: Question) -> str | None:
        if question.device.type not in self.devices:
            return f"cuDNN is for {' and '.join(self.devices)}, not for {question.device.type}"
        if question.dtype not in HALF:
            return f"it has no {str(question.dtype).removeprefix('torch.')}"
        if max(question.sizes) > MAX_HEAD_DIM or any(size % 8 for size in question.sizes):
            return f"heads of {question.sizes} values; it takes multiples of 8 up to {MAX_HEAD_DIM}"
        if question.softcap is not None or question.has_sinks:
            return "it has neither soft caps nor sinks"
        if question.mask not in ("causal", "padded") or question.window is not None or not question.is_square:
            return f"it takes whole prompts, padded or not, and no other masks ({question.kind})"
        return None

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
        with sdpa_kernel([SDPBackend.CUDNN_ATTENTION]):
            return by_rows(query, key, value, visible, scale)
