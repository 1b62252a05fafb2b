"""Mistakes in the endpoint, and for each the test that turns red: a further table, see `test_planted.py`."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import pytest
import test_endpoint
import test_endpoint_errors
import test_endpoint_server
import test_endpoint_text
from planting import Defect, Patch, Test, instead, is_red, nothing, result
from serving import client

from hf_accel.endpoint import generating, stopping, unserved
from hf_accel.endpoint.adjusting import Adjusting
from hf_accel.endpoint.alternatives import Recorder
from hf_accel.endpoint.asked import Asked
from hf_accel.endpoint.choices import Choice
from hf_accel.endpoint.detokenizing import Detokenizer
from hf_accel.endpoint.generating import Generation
from hf_accel.endpoint.metrics import Steps
from hf_accel.endpoint.pool import Pool


def every_field_is_known(patch: Patch) -> None:
    patch.setattr(unserved, "_AS_IS", dict.fromkeys(unserved._AS_IS, (True, 3, "auto", "end")))


def undone_waiting(patch: Patch) -> None:
    patch.setattr(Pool, "_waiting", lambda self: 0)


PLANTED: dict[str, tuple[Defect, Test]] = {
    "text is not cut": (
        result(stopping.StopText, "add", lambda text: text + " "),
        test_endpoint.test_greedy_text_is_that_of_generate,
    ),
    "seeds that nobody reads": (
        instead(generating, "drawing", lambda *given: nullcontext({})),
        test_endpoint.test_a_seed_draws_what_generate_draws_whatever_else_is_served,
    ),
    "a temperature that nobody reads": (
        instead(Asked, "samples", property(lambda self: None)),
        test_endpoint.test_draws_without_a_seed_differ_and_go_on_after_a_seed,
    ),
    "nothing is held back": (
        instead(stopping, "_overlap", lambda text, stop: 0),
        test_endpoint.test_text_ends_before_a_stop_string,
    ),
    "penalties that do nothing": (
        instead(Adjusting, "is_needed", lambda asked: False),
        test_endpoint.test_penalties_equal_a_textbook_in_plain_loops,
    ),
    "log-probabilities that are logits": (
        instead(Recorder, "__call__", lambda self, ids, scores: setattr(self, "_logprobs", scores) or scores),
        test_endpoint.test_logprobs_are_the_models_own,
    ),
    "steps that nobody counts": (instead(Steps, "step", nothing), test_endpoint.test_models_health_and_counts),
    "calls that nobody ends": (
        instead(Generation, "is_cancelled", property(lambda self: False)),
        test_endpoint_server.test_stopping_waits_no_longer_than_it_was_told,
    ),
    "no bound on those who wait": (
        undone_waiting,
        test_endpoint_server.test_too_many_are_sent_away_and_told_when_to_come_back,
    ),
    "readers that nobody misses": (
        instead(Generation, "is_cancelled", property(lambda self: False)),
        test_endpoint_server.test_a_reader_who_leaves_ends_the_call,
    ),
    "characters in parts": (
        instead(Detokenizer, "add", lambda self, token: self._tokenizer.decode([token])),
        test_endpoint_text.test_no_part_of_a_character_is_shown,
    ),
    "a choice that goes on": (
        result(Choice, "_piece", lambda piece: replace(piece, finish=None)),
        test_endpoint_text.test_a_choice_is_its_text_up_to_its_end,
    ),
    "fields that are dropped": (every_field_is_known, test_endpoint_errors.test_a_field_that_does_not_fit_is_named),
}


@pytest.mark.parametrize("title", PLANTED)
def test_a_planted_defect_is_seen(title: str, monkeypatch: Patch) -> None:
    defect, test = PLANTED[title]
    with monkeypatch.context() as patch:
        defect(patch)
        assert is_red(test, here=client(running=4))
