"""Chooses tokens at several positions of several rows at once, as plain decoding would choose them one by one.

Processors are applied per position to the tokens that precede it. That is what stock would do only for processors that
look at nothing else, so those of transformers that do are listed; with any other a call is decoded plainly.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers.generation import logits_process as stock

from hf_accel.core.calls.rows import Rows
from hf_accel.decoding.draws import Draws
from hf_accel.ops.acceptance import coupled

# look at the scores alone, so all positions go through them together
POINTWISE: frozenset[type] = frozenset(
    getattr(stock, name)
    for name in (
        "TemperatureLogitsWarper", "TopKLogitsWarper", "TopPLogitsWarper", "TopHLogitsWarper", "MinPLogitsWarper",
        "TypicalLogitsWarper", "EpsilonLogitsWarper", "EtaLogitsWarper", "SuppressTokensLogitsProcessor",
        "InfNanRemoveLogitsProcessor", "LogitNormalization",
    )
    if hasattr(stock, name)
)  # fmt: skip
# look at the row's own tokens, too
PREFIXWISE: frozenset[type] = frozenset(
    getattr(stock, name)
    for name in (
        "RepetitionPenaltyLogitsProcessor", "NoRepeatNGramLogitsProcessor", "NoBadWordsLogitsProcessor",
        "SequenceBiasLogitsProcessor", "MinLengthLogitsProcessor", "MinNewTokensLengthLogitsProcessor",
        "SuppressTokensAtBeginLogitsProcessor", "ForcedBOSTokenLogitsProcessor", "ForcedEOSTokenLogitsProcessor",
        "ExponentialDecayLengthPenalty", "WatermarkLogitsProcessor",
    )
    if hasattr(stock, name)
)  # fmt: skip


# what `choose` returns where there is nothing to draw from
NO_TOKEN = -1


def processor_objection(processors: Any) -> str | None:
    """Return the processor that cannot be applied position by position, None if all can."""
    for processor in processors:
        if type(processor) not in POINTWISE | PREFIXWISE:
            return f"{type(processor).__name__} may look at more than the tokens of its row"
    return None


def _for_row(processors: Any, row: int) -> stock.LogitsProcessorList:
    """Return the processors as row `row` of the batch has them."""
    found = stock.LogitsProcessorList()
    for processor in processors:
        padding = getattr(processor, "prompt_ignore_length", None)
        if isinstance(padding, torch.Tensor):  # of every row; the repetition penalty is not for padding
            processor = copy.copy(processor)
            processor.prompt_ignore_length = padding[row : row + 1]
        found.append(processor)
    return found


class Chooser:
    """Scores and tokens of one call. See `hf_accel.core.calls.drafting.Chooser`."""

    def __init__(self, processors: Any, samples: bool, rows: Rows, has_own_draws: bool = False) -> None:
        """has_own_draws: drafts and verification draw for themselves, not as plain decoding would."""
        self.processors, self.samples, self.rows = processors, samples, rows
        self.has_own_draws = samples and has_own_draws
        self.draws: Draws | None = None
        self._is_pointwise = all(type(processor) in POINTWISE for processor in processors)
        self._of_row = [] if self._is_pointwise else [_for_row(processors, row) for row in range(len(rows))]

    def score(self, logits: torch.Tensor, ahead: torch.Tensor | None = None) -> torch.Tensor:
        """Return the processed scores [B, T, V], fp32, of logits [B, T, V].

        ahead: [B, n], tokens that the rows are taken to go on with, n >= T - 1: the last of the T positions follows
        all of them, the one before it all but the last, and so on. None: T = 1, right at the ends of the rows.
        """
        scores = logits.to(dtype=torch.float32, copy=True)
        if not self.processors:
            return scores
        batch, tokens, vocabulary = scores.shape
        if self._is_pointwise:
            flat = self.processors(self.rows.ids[:1], scores.view(batch * tokens, vocabulary))
            return flat.view(batch, tokens, vocabulary)  # type: ignore[no-any-return]
        lines = []
        for row, length in enumerate(self.rows.lengths):
            ids: Any = self.rows.ids[row : row + 1, :length]
            if ahead is not None:
                ids = torch.cat([ids, ahead[row : row + 1]], dim=1)
            first = ids.shape[1] - tokens + 1
            apply = self._of_row[row]
            line = [apply(ids[:, : first + t], scores[row : row + 1, t]) for t in range(tokens)]
            lines.append(torch.cat(line))
        return torch.stack(lines)

    def choose(self, scores: torch.Tensor, ahead: int = 0) -> torch.Tensor:
        """Return the tokens [B, T] that plain decoding chooses from scores [B, T, V].

        ahead: how many tokens beyond the end of its row the first position of each row lies.
        """
        if not self.samples:
            return scores.argmax(dim=-1)
        if self.has_own_draws:
            flat = scores.softmax(dim=-1).flatten(0, 1)
            return torch.multinomial(flat, num_samples=1).view(scores.shape[:2])
        probabilities = scores.softmax(dim=-1)
        tokens = coupled(probabilities, self._exponentials(scores, ahead))
        # as argmax takes NaN for the largest: one look at what was chosen shows whether there was something to choose
        is_nan = probabilities.gather(2, tokens[:, :, None])[:, :, 0].isnan()
        return tokens.masked_fill_(is_nan, NO_TOKEN)

    def margins(self, scores: torch.Tensor) -> torch.Tensor:
        """Return by how much [B, T] each choice was made: between the best two scores, draws included in sampling."""
        if self.samples:
            scores = scores - self._exponentials(scores, 0).log()
        best = scores.topk(2, dim=-1).values
        return best[..., 0] - best[..., 1]

    def _exponentials(self, scores: torch.Tensor, ahead: int) -> torch.Tensor:
        """Return the draws [B, T, V] that plain decoding makes at these positions."""
        made = [self.rows.new_tokens(row) for row in range(len(self.rows))]
        live = [made[row] for row in self.rows.live()]
        if live:  # what is chosen for a row that has ended is not used: let it not ask for draws of long ago
            made = [max(count, min(live)) for count in made]
        if self.draws is None:
            self.draws = Draws(len(self.rows), scores.shape[-1], scores.device, min(made))
        self.draws.forget(min(made))
        return self.draws.rows([count + ahead for count in made], scores.shape[1])

    def finish(self, tokens: int) -> None:
        """Leave the random generator as plain decoding of `tokens` new tokens does."""
        if self.draws is not None:
            self.draws.finish(tokens)

    def pause(self) -> None:
        """Let plain steps draw for themselves; all rows that have not ended have as many tokens."""
        if self.draws is not None:
            self.draws.finish(self.rows.new_tokens(self.rows.live()[0]))
            self.draws = None
