"""What an attention kernel is: what it can do, why it cannot do the rest, and how it is called."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch

from hf_accel.attention.question import Question, Visible

HALF = (torch.bfloat16, torch.float16)


class AttentionKernel(ABC):
    """One way to compute attention, by the name that `AttentionConfig.backend` has for it.

    extra: the extra of hf-accel that installs what it needs. is_tried: whether `auto` times it; the others run where
    they are named, or where nothing before them in the ladder can do a call.
    """

    name: ClassVar[str]
    extra: ClassVar[str | None] = None

    def is_tried(self, device: torch.device) -> bool:
        """Return whether `auto` may choose it on this device."""
        return True

    def missing(self) -> str | None:
        """Return what is not installed here, in a sentence; None if nothing is missing."""
        return None

    @abstractmethod
    def obstacle(self, question: Question) -> str | None:
        """Return why it does not answer a question, in words; None if it does."""

    @abstractmethod
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
        """Return attention [B, T, H, Dv], contiguous, of query [B, H, T, D] over key [B, G, S, D], value [B, G, S, Dv].

        Queries of padding see nothing, and are given zeros. softcap, sinks: as `hf_accel.ops.tiled` has them.
        """
