"""One pass for the rows of several calls, and each call's own pass where that fails."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers.modeling_outputs import CausalLMOutputWithPast

from hf_accel.batching.meeting import Submission
from hf_accel.batching.merged import merged
from hf_accel.batching.pace import Pace
from hf_accel.batching.statistics import BatchingStatistics
from hf_accel.batching.stopwatch import Stopwatch
from hf_accel.batching.turn import Turn
from hf_accel.core.calls.call import IN_PROGRESS, Request
from hf_accel.core.calls.forward import StepOutputs
from hf_accel.core.drift import CACHE
from hf_accel.errors import described

BREAK_S = 0.1  # longer than what lies between two steps of the same calls
STEP = 2**62  # the place of a step among those who wait for their turn does not matter


class Passes:
    """Runs what a meeting brings together. run: makes one pass, with the arguments of the model's forward."""

    def __init__(
        self, turn: Turn, pace: Pace, watch: Stopwatch, statistics: BatchingStatistics, run: Callable[..., Any]
    ) -> None:
        self._turn, self._pace, self._watch, self._statistics, self._run = turn, pace, watch, statistics, run
        self._request = Request()
        self._members: frozenset[int] = frozenset()  # whom the request is for
        self._ended: Any
        self._latest, self._ended, self._ended_s = self._members, None, 0.0
        self.gather: Callable[[list[Submission]], None] = lambda batch: None  # what else has come

    def run(self, batch: list[Submission]) -> None:
        """Make one pass for all submissions and give each its outputs, or its error."""
        with self._turn.taken(STEP, is_step=True):
            self.gather(batch)
            rows = sum(submission.part.rows for submission in batch)
            begin = self._watch.now()
            if (
                self._ended is not None
                and self._members == self._latest
                and time.perf_counter() - self._ended_s < BREAK_S
            ):
                self._watch.tell(self._ended, begin, partial(self._pace.between, rows))
            if len(batch) == 1 or not self._together(batch):
                for submission in batch:
                    _alone(self._run, submission)
            self._ended, self._ended_s, self._latest = self._watch.now(), time.perf_counter(), self._members
            self._watch.tell(begin, self._ended, partial(self._pace.step, rows))
        self._statistics.stepped(rows)

    def _together(self, batch: list[Submission]) -> bool:
        """Return whether one pass served all; if not, caches are as they were."""
        parts = [submission.part for submission in batch]
        before = [[layer.get_seq_length() for layer in part.cache.layers] for part in parts]
        cache = merged(parts)
        ids = torch.cat([submission.inputs["input_ids"] for submission in batch])
        inputs: dict[str, Any] = {
            "input_ids": ids,
            "position_ids": torch.cat([submission.inputs["position_ids"] for submission in batch]),
            # of this form, so that nobody makes one: what a row sees its own cache says
            "attention_mask": ids.new_ones((1, 1, 1, 1), dtype=torch.bool).expand(
                len(ids), 1, 1, cache.get_seq_length() + 1
            ),
            "use_cache": True,
            CACHE: cache,
            "return_dict": True,
        }
        if any("logits_to_keep" in submission.inputs for submission in batch):
            inputs["logits_to_keep"] = 1
        token = IN_PROGRESS.set(self._request_of(batch))
        try:
            outputs = self._run(**inputs)
            _share(outputs, batch)
        except Exception as error:
            # told, and not tried again: calls take turns from here on
            self._statistics.fell_apart(described(error))
            self._pace.give_up()
            if not _take_back(parts, before):
                for submission in batch:
                    submission.error = error
            return any(submission.error is not None for submission in batch)
        except BaseException as error:  # an interrupt is for the thread that runs the pass, not for the others
            _take_back(parts, before)
            for submission in batch[1:]:
                _alone(self._run, submission)
            raise error
        finally:
            IN_PROGRESS.reset(token)
        return True

    def forget(self) -> None:
        """Keep nothing of calls that have ended."""
        self._request, self._members = Request(), frozenset()

    def _request_of(self, batch: list[Submission]) -> Request:
        """Return what the passes of these calls count as: layers are looked at once for it."""
        members = frozenset(id(submission.part) for submission in batch)
        if members != self._members:
            self._members, self._request = members, Request()
        return self._request


def _alone(run: Callable[..., Any], submission: Submission) -> None:
    try:
        submission.outputs = run(**submission.inputs)
    except BaseException as error:
        submission.error = error


def _share(outputs: Any, batch: list[Submission]) -> None:
    """Give each submission its rows of the outputs."""
    at = 0
    for submission in batch:
        rows = slice(at, at + submission.part.rows)
        at += submission.part.rows
        given: dict[str, Any] = {CACHE: submission.part.cache}
        if isinstance(outputs, StepOutputs) and outputs.choices is not None:
            logits: Any = outputs.logits
            found: Any = StepOutputs(logits=logits[rows], choices=outputs.choices[rows], **given)
        else:
            found = CausalLMOutputWithPast(logits=outputs.logits[rows], **given)
        submission.outputs = found


def _take_back(parts: list[Any], before: list[list[int]]) -> bool:
    """Drop from the caches what a pass that failed had added to their first layers; return whether that is possible."""
    for part, lengths in zip(parts, before, strict=True):
        for layer, length in zip(part.cache.layers, lengths, strict=True):
            if surplus := layer.get_seq_length() - length:
                try:
                    layer.crop(-surplus)
                except (ValueError, RuntimeError):  # a window that has slid keeps no past
                    return False
    return True
