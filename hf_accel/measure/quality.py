"""What a lossy change costs in quality: KL divergence per token, agreement of the likeliest token, perplexity.

The distributions of the original model on some text are kept (fp32, tokens x vocabulary) and compared with the changed
model's on the same text. Kullback-Leibler divergence D(original || changed) in nats is the extra code length per token
of text that the original writes; it is 0 only for equal distributions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

_KEPT_BYTES = 512 << 20  # of kept distributions; longer text is cut
_MOST_NATS = 700.0  # a loss whose perplexity is still a number


@dataclass(frozen=True)
class Quality:
    """Means over `tokens` predicted tokens of `source`; perplexities only where the text is not the model's own.

    note: a sentence on the text, where it does not seem to be the model's, or "".
    against: what the model is compared with, where that is not the original, or "".
    """

    kl: float
    top1_agreement: float
    perplexity_before: float | None
    perplexity_after: float | None
    tokens: int
    source: str
    note: str = ""
    against: str = ""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        text = f"KL {self.kl:.2g} nats per token, likeliest token equal at {100 * self.top1_agreement:.1f} %"
        if self.perplexity_before is not None and self.perplexity_after is not None:
            text += f", perplexity {self.perplexity_before:.3f} -> {self.perplexity_after:.3f}"
        text += f"; {self.tokens} tokens of {self.source}"
        text += f"; against {self.against}" if self.against else ""
        return text + (f"; {self.note}" if self.note else "")


@dataclass(frozen=True)
class CalibrationText:
    """Token ids [B, T] without padding, and where they come from. `is_own`: the model wrote them itself."""

    ids: Tensor
    source: str
    is_own: bool

    def split(self, batch: int = 1) -> tuple[CalibrationText, CalibrationText]:
        """Return the text to fit to, and about a fifth to measure on: whole batches of rows, or the ends of few."""
        rows, tokens = self.ids.shape
        measured = max(1, round(rows / (5 * batch))) * batch
        if measured < rows:
            parts = self.ids[:-measured], self.ids[-measured:]
        else:
            parts = self.ids[:, : -max(2, tokens // 5)], self.ids[:, -max(2, tokens // 5) :]
        fitted, rest = (CalibrationText(part, self.source, self.is_own) for part in parts)
        return fitted, rest


class Comparison:
    """Sums over positions, from which the means of a `Quality` are made."""

    def __init__(self) -> None:
        self.kl = self.agreement = self.before = self.after = 0.0
        self.count = 0

    def add(self, old: Tensor, new: Tensor, targets: Tensor) -> None:
        """Add positions: log-probabilities of both models [N, V], and the tokens that came [N]."""
        terms = torch.where(old == -math.inf, torch.zeros_like(old), old.exp() * (old - new))
        self.kl += float(terms.sum(dim=-1).double().sum())
        self.agreement += float((old.argmax(dim=-1) == new.argmax(dim=-1)).sum())
        self.before -= float(old.gather(1, targets[:, None]).double().sum())
        self.after -= float(new.gather(1, targets[:, None]).double().sum())
        self.count += len(targets)

    def quality(self, source: str, is_own: bool) -> Quality:
        """Return the means over what was added, of text from `source`; `is_own`: the model wrote it itself."""
        before, after = (math.exp(min(loss / self.count, _MOST_NATS)) for loss in (self.before, self.after))
        return Quality(
            kl=self.kl / self.count,
            top1_agreement=self.agreement / self.count,
            perplexity_before=None if is_own else before,
            perplexity_after=None if is_own else after,
            tokens=self.count,
            source=source,
        )


class QualityReference:
    """The distributions of a model on a text, before it is changed."""

    def __init__(self, model: Any, text: CalibrationText) -> None:
        self.model, self.text = model, text
        self.ids = text.ids.to(model.device)
        vocabulary = int(model.config.get_text_config(decoder=True).vocab_size)
        rows = max(1, _KEPT_BYTES // (4 * vocabulary * max(1, self.ids.shape[1] - 1)))
        self.ids = self.ids[:rows]
        self.kept = list(self._distributions(model))

    @torch.no_grad()
    def _distributions(self, model: Any) -> Iterator[Tensor]:
        """Yield log-probabilities [T - 1, V] of the next token, row by row."""
        for row in self.ids:
            logits = model(row[None], use_cache=False).logits[0, :-1]
            yield torch.log_softmax(logits.float(), dim=-1)

    def compare(self) -> Quality:
        """Return what the model's distributions now cost against those kept."""
        return self.of(self.model)

    def of(self, model: Any) -> Quality:
        """Return what the distributions of another model with the same vocabulary cost against those kept."""
        total = Comparison()
        for row, old, new in zip(self.ids, self.kept, self._distributions(model), strict=True):
            total.add(old, new, row[1:])
        found = total.quality(self.text.source, self.text.is_own)
        vocabulary = self.kept[0].shape[-1]
        if found.perplexity_before is None or found.perplexity_before <= vocabulary:
            return found
        return replace(
            found,
            note=f"the original predicts this text worse than chance (perplexity {found.perplexity_before:.0f} of "
            f"{vocabulary} tokens): its tokens may be another tokenizer's",
        )
