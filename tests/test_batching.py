"""What calls that join rest on: turns, meetings, admission, pace; and the ways in: configs, blocks, asyncio."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from contextlib import suppress
from typing import Any

import pytest
import torch
from catalogue import exact
from models import build, prompt
from test_joined_calls import NEW, assert_same, optimised, together

import hf_accel
from hf_accel.batching.admission import PASSED, Admission
from hf_accel.batching.meeting import Meeting, Submission
from hf_accel.batching.merged import Part
from hf_accel.batching.pace import LEAST_CHUNK, Pace
from hf_accel.batching.turn import Turn


class Wanted:
    """A call that is wanted for some seconds: nothing here takes so long."""

    def __init__(self) -> None:
        self.end = time.monotonic() + 3

    def __call__(self) -> None:
        if time.monotonic() > self.end:
            raise TimeoutError


def in_threads(*functions: Any) -> list[threading.Thread]:
    def run(function: Any) -> None:
        with suppress(TimeoutError, KeyboardInterrupt):
            function()

    threads = [threading.Thread(target=run, args=(function,), daemon=True) for function in functions]
    for thread in threads:
        thread.start()
    return threads


def until(condition: Any) -> None:
    end = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def test_prompts_and_steps_take_turns_and_prompts_keep_the_order_of_their_calls() -> None:
    turn, order = Turn(), []

    def passing(name: str, number: int, is_step: bool) -> Any:
        def run() -> None:
            with turn.taken(number, is_step=is_step):
                order.append(name)

        return run

    with turn.taken(0):
        threads = []
        for place, (name, number, is_step) in enumerate(
            [("later", 9, False), ("earlier", 2, False), ("step", 99, True), ("next step", 99, True)]
        ):
            threads += in_threads(passing(name, number, is_step))
            until(lambda place=place: len(turn._waiting) == place + 1)
        with turn.taken(5):  # who has it has it
            order.append("mine")
    for thread in threads:
        thread.join(5)
    assert order == ["mine", "step", "earlier", "next step", "later"]


def submission() -> Submission:
    return Submission(Part(None, 1, None), {}, "key")


def noted(ran: list[int]) -> Any:
    """Return what runs a batch and notes how many were in it."""

    def run(batch: list[Submission]) -> None:
        ran.append(len(batch))
        for each in batch:
            each.outputs = "something"

    return run


def test_whoever_comes_last_runs_the_step_for_all() -> None:
    ran: list[int] = []

    def run(batch: list[Submission]) -> None:
        ran.append(len(batch))
        for each in batch:
            each.outputs = threading.get_ident()

    meeting, found = Meeting(run, patience=20.0), []
    for _ in range(3):
        meeting.join()
    threads = in_threads(*[lambda: found.append(meeting.submit(submission())) for _ in range(2)])
    until(lambda: len(meeting._waiting) == 2)
    assert not ran
    found.append(meeting.submit(submission()))
    for thread in threads:
        thread.join(5)
    assert ran == [3]
    assert found == [threading.get_ident()] * 3


def test_whoever_runs_a_step_that_is_not_its_own_runs_its_own_next() -> None:
    ran: list[int] = []

    def run(batch: list[Submission]) -> None:
        meeting.patience = 0.0  # what is left is due at once
        noted(ran)(batch)

    meeting = Meeting(run, patience=20.0)
    for _ in range(2):
        meeting.join()
    threads = in_threads(lambda: meeting.submit(submission()))
    until(lambda: len(meeting._waiting) == 1)
    threads += in_threads(lambda: meeting.submit(Submission(Part(None, 1, None), {}, "another key")))
    for thread in threads:
        thread.join(5)
    assert ran == [1, 1]


def test_whoever_comes_while_a_step_waits_for_its_turn_is_in_it() -> None:
    ran: list[int] = []
    begun, go_on = threading.Event(), threading.Event()

    def run(batch: list[Submission]) -> None:
        begun.set()
        go_on.wait(5)
        meeting.gather(batch)
        noted(ran)(batch)

    meeting = Meeting(run, patience=0.0)
    threads = in_threads(lambda: meeting.submit(submission()))
    assert begun.wait(5)
    threads += in_threads(*[lambda: meeting.submit(submission()) for _ in range(2)])
    until(lambda: len(meeting._waiting) == 2)
    go_on.set()
    for thread in threads:
        thread.join(5)
    assert ran == [3]
    assert not any(thread.is_alive() for thread in threads)


def test_an_interrupt_of_whoever_runs_a_step_is_not_for_the_others() -> None:
    ran: list[int] = []

    def run(batch: list[Submission]) -> None:
        if not ran:
            ran.append(0)
            raise KeyboardInterrupt
        noted(ran)(batch)

    meeting, found = Meeting(run, patience=20.0), []
    for _ in range(3):
        meeting.join()
    threads = in_threads(*[lambda: found.append(meeting.submit(submission())) for _ in range(2)])
    until(lambda: len(meeting._waiting) == 2)
    with pytest.raises(KeyboardInterrupt):
        meeting.submit(submission())
    meeting.leave()
    for thread in threads:
        thread.join(5)
    assert (ran, found) == ([0, 2], ["something"] * 2)


def test_nobody_waits_for_who_is_late_or_has_left() -> None:
    ran: list[int] = []
    meeting = Meeting(noted(ran), patience=0.05)
    meeting.join()
    meeting.join()
    meeting.submit(submission())
    assert ran == [1]
    patient = Meeting(noted(ran), patience=20.0)
    patient.join()
    patient.join()
    threads = in_threads(lambda: patient.submit(submission()))
    until(lambda: len(patient._waiting) == 1)
    patient.leave()
    threads[0].join(5)
    assert ran == [1, 1]
    assert not threads[0].is_alive()


def test_admission_is_first_come_first_served_and_passes_nobody_for_ever() -> None:
    admission = Admission(8, 100, lambda: 8)
    inside = [admission.enter(2, 40, Wanted()) for _ in range(2)]
    order: list[str] = []

    def enter(name: str, tokens: int) -> Any:
        return lambda: (admission.enter(1, tokens, Wanted()), order.append(name))

    threads = in_threads(enter("large", 90))
    until(lambda: admission.waiting == 1)
    for _ in range(PASSED):  # small ones go ahead while there is no room for the large one
        admission.leave(admission.enter(1, 5, Wanted()))
    threads += in_threads(enter("small", 5))
    until(lambda: admission.waiting == 2)
    time.sleep(0.05)
    assert order == []  # but no more than so many
    for place in inside:
        admission.leave(place)
    for thread in threads:
        thread.join(5)
    assert sorted(order) == ["large", "small"]
    assert admission.tokens == 95


def test_a_call_that_can_never_begin_is_refused_and_one_not_wanted_stops_waiting() -> None:
    admission = Admission(2, 100, lambda: 2)
    with pytest.raises(hf_accel.ConfigError, match="101 positions"):
        admission.enter(1, 101, Wanted())
    with pytest.raises(hf_accel.ConfigError, match="3 rows"):
        admission.enter(3, 10, Wanted())
    admission.enter(2, 60, Wanted())

    def unwanted() -> None:
        raise hf_accel.CancelledCallError("no")

    with pytest.raises(hf_accel.CancelledCallError):
        admission.enter(1, 10, unwanted)
    assert admission.waiting == 0
    assert (admission.rows, admission.tokens) == (2, 60)


def test_rows_and_chunks_follow_from_measured_times() -> None:
    pace = Pace(0.05, 16, 128)
    assert pace.most_rows() == 1
    assert pace.chunk(1) == 128
    for rows, seconds in ((1, 0.02), (2, 0.03), (3, 0.045), (4, 0.06)):
        pace.step(rows, seconds)
    pace.prompt(100, 0.1)
    assert pace.most_rows() == 3
    assert pace.chunk(1) == 29
    assert pace.chunk(4) == LEAST_CHUNK
    assert Pace(None, 16, 128).most_rows() == 16
    assert pace.merges(2)
    assert not pace.merges(0)
    pace.step(8, 1.0)
    assert not pace.merges(8)
    assert not pace.merges(16)  # of which none was measured yet: twice as long as of eight


def test_a_target_is_for_nine_in_ten_tokens() -> None:
    pace = Pace(0.06, 16, 128)
    for seconds in [0.02] * 8 + [0.04] * 2:
        pace.step(1, seconds)
    pace.prompt(100, 0.1)
    assert pace.chunk(1) == 19
    for seconds in [0.05] * 8 + [0.07] * 2:
        pace.step(2, seconds)
    assert pace.most_rows() == 1


def test_fields_are_checked() -> None:
    wrong: list[dict[str, Any]] = [
        {"max_rows": 0},
        {"max_rows": True},
        {"max_tokens": 0},
        {"chunk_tokens": -1},
        {"max_wait_ms": -1},
        {"max_wait_ms": "5"},
        {"latency_ms": 0},
        {"latency_ms": float("nan")},
        {"max_row": 3},
    ]
    model = build("llama")
    with hf_accel.optimized(model, exact(model)):
        for fields in wrong:
            with pytest.raises(hf_accel.ConfigError, match=next(iter(fields))), hf_accel.serving(model, **fields):
                pass
        both = hf_accel.serving(model, hf_accel.BatchingConfig(), max_rows=3)
        with pytest.raises(hf_accel.ConfigError, match="not both"), both:
            pass
        with hf_accel.serving(model):
            again = hf_accel.serving(model)
            with pytest.raises(hf_accel.ConflictError, match="already"), again:
                pass
        for seed in (-1, True, 1.5, "1"):
            with pytest.raises(hf_accel.ConfigError, match="seed"):
                model.generate(prompt(), seed=seed, max_new_tokens=2)
    with pytest.raises(hf_accel.ConflictError, match="not optimised"), hf_accel.serving(model):
        pass


def test_calls_join_where_a_config_says_so() -> None:
    model = build("qwen3")
    prompts = [prompt(1, 5 + place, seed=place) for place in range(3)]
    texts = [model.generate(ids, **NEW, do_sample=False) for ids in prompts]
    with hf_accel.optimized(model, [*exact(model), hf_accel.BatchingConfig(max_wait_ms=2000.0)]):
        calls = [lambda ids=ids: model.generate(ids, **NEW, do_sample=False) for ids in prompts]
        assert_same(together(calls), texts)
        assert hf_accel.report(model).joined_calls.joined == 3
    assert torch.equal(model.generate(prompts[0], **NEW, do_sample=False), texts[0])


def test_a_seed_is_that_of_torch_and_leaves_torchs_own_generator() -> None:
    model = build("llama")
    ids = prompt(2, 9)
    ways: list[dict[str, Any]] = [
        {},
        {"top_k": 20, "top_p": 0.7},
        {"num_beams": 2},
        {"num_return_sequences": 3},
        {"speculative": hf_accel.SpeculativeConfig(drafter="lookup", adaptive=False)},
    ]
    for way in ways:
        stocks = {name: value for name, value in way.items() if name != "speculative"}
        torch.manual_seed(11)
        text = model.generate(ids, **NEW, **stocks, do_sample=True)
        with hf_accel.optimized(model, exact(model)):
            torch.manual_seed(5)
            before = torch.get_rng_state()
            assert torch.equal(model.generate(ids, **NEW, **way, do_sample=True, seed=11), text)
            assert torch.equal(torch.get_rng_state(), before)


def test_asyncio_calls_join_and_are_cancelled() -> None:
    model = build("llama")
    prompts = [prompt(1, 5 + place, seed=place) for place in range(3)]
    texts = [model.generate(ids, **NEW, do_sample=False) for ids in prompts]

    async def all_at_once() -> list[Any]:
        long = asyncio.create_task(hf_accel.agenerate(model, prompts[0], max_new_tokens=400, pad_token_id=0))
        calls = [hf_accel.agenerate(model, ids, **NEW, do_sample=False) for ids in prompts]
        found = await asyncio.gather(*calls)
        with pytest.raises(TypeError):
            await hf_accel.agenerate(model, prompts[0], max_new_tokens=[])
        long.cancel()
        with pytest.raises(asyncio.CancelledError):
            await long
        return found

    with optimised(model) as report:
        assert_same(asyncio.run(all_at_once()), texts)
        engine = type(model)._hf_accel_engine
        until(lambda: engine.admission.rows == engine.meeting.writers == 0)
        assert report.cancelled == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
def test_a_forked_child_begins_with_nobody_inside() -> None:
    model = build("llama")
    with optimised(model):
        engine = type(model)._hf_accel_engine
        place = engine.admission.enter(3, 30, Wanted())
        child = os.fork()
        if not child:
            os._exit(engine.admission.rows)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert engine.admission.rows == 3
        engine.admission.leave(place)
