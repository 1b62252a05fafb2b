"""Replicas without Ray: the recipe, what a replica answers, its pieces, its threads, and rows of a data set."""

from __future__ import annotations

import asyncio
import functools
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

import hf_accel
from hf_accel import ConfigError, ReplicaError, WeightOnlyConfig
from hf_accel.assets import demo_path
from hf_accel.core.calls.hosting import host_of
from hf_accel.core.steps.plan import Plan
from hf_accel.replicas import Batches, ModelRecipe, batch, data, recipe, threads
from hf_accel.replicas.answering import Answering
from hf_accel.replicas.asked import asked_of
from hf_accel.replicas.memory import memory_of
from hf_accel.replicas.pieces import Continued, pieces
from hf_accel.replicas.summary import summed

TEXTS = ["def add(a, b):\n", "class A:\n    def __init__(self, x", "import os\nimport", "x"]
PLAIN = Plan.of([hf_accel.DecodingConfig()])
SAMPLED = {"max_new_tokens": 12, "do_sample": True, "temperature": 1.5}


@functools.cache
def demo() -> recipe.Made:
    return ModelRecipe(demo_path(), PLAIN).make()


def from_a_function() -> tuple[Any, Any]:
    return tuple(demo())


def alone(text: str, **options: Any) -> str:
    """What the model itself writes after a text."""
    model, tokenizer = demo()
    ids = tokenizer(text, return_tensors="pt").input_ids
    return tokenizer.decode(model.generate(ids, **options)[0, ids.shape[1] :], skip_special_tokens=True)


def answering(at_once: int = 1, threads: int = 1) -> Answering:
    return Answering(ModelRecipe(from_a_function), threads, at_once)


def test_a_recipe_of_a_folder_survives_pickling_and_makes_the_model() -> None:
    made = pickle.loads(pickle.dumps(ModelRecipe(demo_path(), PLAIN, {"dtype": "float32"}, threads=1))).make()
    assert [type(step.config) for step in hf_accel.report(made.model).applied] == [hf_accel.DecodingConfig]
    ids = made.tokenizer(TEXTS[0], return_tensors="pt").input_ids
    assert torch.equal(made.model.generate(ids, max_new_tokens=8), demo().model.generate(ids, max_new_tokens=8))


def test_a_plan_is_made_once_for_all_replicas() -> None:
    planned = ModelRecipe(demo_path(), "exact").planned()
    assert isinstance(planned.goal_or_configs, Plan)
    assert planned.planned() is planned
    already = ModelRecipe(from_a_function)
    assert already.planned() is already
    again = pickle.loads(pickle.dumps(planned))
    assert again.goal_or_configs.to_dict() == planned.goal_or_configs.to_dict()
    assert {type(step.config) for step in hf_accel.report(again.make().model).applied} == {
        type(step.config) for step in planned.goal_or_configs.steps
    }
    with pytest.raises(ConfigError, match="measured by each replica"):
        ModelRecipe(demo_path(), ["exact", WeightOnlyConfig(bits=4)]).planned()


def test_packs_are_kept_and_mapped_unless_told_otherwise(tmp_path: Path) -> None:
    folder = shutil.copytree(demo_path(), tmp_path / "model")
    four = [WeightOnlyConfig(bits=4), hf_accel.DecodingConfig()]
    ModelRecipe(folder, four, {"cache": False}).make()
    assert not list(tmp_path.glob("*.hf_accel/*.pack"))
    ModelRecipe(folder, four).make()
    [pack] = tmp_path.glob("*.hf_accel/*.pack")
    assert str(pack) not in Path("/proc/self/maps").read_text()
    second = ModelRecipe(folder, four).make().model
    assert str(pack) in Path("/proc/self/maps").read_text()
    assert host_of(second) is not None


def test_a_function_may_return_an_optimised_model_or_one_for_a_goal() -> None:
    assert ModelRecipe(from_a_function).make().model is demo().model
    fresh = hf_accel.from_pretrained(demo_path())
    made = ModelRecipe(lambda: (fresh, None), PLAIN, tokenizer=demo_path()).make()
    assert made.model is fresh
    assert host_of(fresh) is not None
    assert made.tokenizer.vocab_size == demo().tokenizer.vocab_size
    stock = hf_accel.from_pretrained(demo_path())
    assert host_of(ModelRecipe(lambda: (stock, None), None).make().model) is None


@pytest.mark.parametrize(
    "wrong,match",
    [
        (lambda: ModelRecipe(7), "give a folder, a name, or a function"),  # type: ignore[arg-type]
        (lambda: ModelRecipe(from_a_function, load_options={"cache": True}), "loads its model itself"),
        (lambda: ModelRecipe("x", threads=0), "number of threads, 1 or more"),
        (lambda: ModelRecipe(lambda: 3).make(), r"returns \(model, tokenizer\)"),  # type: ignore[arg-type,return-value]
        (lambda: ModelRecipe(demo_path(), PLAIN, tokenizer="no/such/folder").make(), "Name one: tokenizer="),
        (lambda: asked_of(3, {}), "give a text, a list of texts"),
        (lambda: asked_of([], {}), "give a text, a list of texts"),
        (lambda: asked_of([1.5], {}), "give a text, a list of texts"),
        (lambda: asked_of("x", {"streamer": object()}), "Iterate over stream"),
        (lambda: asked_of("x", {"seed": -1}), "seed is -1"),
        (lambda: data.check_errors("drop"), '"raise" or "column"'),
        (lambda: batch.texts_of(*demo(), ["x", None], 0, {}), "A row holds None"),
        (lambda: Answering(ModelRecipe(lambda: (demo().model, None)), 1).answer(asked_of("x", {})), "no tokenizer"),
    ],
)
def test_what_does_not_fit_is_refused(wrong: Any, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        wrong()


@pytest.mark.parametrize(
    "granted,asked,usable,expected", [(2, None, 4, 2), (4, None, 2, 2), (0.5, None, 2, 1), (2, 1, 2, 1), (1, 8, 8, 1)]
)
def test_threads_are_those_granted_and_never_more_than_there_are(
    granted: float, asked: int | None, usable: int, expected: int
) -> None:
    assert threads.threads_for(granted, asked, usable) == expected
    assert threads.usable_processors() >= 1


@pytest.mark.parametrize("inputs", [TEXTS[0], [1, 2, 3], torch.tensor([[1, 2, 3], [4, 5, 6]])])
def test_answers_are_the_models_alone(inputs: Any) -> None:
    found = answering().submit(asked_of(inputs, {"max_new_tokens": 8})).result()
    if isinstance(inputs, str):
        assert found == alone(inputs, max_new_tokens=8)
    else:
        ids = torch.as_tensor(inputs).reshape(-1, 3)
        assert torch.equal(found, demo().model.generate(ids, max_new_tokens=8))


def test_what_is_drawn_depends_on_the_seed_alone_however_many_draw_at_once() -> None:
    replica = answering(at_once=3)
    asked = [asked_of(text, SAMPLED | {"seed": seed}) for text in TEXTS[:2] for seed in (1, 2)]
    found = [future.result() for future in [replica.submit(each) for each in asked * 2]]
    expected = []
    for each in asked:
        torch.manual_seed(each.seed)
        expected.append(alone(each.inputs, **SAMPLED))  # type: ignore[arg-type]
    assert found == expected * 2
    assert len(set(expected)) > 2
    assert asked_of("x", {}).seed != asked_of("x", {}).seed
    assert replica.report()["answered"] == 8
    replica.close()


def test_every_thread_of_a_replica_computes_with_its_number_of_threads() -> None:
    replica = answering(at_once=2, threads=2)
    seen = [replica._workers.submit(torch.get_num_threads).result() for _ in range(4)]
    assert seen == [2] * 4


async def _read(replica: Answering, text: str, most: int = 10**6, **options: Any) -> list[str]:
    found: list[str] = []
    stream = pieces(replica, asked_of(text, options))
    async for piece in stream:
        found.append(piece)
        if len(found) == most:
            break
    await stream.aclose()  # type: ignore[attr-defined]
    return found


def test_pieces_are_the_text() -> None:
    found = asyncio.run(_read(answering(), TEXTS[1], max_new_tokens=40))
    assert len(found) > 1
    assert "".join(found) == alone(TEXTS[1], max_new_tokens=40)


def test_a_stream_that_fails_says_so_and_one_that_nobody_reads_ends() -> None:
    replica = answering()
    with pytest.raises(ValueError, match="max_new_tokens"):
        asyncio.run(_read(replica, "x", max_new_tokens=-1))

    async def left_early() -> str:
        await _read(replica, TEXTS[1], most=1, max_new_tokens=400, min_new_tokens=400)
        return await asyncio.wrap_future(
            replica.submit(asked_of("x", {"max_new_tokens": 2}))
        )  # begins when it has ended

    assert asyncio.run(left_early()) == alone("x", max_new_tokens=2)
    assert replica.answered == 1


def test_a_text_goes_on_where_another_replica_left_it() -> None:
    text = Continued()
    assert [text.new("ab"), text.new("cd")] == ["ab", "cd"]
    text.begin()
    assert [text.new("a"), text.new("bcde"), text.new("f")] == ["", "e", "f"]
    text.begin()
    with pytest.raises(ReplicaError, match="writes it differently"):
        text.new("ax")


def test_an_accelerator_that_failed_is_remembered() -> None:
    replica = answering()
    assert replica.broken is None
    error = torch.AcceleratorError("gone")

    def generate(**options: Any) -> Any:
        raise error

    replica.model = type("Failing", (), {"generate": staticmethod(generate), "device": torch.device("cpu")})()
    replica.model.generation_config = demo().model.generation_config
    with pytest.raises(torch.AcceleratorError):
        replica.answer(asked_of([1], {}))
    assert replica.broken is error


def test_memory_is_what_the_system_says(tmp_path: Path) -> None:
    (tmp_path / "7").mkdir()
    lines = ["Rss: 10 kB", "Pss: 6 kB", "Shared_Clean: 3 kB", "Shared_Dirty: 1 kB", "Private_Clean: 2 kB"]
    (tmp_path / "7" / "smaps_rollup").write_text("0-1 [rollup]\n" + "\n".join([*lines, "Private_Dirty: 4 kB", ""]))
    assert memory_of(7, tmp_path) == {"resident": 10240, "private": 6144, "shared": 4096}
    assert memory_of(8, tmp_path) is None


def test_reports_are_summed() -> None:
    report = {"calls": {"served": 2, "delegated": 1, "reasons": {"beams": 1}}}
    one = {"answered": 3, "memory": {"private": 5}, "report": report}
    found = summed([one, one, {"answered": 1, "memory": {"private": 1}, "report": None}])
    assert found["answered"] == 7
    assert found["calls"] == {"served": 4, "delegated": 2, "reasons": {"beams": 2}}
    assert found["private_bytes"] == 11
    assert summed([one, {"answered": 1, "memory": None, "report": None}])["private_bytes"] is None


class Rows(Batches):
    """Batches outside of an actor."""

    def __init__(self, **options: Any) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(data, "ray_module", lambda *name: AutoTokenizer)  # which is not asked for anything
            patch.setattr(AutoTokenizer, "get_runtime_context", lambda: None, raising=False)
            patch.setattr(data, "use_granted", lambda runtime, asked: 1)
            super().__init__(ModelRecipe(from_a_function), **options)


def test_rows_are_written_on_as_alone_and_keep_order_and_columns() -> None:
    rows = {"prompt": np.array(TEXTS, dtype=object), "id": np.arange(len(TEXTS))}
    found = Rows(max_new_tokens=10)(rows)
    assert list(found) == ["prompt", "id", "text"]
    assert list(found["text"]) == [alone(text, max_new_tokens=10) for text in TEXTS]
    assert found["id"].tolist() == [0, 1, 2, 3]


def test_a_row_that_fails_is_told_in_its_row_or_raised() -> None:
    rows = {"prompt": np.array([TEXTS[0], None, TEXTS[2]], dtype=object)}
    found = Rows(errors="column", max_new_tokens=6)(rows)
    assert list(found["text"]) == [alone(TEXTS[0], max_new_tokens=6), None, alone(TEXTS[2], max_new_tokens=6)]
    assert [error and error[:15] for error in found["error"]] == [None, "A row holds Non", None]
    with pytest.raises(ConfigError, match="A row holds None"):
        Rows(max_new_tokens=6)(rows)
    with pytest.raises(ConfigError, match="no column 'prompt'; the data set has text"):
        Rows()({"text": rows["prompt"]})


def test_a_batch_draws_the_same_again_and_another_batch_otherwise() -> None:
    rows = Rows(**SAMPLED, seed=4)
    first, again = (list(rows({"prompt": np.array(TEXTS, dtype=object)})["text"]) for _ in range(2))
    assert first == again
    assert list(Rows(**SAMPLED, seed=5)({"prompt": np.array(TEXTS, dtype=object)})["text"]) != first
    assert list(rows({"prompt": np.array(TEXTS[:2], dtype=object)})["text"]) != first[:2]
