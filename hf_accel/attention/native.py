"""The attention kernel `native`: prompts by the C library on CPUs, in tiles, without padding and what windows hide."""

from __future__ import annotations

import torch

from hf_accel.attention.kernel import AttentionKernel
from hf_accel.attention.question import Question, Visible
from hf_accel.kernels import native
from hf_accel.kernels.native.prompt import prompt_attention


class Native(AttentionKernel):
    """The C library: all but summands, on CPUs."""

    name = "native"

    def missing(self) -> str | None:
        return None if native.is_available() else f"the native library is not there: {native.status().reason}"

    def obstacle(self, question: Question) -> str | None:
        if question.device.type != "cpu":
            return f"it is for CPUs, not for {question.device.type}"
        if question.dtype not in native.DTYPES:
            return f"it has no {str(question.dtype).removeprefix('torch.')}"
        if max(question.sizes) > native.MAX_HEAD_DIM:
            return f"heads have {max(question.sizes)} values, it takes {native.MAX_HEAD_DIM}"
        if question.mask == "additive":
            return "it takes masks that hide, not summands"
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
        query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
        starts = None if visible.starts is None or visible.band is None else visible.band.starts_tensor
        return prompt_attention(
            query, key, value, (query.shape[3], value.shape[3]), scale=scale, softcap=softcap,
            is_causal=visible.is_causal, window=visible.window, starts=starts, mask=visible.mask,
            sinks=None if sinks is None else sinks.float(),
        )  # fmt: skip
