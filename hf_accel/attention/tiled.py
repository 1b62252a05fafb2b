"""The attention kernel `tiled`: the reference itself, which is right everywhere, on any device and in any dtype."""

from __future__ import annotations

import torch

from hf_accel.attention.kernel import AttentionKernel
from hf_accel.attention.question import Question, Visible
from hf_accel.ops.tiled import tiled_attention


class Tiled(AttentionKernel):
    """The reference: everything, and slowly."""

    name = "tiled"

    def is_tried(self, device: torch.device) -> bool:
        return False  # it is the reference, and never the fastest

    def obstacle(self, question: Question) -> str | None:
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
        starts = None if visible.starts is None or visible.band is None else visible.band.starts_tensor
        output, _ = tiled_attention(
            query, key, value, scale=scale, is_causal=visible.is_causal, window=visible.window, starts=starts,
            mask=visible.mask, softcap=softcap, sinks=sinks,
        )  # fmt: skip
        return output.transpose(1, 2).contiguous()
