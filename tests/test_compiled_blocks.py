"""Steps whose decoder layers are compiled give stock's text; compiling them is left where it gains nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from comparison import assert_equal_calls
from models import build, stock
from test_generate import batch, plain

import hf_accel
from hf_accel import AttentionConfig, CompilationConfig, DecodingConfig
from hf_accel.compilation import artefacts, blocks, patcher, runner
from hf_accel.compilation.payoff import step_seconds
from hf_accel.compilation.slots import Slot
from hf_accel.compilation.step import StaticStep

COMPILED = [DecodingConfig(), AttentionConfig(), CompilationConfig(mode="compile")]


@pytest.fixture(autouse=True)
def _quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers are traced as for any compiler, and run as they were traced; the first steps are compiled already."""
    monkeypatch.setattr(blocks, "BACK_END", "eager")
    monkeypatch.setattr(runner, "PAYS_BACK", 0)
    monkeypatch.setattr(patcher, "step_seconds", lambda *_: (2.0, 1.0))
    torch._dynamo.reset()


def counts(model: Any) -> Any:
    return hf_accel.report(model).to_dict()["compilation"]


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen3"])
def test_calls_equal_stock(name: str) -> None:
    model = hf_accel.optimize(build(name), COMPILED)
    for call in (plain(do_sample=False, max_new_tokens=30), batch(do_sample=True)):
        assert_equal_calls(stock(name), model, call)
    found = counts(model)
    assert (found["eager_steps"], found["calls_without_buffers"]) == ({}, {})
    assert found["replays"] == 29 + 13


def test_layers_that_are_alike_are_compiled_once() -> None:
    model = hf_accel.optimize(build("llama"), AttentionConfig())
    torch._dynamo.utils.counters.clear()
    make_step = blocks.CompiledSteps()
    with torch.no_grad():
        for _ in range(2):
            slot = Slot(1, 64, None, torch.device("cpu"))
            for index in range(3):
                slot.layer(index, None, *(torch.zeros(1, 2, 0, 10) for _ in range(2)))
            make_step(model, slot, 1).run()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]


def test_the_model_itself_is_not_compiled() -> None:
    model = build("llama")
    kinds = [type(module) for module in model.modules()]
    hf_accel.optimize(model, COMPILED)
    plain(do_sample=False)(model)
    assert all(module._compiled_call_impl is None for module in model.modules())
    assert [type(module) for module in model.modules()][1:] == kinds[1:]
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1, 2]


def test_other_weights_are_compiled_again() -> None:
    model, other = hf_accel.optimize(build("llama"), COMPILED), build("llama")
    plain(do_sample=False)(model)
    for target in (model, other):
        with torch.no_grad():
            target.lm_head.weight = torch.nn.Parameter(target.lm_head.weight.flip(0))
    assert_equal_calls(other, model, plain(do_sample=False))


def test_what_is_not_faster_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patcher, "step_seconds", lambda *_: (1.0, 1.0))
    model = hf_accel.optimize(build("llama"), COMPILED)
    (step,) = (step for step in hf_accel.report(model).applied if isinstance(step.config, CompilationConfig))
    assert "steps run as they are" in step.summary
    assert counts(model) is None
    assert_equal_calls(stock("llama"), model, plain(do_sample=False))


def test_both_ways_are_timed() -> None:
    eager, static = step_seconds(build("llama"), StaticStep)
    assert 0 < eager < 1
    assert 0 < static < 1


def test_without_a_compiler_there_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(artefacts.shutil, "which", lambda name: None)
    with pytest.raises(hf_accel.UnsupportedModelError, match=r"needs a C\+\+ compiler"):
        hf_accel.optimize(build("llama"), CompilationConfig(mode="compile"))


def test_damaged_artefacts_are_an_error(tmp_path: Path) -> None:
    model = build("llama")
    kept = artefacts.Artefacts(str(tmp_path), model)
    kept.path.write_bytes(b"nothing of the kind")
    with pytest.raises(hf_accel.StorageError, match="Delete it"):
        hf_accel.optimize(model, CompilationConfig(mode="compile", folder=str(tmp_path)))
    assert_equal_calls(stock("llama"), model, plain(do_sample=False))
    with pytest.raises(hf_accel.ConfigError, match="compiles nothing"):
        CompilationConfig(folder="somewhere")


@pytest.mark.slow
def test_the_compiler_gives_stocks_text_and_its_kernels_are_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(blocks, "BACK_END", "inductor")
    config = CompilationConfig(mode="compile", folder=str(tmp_path))
    model = hf_accel.optimize(build("llama"), [DecodingConfig(), AttentionConfig(), config])
    assert_equal_calls(stock("llama"), model, batch(do_sample=False))
    assert [path.suffix for path in tmp_path.iterdir()] == [".artefacts"]
    artefacts.Artefacts(str(tmp_path), model).load()
