"""Whole prompts of a length that a thread has not had yet, on GPUs where torch would ask cuDNN.

cuDNN makes a plan for each shape before it first runs it, in every thread anew. On an H100 (torch 2.11) that took 45 to
75 ms, at 64 tokens as at 16,000, so that a prompt of a new length waited two to four times as long for its first token.
FlashAttention, which torch brings along, plans nothing, but takes up to twice as long per call from 1,000 tokens on. So
it serves a shape until what that has cost comes to a plan; torch's choice serves it from then on.
"""

from __future__ import annotations

import threading

import torch
from torch.nn.attention import SDPBackend

from hf_accel.attention.question import Visible
from hf_accel.attention.torch_flash import flash_attention, is_usable

PAIRS = 1e11
"""Queries times keys times heads of 128 values after which FlashAttention has cost a plan: 5e-13 s each on an H100."""
MOST_SHAPES = 4096  # of a thread that are remembered

_fused_choice = getattr(torch, "_fused_sdp_choice", None)


class FirstUse:
    """Serves these prompts; remembers, by thread, what was spent on each shape."""

    def __init__(self) -> None:
        self._of_thread = threading.local()

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, visible: Visible, scale: float
    ) -> torch.Tensor | None:
        """Return causal attention [B, T, H, D] of query [B, H, T, D] over T columns; None: others are to be asked."""
        batch, heads, tokens, size = query.shape
        is_whole = visible.is_causal and visible.starts is None and visible.window is None
        if not is_whole or visible.mask is not None or tokens != key.shape[2] or tokens == 1:
            return None
        if torch.are_deterministic_algorithms_enabled() or (torch.is_grad_enabled() and query.requires_grad):
            return None
        spent: dict[object, float] = self._of_thread.__dict__.setdefault("spent", {})
        shape = (query.shape, key.shape[1], value.shape[3], query.dtype, query.device)
        if shape not in spent:
            if len(spent) >= MOST_SHAPES:
                spent.clear()
            spent[shape] = 0.0 if is_planned(query, key, value) and is_usable(query, value) else PAIRS
        if spent[shape] >= PAIRS:
            return None
        spent[shape] += batch * heads * tokens * tokens * size / 128
        try:
            return flash_attention(query, key, value, visible, scale)
        except RuntimeError:  # torch's choice is asked, and raises what is to be raised
            spent[shape] = PAIRS
            return None


def is_planned(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Return whether torch would have cuDNN do the causal attention of a whole prompt."""
    if not query.is_cuda or _fused_choice is None:
        return False
    try:
        chosen = _fused_choice(query, key, value, None, 0.0, True, enable_gqa=query.shape[1] != key.shape[1])
    except (RuntimeError, TypeError):  # a release that has it otherwise
        return False
    return int(chosen) == SDPBackend.CUDNN_ATTENTION.value
