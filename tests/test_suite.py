"""Suites of measurements: budget, resuming, failures as rows, files; the GPU suite, of a tiny shape on the CPU."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from hf_accel.cli import app
from hf_accel.cli.gpu_works import Call, GpuWorks, timed
from hf_accel.core.calls.hosting import host_of
from hf_accel.errors import ConfigError
from hf_accel.measure import SHAPES
from hf_accel.measure.suite import Row, Suite


def counted(names: list[str], name: str) -> list[Row]:
    names.append(name)
    return [Row(name, {"ms": 1.5}, "a note")]


def test_every_work_is_made_once_and_a_second_run_goes_on(tmp_path: Path) -> None:
    made: list[str] = []
    path = tmp_path / "suite.json"
    works = {name: (lambda name=name: counted(made, name)) for name in ("a", "b", "c")}
    first = Suite("s", path)
    assert list(first.run({"a": works["a"]}, 60.0)) == ["a"]
    second = Suite("s", path)
    second.resume()
    assert list(second.run(works, 60.0)) == ["a", "b", "c"]
    assert made == ["a", "b", "c"]
    assert [row.work for row in second.rows()] == ["a", "b", "c"]
    assert json.loads(path.read_text())["works"]["b"] == [asdict(Row("b", {"ms": 1.5}, "a note"))]


def test_what_fails_is_a_row_that_says_so_and_is_made_again(tmp_path: Path) -> None:
    def fail() -> list[Row]:
        raise RuntimeError("out of memory\nmore")

    path = tmp_path / "suite.json"
    suite = Suite("s", path)
    list(suite.run({"bad": fail, "good": lambda: [Row("good", {"ms": 2.0})]}, 60.0))
    assert [row.error for row in suite.rows()] == ["RuntimeError: out of memory", None]
    again = Suite("s", path)
    again.resume()
    assert list(again.done) == ["good"]
    list(again.run({"bad": lambda: [Row("bad", {"ms": 3.0})], "good": fail}, 60.0))
    assert all(row.error is None for row in again.rows())


def test_nothing_is_begun_once_the_budget_is_spent() -> None:
    made: list[str] = []
    suite = Suite("s")
    list(suite.run({"a": lambda: counted(made, "a"), "b": lambda: counted(made, "b")}, -1.0))
    assert made == []
    assert all(row.error is not None and row.error.startswith("not begun") for row in suite.rows())


def test_results_of_another_machine_are_not_taken_over(tmp_path: Path) -> None:
    path = tmp_path / "suite.json"
    suite = Suite("s", path)
    list(suite.run({"a": lambda: [Row("a")]}, 60.0))
    other = Suite("s", path, machine=suite.machine | {"gpu": "another"})
    other.resume()
    assert other.done == {}


@pytest.mark.parametrize("text", ["", "[]", '{"name": 1}', '{"name": "s", "machine": {}, "versions": {}}'])
def test_a_file_that_is_none_of_a_suite_is_an_error(tmp_path: Path, text: str) -> None:
    path = tmp_path / "suite.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match="holds no results"):
        Suite("s", path).resume()


def test_the_table_has_figures_notes_and_errors() -> None:
    suite = Suite("s", machine={"gpu": "a card", "cpu": "a processor"}, versions={"torch": "2"})
    suite.done = {"a": [Row("a", {"ms": 1.5, "ratio": 2.0}, "noted")], "b": [Row("b", error="E: why")]}
    lines = suite.markdown().splitlines()
    assert lines[0].startswith("a card; torch 2; ")
    assert lines[4:] == ["| a | ms 1.5, ratio 2 | noted |", "| b | none: E: why |  |"]


@pytest.mark.parametrize(
    "arguments,words",
    [
        (["--suite", "gpu"], "Add --device cuda"),
        (["--suite", "other", "--device", "cpu"], "no suite called"),
        (["--suite", "gpu", "--prompt", "12"], "leave out --prompt"),
        (["no-shape", "--suite", "gpu"], "measures a shape"),
        (["--out", "x.json", "llama-1b"], "belong to --suite"),
        (["--budget", "20", "llama-1b"], "belong to --suite"),
        ([], "Give the MODEL"),
    ],
)
def test_what_a_suite_does_not_take_is_an_error(arguments: list[str], words: str) -> None:
    found = CliRunner().invoke(app, ["bench", *arguments])
    assert found.exit_code == 2
    assert words in " ".join(found.output.split())


TINY = dict(
    model_type="llama", hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, vocab_size=128, max_position_embeddings=512, tie_word_embeddings=False,
)  # fmt: skip


def test_the_works_of_the_gpu_suite_run_and_their_figures_are_of_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES, "tiny", TINY)
    torch.manual_seed(0)
    gpu = GpuWorks("tiny", "cpu", rounds=1, prompts=(8, 24), batch=2, long=40, new_tokens=4, wide={})
    works = gpu.works()
    del works["gpu tests"], works["first token"]  # processes of their own
    suite = Suite("gpu")
    assert list(suite.run(works, 600.0)) == list(works)
    rows = suite.rows()
    assert [row.error for row in rows] == [None] * len(rows)
    figures = {row.work: row.figures for row in rows}
    short = figures["decode, batch 1, prompt 8"]
    assert short["ratio"] == pytest.approx(short["stock ms"] / short["ours ms"])
    assert short["share"] == pytest.approx(short["weights read once, ms"] / short["ours ms"])
    few, whole = figures["decode in 4 bits, prompt 8"], short["weights read once, ms"]
    assert 0 < few["weights read once, ms"] < 0.6 * whole
    assert few["tokens/s"] == pytest.approx(1e3 / few["ours ms"])
    assert {f"decode, cache in {bits} bits, 40 tokens" for bits in (16, 8, 4)} <= set(figures)
    assert host_of(gpu.model) is None


def test_a_time_per_token_is_the_difference_of_two_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]

    class Model:
        def generate(self, ids: torch.Tensor, max_new_tokens: int, **options: object) -> None:
            now[0] += 10.0 + 0.25 * max_new_tokens

    monkeypatch.setattr("hf_accel.cli.gpu_works.time.perf_counter", lambda: now[0])
    ids = torch.zeros(1, 3, dtype=torch.long)
    assert timed(Model(), Call(3, few=4, many=12), ids)() == pytest.approx(0.25)
    assert timed(Model(), Call(3, few=0, many=1), ids)() == pytest.approx(10.25)
