"""Weights, packs and caches in large pages: the same values at all times, and a reason where the system refuses."""

from __future__ import annotations

import copy
import io
import pickle
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from models import prompt
from reading import FOUR, assert_same, packs, written
from transformers import AutoConfig, AutoModelForCausalLM

import hf_accel
from hf_accel import ConfigError, KVCacheConfig, LargePagesConfig, UnsupportedModelError, WeightOnlyConfig
from hf_accel.cache.layers.growing import GrowingLayer
from hf_accel.kernels import native, pages
from hf_accel.measure.pages import PageTrial
from hf_accel.pages import patcher

SIZES = dict(hidden_size=512, intermediate_size=2048, num_hidden_layers=1, num_attention_heads=8, vocab_size=2048)
REFUSED = "nobody gets large pages here."
Patch = pytest.MonkeyPatch


OBSTACLE, PAGE_BYTES = pages.obstacle, pages.page_bytes


def forgotten() -> None:
    OBSTACLE.cache_clear()
    PAGE_BYTES.cache_clear()


@pytest.fixture(autouse=True)
def _no_trial(monkeypatch: Patch) -> Iterator[None]:
    monkeypatch.setattr(patcher, "page_trial", lambda dtype: PageTrial(20e9, 22e9, 0.5))
    forgotten()
    yield
    forgotten()


def large_model(**changes: Any) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", **SIZES, tie_word_embeddings=True, **changes)
    return AutoModelForCausalLM.from_config(config).eval()


def saved(folder: Path) -> Path:
    large_model().save_pretrained(folder / "model")
    return folder / "model"


def text(model: Any) -> list[int]:
    return model.generate(prompt(), max_new_tokens=6, do_sample=False)[0].tolist()


def refuses(monkeypatch: Patch) -> None:
    monkeypatch.setattr(pages, "_madvise", lambda start, stop, advice: False)


def is_granted() -> bool:
    return pages.collapse(torch.ones(8 << 20, dtype=torch.uint8)) > 0


# ---- the memory itself


def test_memory_in_use_keeps_place_and_values() -> None:
    tensor = torch.arange(8 << 20, dtype=torch.int32)
    expected, place, version = tensor.clone(), tensor.data_ptr(), tensor._version
    found = pages.collapse(tensor)
    assert 0 <= found <= tensor.nbytes
    assert (tensor.data_ptr(), tensor._version) == (place, version)
    assert torch.equal(tensor, expected)


def test_the_system_tells_large_pages_where_it_grants_them() -> None:
    if not is_granted():
        pytest.skip("this system grants no large pages")
    before = pages.large_bytes()
    tensor = torch.ones(64 << 20, dtype=torch.uint8)
    found = pages.collapse(tensor)
    assert found > 32 << 20
    assert pages.large_bytes() - before >= found // 2


def test_only_memory_that_fills_a_page_is_asked_for(monkeypatch: Patch) -> None:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(pages, "_madvise", lambda start, stop, advice: asked.append((start, stop)) is None)
    monkeypatch.setattr(pages, "obstacle", lambda: None)
    for tensor in (torch.empty(100), torch.empty(1 << 30, device="meta"), torch.empty(0)):
        assert pages.advise(tensor) is tensor
        assert pages.collapse(tensor) == 0
    assert asked == []
    whole = torch.empty(16 << 20, dtype=torch.uint8)
    part = whole[3 << 20 : 9 << 20]  # in the memory of a larger one, as in a file
    pages.advise(part)
    page = pages.page_bytes()
    ((start, stop),) = asked
    assert start <= part.data_ptr() < start + page
    assert stop - page < part.data_ptr() + part.nbytes <= stop
    assert pages.collapse(part) == part.nbytes


def test_a_refusing_system_is_not_asked_for_every_page(monkeypatch: Patch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(pages, "_madvise", lambda start, stop, advice: bool(asked.append(start)))
    assert pages.collapse(torch.empty(64 << 20, dtype=torch.uint8)) == 0
    assert len(asked) <= 5  # the whole of it, and four pages


def never(root: Path, patch: Patch) -> None:
    root.mkdir()
    (root / "enabled").write_text("always madvise [never]\n")
    patch.setattr(pages, "ROOT", root)


def without_the_kernels_part(root: Path, patch: Patch) -> None:
    patch.setattr(pages, "ROOT", root)


def disabled(root: Path, patch: Patch) -> None:
    root.write_text("Name:\tpython\nTHP_enabled:\t0\n")
    patch.setattr(pages, "STATUS", root)


def another_system(root: Path, patch: Patch) -> None:
    patch.setattr(sys, "platform", "darwin")


@pytest.mark.parametrize("system", [never, without_the_kernels_part, disabled, another_system])
def test_systems_without_large_pages(system: Callable[[Path, Patch], None], tmp_path: Path, monkeypatch: Patch) -> None:
    model, expected = large_model(), text(large_model())
    with monkeypatch.context() as patch:
        system(tmp_path / "system", patch)
        forgotten()
        reason = pages.obstacle()
        assert reason is not None
        assert len(reason.split()) > 4
        hf_accel.optimize(model, [LargePagesConfig(), KVCacheConfig()])
        assert text(model) == expected
        assert pages.copied(torch.arange(4 << 20)).tolist()[-1] == (4 << 20) - 1
        (skip,) = [skip.reason for skip in hf_accel.report(model).skipped if skip.what == "LargePagesConfig"]
        assert skip == reason
    forgotten()
    assert pages.obstacle() != reason


def test_tensors_behave_as_any_other() -> None:
    tensor = pages.copied(torch.arange(1 << 20))
    expected = torch.arange(1 << 20)
    buffer = io.BytesIO()
    torch.save(tensor, buffer)
    buffer.seek(0)
    for again in (copy.deepcopy(tensor), pickle.loads(pickle.dumps(tensor)), torch.load(buffer), tensor.numpy()):
        assert torch.equal(torch.as_tensor(again), expected)
    assert tensor.data_ptr() % 64 == 0
    assert torch.equal(pages.copied(expected).resize_(1 << 21)[: 1 << 20], expected)
    assert torch.equal(pages.copied(expected).share_memory_(), expected)
    assert torch.equal(pages.copied(expected.view(1024, 1024).T), expected.view(1024, 1024).T)


# ---- weights as they lie


def test_weights_in_memory_stay_where_they_are() -> None:
    if not is_granted():
        pytest.skip("this system grants no large pages")
    model = large_model()
    for parameter in model.parameters():  # allocated one by one, their ends may have no whole page
        parameter.data = torch.empty(parameter.nbytes + (4 << 20), dtype=torch.uint8)[: parameter.nbytes].view(
            torch.float32
        ).view_as(parameter).copy_(parameter.data)  # fmt: skip
    places, expected = [p.data_ptr() for p in model.parameters()], text(model)
    hf_accel.optimize(model, LargePagesConfig())
    assert [p.data_ptr() for p in model.parameters()] == places
    assert hf_accel.report(model).extra_bytes == 0
    assert text(model) == expected
    assert "GB/s" in str(hf_accel.report(model))


@pytest.mark.parametrize("originals", ["keep", "drop"])
def test_weights_in_a_file_are_copied_and_come_back(originals: str, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(saved(tmp_path))
    before = {name: (parameter, parameter.data_ptr()) for name, parameter in model.named_parameters()}
    bits, expected = {name: p.clone() for name, p in model.named_parameters()}, text(model)
    hf_accel.optimize(model, LargePagesConfig(), originals=originals)
    assert text(model) == expected
    assert model.lm_head.weight is model.model.embed_tokens.weight
    is_copied = {name for name, p in model.named_parameters() if p.data_ptr() != before[name][1]}
    assert is_copied == {name for name, p in model.named_parameters() if pages.is_large(p)}
    copied = sum(bits[name].nbytes for name in is_copied)
    assert hf_accel.report(model).extra_bytes == (copied if originals == "keep" else 0)
    hf_accel.restore(model)
    for name, parameter in model.named_parameters():
        assert parameter is before[name][0]
        assert torch.equal(parameter, bits[name])
        assert originals == "drop" or parameter.data_ptr() == before[name][1]


def test_weights_that_share_a_files_memory_go_on_sharing(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(saved(tmp_path))
    layer = model.model.layers[0].mlp
    layer.up_proj.weight = torch.nn.Parameter(layer.gate_proj.weight.data)
    hf_accel.optimize(model, LargePagesConfig())
    assert layer.up_proj.weight.data_ptr() == layer.gate_proj.weight.data_ptr()
    assert "2 weights that share memory" in str(hf_accel.report(model))


def test_a_system_that_refuses_at_last(monkeypatch: Patch) -> None:
    model, expected = large_model(), text(large_model())
    with monkeypatch.context() as patch:
        refuses(patch)
        hf_accel.optimize(model, LargePagesConfig())
        assert "beneath 0.0 of" in str(hf_accel.report(model))
        assert text(model) == expected


def test_models_without_large_weights_are_refused(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(written(tmp_path, "llama"))
    with pytest.raises(UnsupportedModelError, match="fills a large page of"):
        hf_accel.optimize(model, LargePagesConfig())


def test_no_goal_offers_it_and_a_plan_tells_its_cost() -> None:
    model = large_model()
    assert "LargePagesConfig" not in str(hf_accel.plan(model, "exact"))
    shown = str(hf_accel.plan(model, [LargePagesConfig()]))
    assert "0.50 s per GB" in shown
    assert "1.10 x" in shown


# ---- packs, caches, loading


def test_packed_weights_are_settled(monkeypatch: Patch) -> None:
    settled: list[int] = []
    monkeypatch.setattr(pages, "collapse", lambda tensor: settled.append(tensor.nbytes) or 0)
    model = hf_accel.optimize(large_model(), WeightOnlyConfig(bits=8))
    assert model.model.layers[0].mlp.up_proj.codes.nbytes in settled


def test_buffers_of_a_cache_are_advised_before_they_are_written(monkeypatch: Patch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(pages, "_madvise", lambda start, stop, advice: asked.append(stop - start) is None)
    states = torch.randn(1, 8, 4096, 64)
    keys, values = GrowingLayer().update(states, 2 * states)
    assert len(asked) == 2
    assert torch.equal(keys, states)
    assert torch.equal(values, 2 * states)


def test_files_are_read_straight_into_memory(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    model = hf_accel.load(folder, [LargePagesConfig()])
    mapped = [line for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith("model.safetensors")]
    spans = [[int(place, 16) for place in line.split()[0].split("-")] for line in mapped]
    assert not any(start <= p.data_ptr() < stop for p in model.parameters() for start, stop in spans)
    assert_same(model, AutoModelForCausalLM.from_pretrained(folder))
    assert_same(hf_accel.load(folder, hf_accel.Plan.of([LargePagesConfig()])), hf_accel.load(folder, []))


def test_a_file_that_lacks_a_tensor_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = saved(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(hf_accel.CheckpointError, match=r"model\.norm\.weight"):
        hf_accel.load(folder, [LargePagesConfig()])
    with pytest.raises(ConfigError, match="keeps packed weights"):
        hf_accel.load(folder, [LargePagesConfig()], cache=True)


def test_packs_are_read_instead_of_mapped(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    first = hf_accel.load(folder, [FOUR, LargePagesConfig()], cache=True)
    second = hf_accel.load(folder, [FOUR, LargePagesConfig()], cache=True)
    assert_same(first, second)
    path = str(packs(folder)[0])
    assert not any(line.endswith(path) for line in Path("/proc/self/maps").read_text().splitlines())
    assert all(tensor.data_ptr() % 64 == 0 for tensor in second.state_dict().values())


@pytest.mark.native
def test_a_pack_serves_machines_of_other_instruction_sets(tmp_path: Path) -> None:
    """A pack written where one instruction set is in use is read where a feature is missing, and vice versa."""
    folder, before, made = saved(tmp_path), native.status().isa, {}
    try:
        for isa in native.supported_isas():
            native.set_isa(isa)
            for path in packs(folder) if (folder.parent / "model.hf_accel").exists() else ():
                path.unlink()
            hf_accel.load(folder, FOUR, cache=True)
            made[isa] = packs(folder)[0].read_bytes()
        assert len(set(made.values())) == 1
        for isa in native.supported_isas():
            native.set_isa(isa)
            mapped = hf_accel.load(folder, FOUR, cache=True)
            own = hf_accel.optimize(AutoModelForCausalLM.from_pretrained(folder), FOUR)
            assert text(mapped) == text(own), isa
    finally:
        native.set_isa(before)
