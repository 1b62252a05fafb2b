"""Chooses tokens from logits: the only place that applies processors and draws, for plain steps and verified ones.

Plain decoding takes one position of every row, by `next_tokens`. Verification takes several positions of several rows
at once, by `Chooser`, and chooses what plain decoding would choose there one by one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from hf_accel.core.calls.call import Call
from hf_accel.core.calls.forward import StepOutputs
from hf_accel.core.calls.present import Present
from hf_accel.core.calls.rows import Rows
from hf_accel.core.calls.seeding import DRAWS, generator_on
from hf_accel.decoding.draws import Draws
from hf_accel.decoding.processors import are_pointwise, for_row
from hf_accel.decoding.selecting import selected
from hf_accel.ops.acceptance import coupled

# what `Chooser.choose` returns where there is nothing to draw from
NO_TOKEN = -1


@dataclass
class NextTokens:
    """The next token of every row, [B], with what it was chosen from where that is kept: [B, V] each, fp32."""

    tokens: torch.Tensor
    scores: torch.Tensor | None
    logits: torch.Tensor | None
    outputs: Any = None  # of the forward pass, with attentions and hidden states


def next_tokens(outputs: Any, input_ids: torch.Tensor, call: Call, present: Present | None = None) -> NextTokens:
    """Choose from the outputs of a forward pass as stock does, in its precision; input_ids: [B, S], all so far.

    present: the rows that the outputs are of, None: all. What is chosen for the others means nothing.
    """
    if present is not None and not present.is_whole:
        if not (call.generation_config.do_sample or call.logits_processor):
            found = next_tokens(outputs, input_ids, call)
            return NextTokens(present.spread(found.tokens), None, None, outputs)
        # processors and draws are of all rows
        outputs = StepOutputs(logits=present.spread(outputs.logits[:, -1:]))
    config = call.generation_config
    collects = config.return_dict_in_generate and (config.output_scores or config.output_logits)
    if isinstance(outputs, StepOutputs) and not (config.do_sample or call.logits_processor or collects):
        chosen: Any = outputs.choices
        return NextTokens(chosen[:, -1].to(device=input_ids.device, copy=True), None, None, outputs)
    if not collects and (config.do_sample or call.logits_processor):
        tokens = selected(outputs.logits[:, -1], input_ids, call.logits_processor, config.do_sample)
        if tokens is not None:
            return NextTokens(tokens, None, None, outputs)
    logits = outputs.logits[:, -1].to(device=input_ids.device, dtype=torch.float32, copy=True)
    scores = call.logits_processor(input_ids, logits)
    return NextTokens(choose_token(scores, call.generation_config.do_sample), scores, logits, outputs)


def choose_token(scores: torch.Tensor, samples: bool) -> torch.Tensor:
    """Return tokens [...] for processed scores [..., V]: the best ones, or sampled by the draws that stock makes.

    Raises:
        RuntimeError: there is nothing to sample from, as a score is NaN.
    """
    return draw(scores.softmax(dim=-1)) if samples else best(scores)


def best(scores: torch.Tensor) -> torch.Tensor:
    """Return the index [...] of the largest of scores [..., V]: the first of equal ones, NaN before all others.

    On a CPU by numpy, which takes a tenth of the time: torch's own takes 70 µs for 128,256 scores.
    """
    if type(scores) is torch.Tensor and scores.is_cpu and scores.dtype is torch.float32 and not scores.requires_grad:
        return torch.from_numpy(np.asarray(scores.numpy().argmax(axis=-1)))
    return scores.argmax(dim=-1)


def draw(probabilities: torch.Tensor) -> torch.Tensor:
    """Return a random index [...] for each distribution of probabilities [..., V]."""
    if probabilities.dim() != 2:
        rows = probabilities.reshape(-1, probabilities.shape[-1])
        return draw(rows).view(probabilities.shape[:-1])
    with DRAWS:
        return torch.multinomial(probabilities, num_samples=1, generator=generator_on(probabilities.device)).squeeze(1)


class Chooser:
    """Chooses the tokens of one call, several positions at a time. See `hf_accel.core.calls.drafting.TokenChooser`."""

    def __init__(self, processors: Any, samples: bool, rows: Rows, has_own_draws: bool = False) -> None:
        """has_own_draws: drafts and verification draw for themselves, not as plain decoding would."""
        self.processors, self.samples, self.rows = processors, samples, rows
        self.has_own_draws = samples and has_own_draws
        self.draws: Draws | None = None
        self._is_pointwise = are_pointwise(processors)
        self._of_row = [] if self._is_pointwise else [for_row(processors, row) for row in range(len(rows))]

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
        """Return the tokens [B, T] that plain decoding chooses from scores [B, T, V]; NO_TOKEN where it would raise.

        ahead: how many tokens beyond the end of its row the first position of each row lies.
        """
        if not self.samples or self.has_own_draws:
            return choose_token(scores, self.samples)
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
