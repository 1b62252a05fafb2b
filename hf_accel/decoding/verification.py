"""Steps of several tokens: drafts are verified in one forward pass, and each row accepts its own number of them.

Every position of a verified step gets the token that plain decoding would choose there: the argmax, or the winner of
the draws that plain decoding makes at that token (`Draws`). A draft is accepted where it *is* that token, so the text
does not depend on drafts at all. Where draws of its own are asked for, sampled drafts are instead accepted with the
ratio of their probabilities and replaced from the residual (`ops.acceptance`). Rows advance apart; tokens leave here in
step, one per row, as stock's loop would bring them, so that criteria, streamers and outputs see what they would see
without speculation. Cost: one forward pass of B (k + 1) rows per step, and a few operations on [B, k + 1, V].
"""

from __future__ import annotations

import time
from collections import deque
from typing import Any

import torch
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

from hf_accel.core.calls.call import Call
from hf_accel.core.calls.drafting import Draft, Session, Speculation
from hf_accel.core.calls.forward import Stepper, rollback_objection
from hf_accel.core.calls.rows import Rows
from hf_accel.core.drift import CACHE
from hf_accel.core.model.support import foreign_inputs
from hf_accel.decoding.choosing import NO_TOKEN, Chooser, processor_objection
from hf_accel.decoding.inputs import LeanInputs
from hf_accel.decoding.steps import PlainSteps, Step, Steps
from hf_accel.ops.acceptance import accept


def verification_objection(call: Call) -> str | None:
    """Return why a call is decoded one token at a time, None if drafts can be verified; before its prompt is run."""
    config, cache, batch = call.generation_config, call.model_kwargs.get(CACHE), call.input_ids.shape[0]
    if config.is_assistant:
        return "the model drafts for another one"
    if call.model.training:
        return "the model is in training mode, where dropout draws at every step"
    if cache is None or not call.model_kwargs.get("use_cache"):
        return "there is no cache"
    if call.model_kwargs.get("inputs_embeds") is not None or not call.input_ids.shape[1]:
        return "the prompt is not made of tokens"
    if config.return_dict_in_generate and (config.output_attentions or config.output_hidden_states):
        return "attentions or hidden states are asked for"
    if batch > 1 and (config.return_dict_in_generate or call.has_callers_cache):
        return "the cache of a batch is the caller's"
    if batch > 1 and call.model_kwargs.get("position_ids") is None:
        return "the model takes no positions, so rows cannot be apart"
    return processor_objection(call.logits_processor) or _rope_objection(call)


def _rope_objection(call: Call) -> str | None:
    """Return why the positions of this call leave no steps of several tokens that equal single ones."""
    rope = call.rope
    if rope is None:
        return None
    following, prompt_tokens = _following(call), call.input_ids.shape[1]
    first = prompt_tokens if following is None else int(following.max())
    stop = first + Ends(call).maximum - prompt_tokens - 1  # the last token is not taken in
    if rope.beyond is not None and first >= rope.beyond:
        return f"{rope} at every token from {rope.beyond} on"
    if call.input_ids.shape[0] > 1 and not rope.is_steady(first, stop):
        # frequencies follow the row that is furthest, so rows apart would change one another's
        return f"{rope}, and those of the batch change before it ends"
    return None


def _following(call: Call) -> torch.Tensor | None:
    """Return the position of every row's first new token, [B]; None where the model is not told positions."""
    positions = call.model_kwargs.get("position_ids")
    return None if positions is None else positions[..., -1].expand(call.input_ids.shape[0]) + 1


class VerifiedSteps(Steps):
    """The steps of one call under speculation."""

    def __init__(self, call: Call, speculation: Speculation, outputs: Any) -> None:
        self.speculation = speculation
        config, kwargs = call.generation_config, call.model_kwargs
        mask, following = kwargs.get("attention_mask"), _following(call)
        self.rows = rows = Rows(call.input_ids, mask, config.max_length)
        self.cache = kwargs[CACHE]
        self.stepper = Stepper(call.model, self.cache, rows.lengths, mask, following, rows.prompt_tokens)
        self.stepper.keep(rows.lengths)
        self.chooser = Chooser(call.logits_processor, config.do_sample, rows, speculation.has_own_draws)
        self._ends = Ends(call)
        keeps = bool(config.return_dict_in_generate and (config.output_scores or config.output_logits))
        self._kept: deque[tuple[torch.Tensor, torch.Tensor]] | None = deque() if keeps else None
        self._released = 0
        # without an end of text, stock goes on writing rows that a criterion has ended, until all have
        self._pads = len(rows) > 1 and any(hasattr(criterion, "eos_token_id") for criterion in call.stopping_criteria)
        self._nap, self._nap_s = 0, 0.0  # plain steps still to come in a row, and what those made took
        self._napped: list[torch.Tensor] = []
        self._device = call.input_ids.device
        logits = outputs.logits[:, -1:].to(self._device)
        scores = self.chooser.score(logits)
        self._append(self.chooser.choose(scores).tolist(), [0] * len(rows), scores, logits)
        self.session: Session = speculation.open(call, rows, self.stepper, self.chooser)

    @staticmethod
    def objection(call: Call, outputs: Any) -> str | None:
        """Return why the call must go on plainly now that its prompt has run."""
        if reason := foreign_inputs(call.model):
            return reason
        cache = call.model_kwargs[CACHE]
        if reason := rollback_objection(cache, call.input_ids.shape[0] > 1):
            return reason
        if not LeanInputs.fit(call.model, call.model_kwargs, outputs):
            return "the model's inputs do not follow from those before"
        if cache.get_seq_length() != call.input_ids.shape[1]:
            return "the cache does not hold the prompt's tokens"
        return None

    def next(self, input_ids: torch.Tensor, unfinished: torch.Tensor) -> Step:
        rows = self.rows
        if self._nap > 0:
            return self._plain(input_ids)
        if self._pads:
            for row, goes_on in enumerate(unfinished.tolist()):
                rows.ended[row] |= not goes_on
        while not all(ended or rows.new_tokens(row) > self._released for row, ended in enumerate(rows.ended)):
            if not self._can_nap() or (nap := self.session.nap(self._room())) < 1:
                self._verify()
                continue
            self._nap = nap
            self.chooser.pause()
            return self._plain(input_ids)
        tokens = rows.ids[:, rows.prompt_tokens + self._released]
        self._released += 1
        scores, logits = self._kept.popleft() if self._kept is not None else (None, None)
        return Step(tokens, scores, logits)

    def close(self, input_ids: torch.Tensor) -> None:
        total = input_ids.shape[1]
        self._wake()
        if len(self.rows) == 1:
            self.stepper.keep([total - 1])
        self.chooser.finish(total - self.rows.prompt_tokens)
        self.session.close()

    def _room(self) -> int:
        return min(self._ends.room(self.rows, row) for row in self.rows.live())

    def _can_nap(self) -> bool:
        """Return whether all rows are in step, with every token handed out."""
        rows = self.rows
        in_step = all(rows.new_tokens(row) <= self._released for row in range(len(rows)))
        return in_step and not self.stepper.is_ragged

    def _plain(self, input_ids: torch.Tensor) -> Step:
        """One step with nothing around it, as `PlainSteps` makes them; the rows learn of it when the nap ends."""
        start = time.perf_counter()
        logits = self.stepper.forward(input_ids[:, -1:].contiguous())[:, -1]
        logits = logits.to(device=self._device, dtype=torch.float32, copy=True)
        scores = self.chooser.processors(input_ids, logits)
        tokens = PlainSteps.select(scores, self.chooser.samples)
        self._napped.append(tokens)
        self._released += 1
        self._nap -= 1
        self._nap_s += time.perf_counter() - start
        if self._nap == 0:
            self._wake()
        return Step(tokens, scores, logits)

    def _wake(self) -> None:
        """Let the rows have the tokens of the nap."""
        if not self._napped:
            return
        taken = torch.stack(self._napped, dim=1).tolist()
        accepted = [-1 if ended else 0 for ended in self.rows.ended]
        count, seconds = len(self._napped), self._nap_s
        self._nap, self._nap_s, self._napped = 0, 0.0, []
        self._append(taken, [-1 if ended else count - 1 for ended in self.rows.ended])
        self.session.observe(None, accepted, seconds / count, count)

    def _verify(self) -> None:
        """One forward pass: the rows' last tokens and what is drafted after them."""
        rows = self.rows
        room = self._room()
        draft = None if room < 2 else self.session.propose(room - 1)
        tokens = rows.last() if draft is None else torch.cat([rows.last(), draft.tokens], dim=1)
        start = time.perf_counter()
        logits = self.stepper.forward(tokens).to(self._device)
        scores = self.chooser.score(logits, None if draft is None else draft.tokens)
        if draft is not None and self.chooser.has_own_draws:
            taken = self._draw(draft, scores)
            counts = [-1 if ended else len(row) - 1 for ended, row in zip(rows.ended, taken, strict=True)]
        else:
            chosen = self.chooser.choose(scores)
            counts = self._matches(draft, chosen)
            taken = chosen.tolist()
        seconds = time.perf_counter() - start
        if draft is not None and not self.chooser.has_own_draws:
            self._note_near_ties(scores, counts, self.speculation.rounding_bound(tokens.numel()))
        self._append(taken, counts, scores, logits)
        self.session.observe(draft, counts, seconds)

    def _draw(self, draft: Draft, scores: torch.Tensor) -> list[list[int]]:
        """Return what each row emits by acceptance and residual (Leviathan et al. 2023, algorithm 1)."""
        emitted: list[list[int]] = []
        target = scores.softmax(dim=-1)
        drafts = draft.tokens.tolist()
        for row, count in enumerate(draft.counts):
            if self.rows.ended[row]:
                emitted.append([])
                continue
            proposal = None if draft.proposal is None else draft.proposal[row, :count]
            uniforms = torch.rand(count).tolist()
            tokens, _ = accept(target[row, : count + 1], drafts[row][:count], proposal, uniforms, _draw_one)
            emitted.append(tokens)
        return emitted

    def _matches(self, draft: Draft | None, chosen: torch.Tensor) -> list[int]:
        """Return how many drafts of each row are what was chosen, -1 for a row that has ended."""
        if draft is None:
            return [-1 if ended else 0 for ended in self.rows.ended]
        equal = (draft.tokens == chosen[:, :-1]).cumprod(dim=1).sum(dim=1).tolist()
        return [
            -1 if ended else min(count, limit)
            for ended, count, limit in zip(self.rows.ended, equal, draft.counts, strict=True)
        ]

    def _note_near_ties(self, scores: torch.Tensor, counts: list[int], bound: float) -> None:
        """Count the choices that a step of one token may have made otherwise, as it rounds otherwise."""
        if bound:
            is_near = (self.chooser.margins(scores) < bound).tolist()
            self.speculation.note(sum(sum(is_near[row][: count + 1]) for row, count in enumerate(counts)))

    def _append(
        self,
        chosen: list[list[int]],
        counts: list[int],
        scores: torch.Tensor | None = None,
        logits: torch.Tensor | None = None,
    ) -> None:
        """Add to each row what it accepted and the token after it; drop from the cache what was fed in vain."""
        rows = self.rows
        for row, count in enumerate(counts):
            if count >= 0 and not rows.ended[row]:
                tokens = self._ends.cut(rows, row, chosen[row][: count + 1])
                if scores is not None and tokens[-1] == NO_TOKEN:  # raises as plain decoding does
                    torch.multinomial(scores[row, count].softmax(dim=-1), num_samples=1)
                rows.add(row, tokens)
                if self._kept is not None and scores is not None and logits is not None:
                    self._kept.extend((scores[:, t], logits[:, t].float()) for t in range(len(tokens)))
        held = [length - 1 for length in rows.lengths]
        live = [held[row] for row in rows.live()]
        if live:  # rows that have ended go on with tokens that nobody sees, wherever they are in nobody's way
            held = [min(live) if ended else length for length, ended in zip(held, rows.ended, strict=True)]
        self.stepper.keep(held)


def _draw_one(probabilities: torch.Tensor) -> int:
    return int(torch.multinomial(probabilities, num_samples=1))


class Ends:
    """Where rows end for certain: after an end-of-text token, and at the maximal length; and where steps have to."""

    def __init__(self, call: Call) -> None:
        self.maximum = int(call.generation_config.max_length)
        self.eos: set[int] = set()
        for criterion in call.stopping_criteria:
            if type(criterion) is MaxLengthCriteria:
                self.maximum = min(self.maximum, criterion.max_length)
            elif type(criterion) is EosTokenCriteria:
                self.eos |= set(criterion.eos_token_id.flatten().tolist())
        config = call.model.config.get_text_config(decoder=True)
        self.positions = int(getattr(config, "max_position_embeddings", None) or self.maximum)
        following = _following(call)
        prompt_tokens = call.input_ids.shape[1]
        # of the last token of a row, which its next step begins with, beyond the row's length
        self._offsets = [0] * len(call.input_ids) if following is None else (following - prompt_tokens).tolist()
        self._rope = call.rope

    def room(self, rows: Rows, row: int) -> int:
        """Return how many tokens a step may feed to the row without looking beyond the maximal length or context.

        Nor does it pass where rotary frequencies change: all of its tokens would have those of the last.
        """
        length = rows.lengths[row]
        room = min(self.maximum, self.positions) - length
        steady = self._rope.room(length - 1 + self._offsets[row]) if self._rope is not None else None
        return room if steady is None else min(room, steady)

    def cut(self, rows: Rows, row: int, tokens: list[int]) -> list[int]:
        """Return the tokens up to where the row ends, and note that it does."""
        tokens = tokens[: max(1, self.maximum - rows.lengths[row])]
        end = next((t for t, token in enumerate(tokens) if token in self.eos), None)
        if end is not None:
            tokens = tokens[: end + 1]
        rows.ended[row] = end is not None or rows.lengths[row] + len(tokens) >= self.maximum
        return tokens
