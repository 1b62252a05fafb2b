"""The attention kernel `flex`: torch's FlexAttention, which skips the blocks that a mask hides.

The block mask of a band is made once for a pass and serves all its layers. Soft caps change the scores; sinks are
added afterwards, by the log-sum-exp. `auto` does not try it: on CUDA each kind of mask is compiled, for seconds;
elsewhere it runs as it is written, with scores of every pair in memory, to be looked at and not to be fast.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.nn.attention import flex_attention as torch_flex

from hf_accel.attention.kernel import AttentionKernel
from hf_accel.attention.question import Question, Visible
from hf_accel.ops.tiled import with_sinks


class Flex(AttentionKernel):
    """FlexAttention: causal masks with padding, windows, soft caps and sinks."""

    name = "flex"

    def is_tried(self, device: torch.device) -> bool:
        return False  # each kind of mask compiles for seconds

    def obstacle(self, question: Question) -> str | None:
        if question.mask in ("boolean", "additive"):
            return "masks that are given as a whole have no blocks that are known"
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
        run = _compiled() if query.is_cuda else torch_flex.flex_attention
        output, lse = _with_lse(
            run, query, key, value, score_mod=_cap(softcap), block_mask=_block_mask(visible, query, key), scale=scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )  # fmt: skip
        if sinks is not None:
            output, _ = with_sinks(output, lse, sinks)
        output = output.transpose(1, 2).contiguous()
        for b, start in enumerate(visible.starts or ()):
            output[b, : max(0, start - key.shape[2] + query.shape[2])] = 0
        return output


@functools.cache
def _compiled() -> Any:
    return torch.compile(torch_flex.flex_attention)


def _with_lse(run: Any, *args: Any, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return output and log-sum-exp [B, H, T]; torch asks for it by another name since 2.9."""
    if (request := getattr(torch_flex, "AuxRequest", None)) is not None:
        output, auxiliary = run(*args, **options, return_aux=request(lse=True))
        return output, auxiliary.lse
    output, lse = run(*args, **options, return_lse=True)
    return output, lse


@functools.lru_cache(16)
def _cap(softcap: float | None) -> Any:
    if softcap is None:
        return None

    def cap(score: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        return softcap * torch.tanh(score / softcap)

    return cap


def _block_mask(visible: Visible, query: torch.Tensor, key: torch.Tensor) -> Any:
    band, tokens, positions = visible.band, query.shape[2], key.shape[2]
    if band is None:
        return _causal(tokens, query.device) if visible.is_causal else None
    if Flex not in band.kept:
        past, window = positions - tokens, visible.window or positions
        starts = band.starts_tensor.to(query.device)

        def sees(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
            end = q + past
            return (column <= end) & (column > end - window) & (column >= starts[b])

        rows = query.shape[0] if band.is_padded else None
        band.kept[Flex] = torch_flex.create_block_mask(sees, rows, None, tokens, positions, device=str(query.device))
    return band.kept[Flex]


@functools.lru_cache(4)
def _causal(tokens: int, device: torch.device) -> Any:
    def sees(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
        return column <= q

    return torch_flex.create_block_mask(sees, None, None, tokens, tokens, device=str(device))
