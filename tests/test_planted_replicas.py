"""Mistakes in replicas, and for each the test that turns red: a further table, see `test_planted.py`."""

from __future__ import annotations

from typing import Any

import pytest
import test_replicas
import test_replicas_handle
import torch
from planting import Defect, Patch, Test, instead, is_red, nothing, result

from hf_accel.core.calls import seeding
from hf_accel.replicas import batch, handle, pieces, recipe, threads
from hf_accel.replicas.answering import Answering
from hf_accel.replicas.pieces import Continued
from hf_accel.replicas.recipe import ModelRecipe
from hf_accel.replicas.tries import Tries


def two_draw_at_once(patch: Patch) -> None:
    patch.setattr(seeding.Seeded, "on", lambda self, device: torch.default_generator)


def padded_on_the_right(patch: Patch) -> None:
    left = batch._left

    def right(tokenizer: Any) -> Any:
        found = left(tokenizer)
        found.padding_side = "right"
        return found

    patch.setattr(batch, "_left", right)


def another_seed_each_time(patch: Patch) -> None:
    def anew(self: Any, asked: Any, tries: Any, response: Any) -> Any:
        while True:
            with tries.another(), self._plain():
                found, response = response or self.deployment.remote(handle.asked_of(asked.inputs, {})), None
                return found.result(timeout_s=None)

    patch.setattr(handle.Replicas, "_answer", anew)


def without_bound(patch: Patch) -> None:
    another = Tries.another

    def more(self: Tries) -> Tries:
        self.most = 7
        return another(self)

    patch.setattr(Tries, "another", more)


PLANTED: dict[str, tuple[Defect, Test]] = {
    "a dead replica's requests are lost": (
        instead(Tries, "__exit__", lambda self, *error: False),
        test_replicas_handle.test_requests_of_dead_replicas_are_sent_again_and_answered_once,
    ),
    "sent again with another seed": (
        another_seed_each_time,
        test_replicas_handle.test_requests_of_dead_replicas_are_sent_again_and_answered_once,
    ),
    "no bound on tries": (
        without_bound,
        test_replicas_handle.test_a_request_that_ends_every_replica_is_refused_after_its_tries,
    ),
    "pieces twice": (
        instead(Continued, "new", lambda self, piece: piece),
        test_replicas_handle.test_a_stream_goes_on_after_a_death_without_a_piece_twice,
    ),
    "texts that are not compared": (
        instead(Continued, "new", lambda self, piece: piece),
        test_replicas.test_a_text_goes_on_where_another_replica_left_it,
    ),
    "draws of several calls": (
        two_draw_at_once,
        test_replicas.test_what_is_drawn_depends_on_the_seed_alone_however_many_draw_at_once,
    ),
    "threads that compute with all": (
        instead(torch, "set_num_threads", nothing),
        test_replicas.test_every_thread_of_a_replica_computes_with_its_number_of_threads,
    ),
    "more threads than granted": (
        instead(threads, "threads_for", lambda granted, asked, usable: asked or usable),
        test_replicas.test_threads_are_those_granted_and_never_more_than_there_are,
    ),
    "packs that nobody keeps": (
        instead(ModelRecipe, "_options", lambda self: dict(self.load_options)),
        test_replicas.test_packs_are_kept_and_mapped_unless_told_otherwise,
    ),
    "a goal that is dropped": (
        instead(recipe, "optimize", nothing),
        test_replicas.test_a_function_may_return_an_optimised_model_or_one_for_a_goal,
    ),
    "the prompt in the answer": (
        result(Answering, "_read", lambda inputs: {**inputs, "input_ids": inputs["input_ids"][:, :-1]}),
        test_replicas.test_answers_are_the_models_alone,
    ),
    "a stream that nobody stops": (
        instead(pieces.Streamer, "put", lambda self, value: super(pieces.Streamer, self).put(value)),
        test_replicas.test_a_stream_that_fails_says_so_and_one_that_nobody_reads_ends,
    ),
    "rows padded on the right": (
        padded_on_the_right,
        test_replicas.test_rows_are_written_on_as_alone_and_keep_order_and_columns,
    ),
    "a seed that is left": (
        instead(torch, "manual_seed", nothing),
        test_replicas.test_a_batch_draws_the_same_again_and_another_batch_otherwise,
    ),
}


@pytest.mark.native
@pytest.mark.parametrize("title", PLANTED)
def test_a_planted_defect_is_seen(title: str, monkeypatch: Patch, tmp_path_factory: pytest.TempPathFactory) -> None:
    defect, test = PLANTED[title]
    monkeypatch.setattr(handle, "ray_module", test_replicas_handle.errors_of)
    with monkeypatch.context() as patch:
        defect(patch)
        assert is_red(test, tmp_path=lambda: tmp_path_factory.mktemp("case"))
