"""Steps of several tokens: drafts are verified in one forward pass, and each row accepts its own number of them.

Every position of a verified step gets the token that plain decoding would choose there: the argmax, or the winner of
the draws that plain decoding makes at that token (`Draws`). A draft is accepted where it *is* that token, so the text
does not depend on drafts at all. Where draws of its own are asked for, sampled drafts are instead accepted with the
ratio of their probabilities and replaced from the residual (`ops.acceptance`). Rows advance apart; tokens leave here in
step, one per row, as stock's loop would bring them, so that criteria, streamers and outputs see what they would see
without speculation. Cost: one forward pass of B (k + 1) rows per step, and a few operations on [B, k + 1, V].
"""

from __future__ import annotations

import copy
import time
from collections import deque
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from hf_accel.core.calls.call import Call
from hf_accel.core.calls.drafting import Draft, Session, Speculation
from hf_accel.core.calls.following import Following
from hf_accel.core.calls.forward import Stepper
from hf_accel.core.calls.rows import Rows
from hf_accel.core.calls.seeding import generator_on
from hf_accel.core.drift import CACHE
from hf_accel.decoding.choosing import NO_TOKEN, Chooser, NextTokens, choose_token, draw, next_tokens
from hf_accel.decoding.ends import Ends
from hf_accel.decoding.steps import PlainSteps, Steps
from hf_accel.ops.acceptance import accept


@dataclass
class PlainRun:
    """Plain steps in a row: how many are still to come, and the tokens [B] of those made and what they took."""

    left: int = 0
    tokens: list[torch.Tensor] = field(default_factory=list)
    seconds: float = 0.0


def stepper_of(call: Call, inputs: Following) -> Stepper:
    """Return what makes the steps of a call whose prompt has run. inputs: those that follow on it."""
    batch, tokens = call.input_ids.shape
    start = [tokens] * batch, inputs.mask, inputs.positions, tokens
    return Stepper(call.model, call.model_kwargs[CACHE], *start, others=inputs.others)


class VerifiedSteps(Steps):
    """The steps of one call under speculation."""

    def __init__(self, call: Call, speculation: Speculation, outputs: Any, inputs: Following) -> None:
        """Begin with the outputs of the prompt. inputs: those that follow on it."""
        self.call, self.speculation = call, speculation
        config, kwargs = call.generation_config, call.model_kwargs
        self.rows = rows = Rows(call.input_ids, kwargs.get("attention_mask"), config.max_length)
        self.cache, self.stepper = kwargs[CACHE], stepper_of(call, inputs)
        self.stepper.keep(rows.lengths)
        self.chooser = Chooser(call.logits_processor, config.do_sample, rows, speculation.has_own_draws)
        self._ends = Ends(call)
        self._last = inputs.last
        self._after: PlainSteps | None = None
        if self._last is not None:  # then steps go on as stock's do, which is told of every pass
            self._outputs = copy.copy(outputs)
            self._outputs.logits = None
        collects = bool(config.return_dict_in_generate and (config.output_scores or config.output_logits))
        # what tokens that are not handed out yet were chosen from
        self._waiting: deque[tuple[torch.Tensor, torch.Tensor]] | None = deque() if collects else None
        self._handed_out = 0
        # without an end of text, stock goes on writing rows that a criterion has ended, until all have
        self._pads = len(rows) > 1 and any(hasattr(criterion, "eos_token_id") for criterion in call.stopping_criteria)
        self._plain_run = PlainRun()
        self._device = call.input_ids.device
        logits = outputs.logits[:, -1:].to(self._device)
        scores = self.chooser.score(logits)
        self._append(self.chooser.choose(scores).tolist(), [0] * len(rows), scores, logits)
        self.session: Session = speculation.open(call, rows, self.stepper, self.chooser)

    @property
    def passes(self) -> Stepper:
        return self.stepper

    def leave(self, ended: set[int], tokens: int) -> None:
        """Do nothing: rows leave as soon as their last tokens are known, which are handed out later."""

    def _let_leave(self) -> None:
        rows = self.rows
        if self.leaving is not None and any(rows.ended) and (live := rows.live()):
            ended = {row for row, is_over in enumerate(rows.ended) if is_over}
            self.leaving.consider(ended, max(rows.lengths[row] for row in live))

    def next(self, input_ids: torch.Tensor, unfinished: torch.Tensor) -> NextTokens:
        rows = self.rows
        if self._after is not None:
            return self._after.next(input_ids, unfinished)
        if self._plain_run.left:
            return self._step_plainly(input_ids)
        if self._pads:
            for row, goes_on in enumerate(unfinished.tolist()):
                rows.ended[row] |= not goes_on
        while not all(ended or rows.new_tokens(row) > self._handed_out for row, ended in enumerate(rows.ended)):
            if self._last is not None and rows.lengths[0] > self._last:
                self._after = self._plain_steps_after(input_ids.shape[1])
                return self._after.next(input_ids, unfinished)
            self._let_leave()
            if not self._can_step_plainly() or (count := self.session.plain_steps(self._room())) < 1:
                self._verify()
                continue
            self._plain_run.left = count
            self.chooser.pause()
            return self._step_plainly(input_ids)
        tokens = rows.ids[:, rows.prompt_tokens + self._handed_out]
        self._handed_out += 1
        scores, logits = self._waiting.popleft() if self._waiting is not None else (None, None)
        return NextTokens(tokens, scores, logits)

    def close(self, input_ids: torch.Tensor) -> None:
        total = input_ids.shape[1]
        if self._after is not None:
            self._after.close(input_ids)
            self.cache = self._after.cache
            return
        self._end_plain_run()
        if len(self.rows) == 1:
            self.stepper.keep([total - 1])
        if self.call.generation_config.return_dict_in_generate or self.call.has_callers_cache:
            self.stepper.settle()
        self.chooser.finish(total - self.rows.prompt_tokens)
        self.session.close()

    def _room(self) -> int:
        room = min(self._ends.room(self.rows, row) for row in self.rows.live())
        return room if self._last is None else min(room, self._last - self.rows.lengths[0] + 1)

    def _plain_steps_after(self, tokens: int) -> PlainSteps:
        """Return the steps that go on where the model's inputs change: with those of its own methods, as stock does."""
        self.stepper.settle()
        self.chooser.pause()
        self.session.close()
        call, missing = self.call, tokens - self.rows.prompt_tokens - 1
        grown = call.model._update_model_kwargs_for_generation(
            self._outputs, dict(call.model_kwargs), is_encoder_decoder=False, num_new_tokens=missing
        )
        return PlainSteps(replace(call, model_kwargs=grown), self._outputs, is_first=False)

    def _can_step_plainly(self) -> bool:
        """Return whether all rows are in step, with every token handed out."""
        rows = self.rows
        in_step = all(rows.new_tokens(row) <= self._handed_out for row in range(len(rows)))
        return in_step and not self.stepper.is_ragged

    def _step_plainly(self, input_ids: torch.Tensor) -> NextTokens:
        """Make a step of one token as plain decoding does; the rows get its token when the run of them ends."""
        start, run = time.perf_counter(), self._plain_run
        step = next_tokens(self.stepper.outputs(input_ids[:, -1:].contiguous()), input_ids, self.call)
        run.tokens.append(step.tokens)
        self._handed_out += 1
        run.left -= 1
        run.seconds += time.perf_counter() - start
        if run.left == 0:
            self._end_plain_run()
        return step

    def _end_plain_run(self) -> None:
        """Give the rows the tokens of the plain steps, and tell the session what these took."""
        run, self._plain_run = self._plain_run, PlainRun()
        if not run.tokens:
            return
        count, chosen = len(run.tokens), torch.stack(run.tokens, dim=1).tolist()
        accepted = [-1 if ended else 0 for ended in self.rows.ended]
        self._append(chosen, [-1 if ended else count - 1 for ended in self.rows.ended])
        self.session.observe(None, accepted, run.seconds / count, count)

    def _verify(self) -> None:
        """Make one forward pass over the rows' last tokens and what is drafted after them, and take what it accepts."""
        rows = self.rows
        room = self._room()
        draft = None if room < 2 else self.session.propose(room - 1)
        tokens = rows.last() if draft is None else torch.cat([rows.last(), draft.tokens], dim=1)
        start = time.perf_counter()
        logits = self.stepper.forward(tokens).to(self._device)
        scores = self.chooser.score(logits, None if draft is None else draft.tokens)
        if draft is not None and self.chooser.has_own_draws:
            taken = self._accept(draft, scores)
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

    def _accept(self, draft: Draft, scores: torch.Tensor) -> list[list[int]]:
        """Return what each row takes by acceptance and residual (Leviathan et al. 2023, algorithm 1)."""
        taken: list[list[int]] = []
        target = scores.softmax(dim=-1)
        drafts = draft.tokens.tolist()
        for row, count in enumerate(draft.counts):
            if self.rows.ended[row]:
                taken.append([])
                continue
            proposal = None if draft.probabilities is None else draft.probabilities[row, :count]
            uniforms = torch.rand(count, generator=generator_on(torch.device("cpu"))).tolist()
            tokens, _ = accept(
                target[row, : count + 1], drafts[row][:count], proposal, uniforms, lambda p: int(draw(p))
            )
            taken.append(tokens)
        return taken

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
                if scores is not None and tokens[-1] == NO_TOKEN:  # sampling from it raises as plain decoding does
                    choose_token(scores[row, count], samples=True)
                rows.add(row, tokens)
                if self._waiting is not None and scores is not None and logits is not None:
                    # a copy: a replay of the next step writes over the logits
                    kept = logits.to(dtype=torch.float32, copy=True)
                    self._waiting.extend((scores[:, t], kept[:, t]) for t in range(len(tokens)))
        self.stepper.keep(rows.align_ended([length - 1 for length in rows.lengths]))
