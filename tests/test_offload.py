"""Models whose experts lie in a file write what they write with all of them in memory."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from fingerprint import changes, fingerprint
from mixtures import MIXTURES, UNREGISTERED, mixture
from models import padded, prompt
from test_mxfp4_files import _written as mxfp4_folder
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

import hf_accel
from hf_accel.core.drift import CACHE
from hf_accel.core.steps.goal import Goal
from hf_accel.core.steps.patcher import Patcher
from hf_accel.core.steps.setting import Setting
from hf_accel.experts.offload import ExpertOffloadConfig
from hf_accel.experts.offload.describing import described
from hf_accel.experts.offload.module import Offloaded
from hf_accel.experts.offload.slots import Slots

pytestmark = pytest.mark.native
REGISTERED = [name for name in MIXTURES if name != UNREGISTERED]
DRAFTS = [hf_accel.DecodingConfig(), hf_accel.SpeculativeConfig(drafter="lookup", max_draft_tokens=3, adaptive=False)]


def texts(model: PreTrainedModel) -> list[Tensor]:
    """Return greedy text of one prompt and of a padded batch, and sampled text."""
    ids, batch = prompt(), padded([3, 9, 6])
    torch.manual_seed(0)
    return [
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False),
        model.generate(**batch, max_new_tokens=8, do_sample=False),
        model.generate(**batch, max_new_tokens=8, do_sample=True, top_p=0.9),
    ]


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def modules_of(model: Any) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, Offloaded)]


def slots_of(model: Any) -> Slots:
    slots: Slots = modules_of(model)[0].slots
    return slots


def section(model: Any) -> dict[str, Any]:
    found: dict[str, Any] = hf_accel.report(model).to_dict()["offloaded_experts"]
    return found


def least(model: Any) -> ExpertOffloadConfig:
    """Return the config with room for the experts of one token in one layer, and no more."""
    stored, _ = described(model, model.dtype)
    return ExpertOffloadConfig(budget_bytes=2 * max(stored[0][1].bytes_of))


@pytest.mark.parametrize("name", REGISTERED)
def test_text_is_stocks(name: str) -> None:
    model = mixture(name)
    before = texts(model)
    hf_accel.optimize(model, least(model))
    assert equal(texts(model), before)
    found = section(model)
    assert found["held_bytes"] <= found["budget_bytes"] < found["experts_bytes"]
    assert found["misses"] > 0
    assert found["handed_on"] == 0
    hf_accel.restore(model)
    assert not modules_of(model)
    assert equal(texts(model), before)


@pytest.mark.parametrize("name,bits", [("qwen3_moe", 4), ("gpt_oss", 8), ("mixtral", 2)])
def test_text_of_packed_experts_is_that_in_memory(name: str, bits: int, tmp_path: Path) -> None:
    model = mixture(name)
    quantized = hf_accel.WeightOnlyConfig(bits=bits)
    with hf_accel.optimized(model, quantized):
        before = texts(model)
    stock = texts(model)
    hf_accel.optimize(model, [quantized, ExpertOffloadConfig(share=0.4)])
    assert equal(texts(model), before)
    assert section(model)["misses"] > 0
    assert section(model)["handed_on"] == 0
    assert equal(texts(copy.deepcopy(model)), before)
    hf_accel.save_pretrained(model, tmp_path)
    assert equal(texts(hf_accel.from_pretrained(tmp_path)), before)
    hf_accel.restore(model)
    assert equal(texts(model), stock)


def test_text_with_drafts_is_stocks() -> None:
    model = mixture("qwen3_moe")
    before = texts(model)
    hf_accel.optimize(model, [least(model), hf_accel.KVCacheConfig(), *DRAFTS])
    assert equal(texts(model), before)
    assert section(model)["misses"] > 0


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_several_rounds_make_the_same_bits_as_one(name: str, dtype: torch.dtype) -> None:
    """A prompt wants every expert of a layer, of which two are in memory at a time."""
    model = mixture(name).to(dtype)
    ids = padded([30, 40])
    with hf_accel.optimized(model, ExpertOffloadConfig(share=1.0)), torch.no_grad():
        expected = model(**ids).logits
        assert section(model)["hits"] + section(model)["misses"] == len(slots_of(model).sizes), "one round each"
    hf_accel.optimize(model, least(model))
    with torch.no_grad():
        assert torch.equal(model(**ids).logits, expected)
    assert section(model)["handed_on"] == 0


def test_threads_write_what_one_writes() -> None:
    model = mixture("mixtral")
    asked = [{"inputs": prompt(1, 9, seed), "max_new_tokens": 10, "do_sample": False} for seed in range(4)]
    before = [model.generate(**given) for given in asked]
    hf_accel.optimize(model, least(model))
    found: dict[int, Tensor] = {}

    def ask(index: int) -> None:
        for _ in range(3):
            found[index] = model.generate(**asked[index])
            assert torch.equal(found[index], before[index])

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(found) == [0, 1, 2, 3]
    assert all(torch.equal(found[index], before[index]) for index in found)
    assert section(model)["held_bytes"] <= section(model)["budget_bytes"]


def test_weights_leave_memory_and_come_back() -> None:
    model = mixture("olmoe")
    parameters = {name: (p, p.detach().clone()) for name, p in model.named_parameters()}
    freed = [weakref.ref(p.untyped_storage()) for name, (p, _) in parameters.items() if ".experts." in name]
    hf_accel.optimize(model, ExpertOffloadConfig())
    gc.collect()
    assert not any(storage() for storage in freed), "the weights in memory are kept by somebody"
    assert all(torch.equal(p, values) for p, values in parameters.values())
    assert not any(p.untyped_storage().resizable() for name, (p, _) in parameters.items() if ".experts." in name)
    file = weakref.ref(slots_of(model).file)
    hf_accel.restore(model)
    gc.collect()
    assert file() is None, "the file is kept open"
    assert all(p.untyped_storage().resizable() for p in model.parameters()), "weights lie in the mapped file still"
    assert all(p is parameters[name][0] and torch.equal(p, parameters[name][1]) for name, p in model.named_parameters())


def test_packed_weights_leave_memory() -> None:
    model = mixture("olmoe")
    hf_accel.optimize(model, hf_accel.WeightOnlyConfig())
    texts(model)
    saved = copy.deepcopy(model)
    freed = [weakref.ref(b.untyped_storage()) for name, b in saved.named_buffers() if ".experts." in name]
    texts(saved)  # a native call of the experts' own holds their memory now
    hf_accel.optimize(saved, ExpertOffloadConfig())
    gc.collect()
    assert len(freed) > 8
    assert not any(storage() for storage in freed), "the weights in memory are kept by somebody"
    assert equal(texts(saved), texts(model))
    hf_accel.restore(saved)
    gc.collect()
    assert all(buffer.untyped_storage().resizable() for buffer in saved.buffers() if buffer is not None)
    assert equal(texts(saved), texts(model))


def test_a_dropped_model_leaves_nothing(tmp_path: Path) -> None:
    model = mixture("olmoe")
    hf_accel.optimize(model, ExpertOffloadConfig(folder=str(tmp_path)))
    texts(model)
    assert not os.listdir(tmp_path), "the file has a name"
    file = weakref.ref(slots_of(model).file)
    del model
    gc.collect()
    assert file() is None


def test_copies_and_files_are_stocks(tmp_path: Path) -> None:
    model = mixture("gpt_oss")
    before = texts(model)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    hf_accel.optimize(model, least(model))
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert not modules_of(other)
        assert equal(texts(other), before)
    model.save_pretrained(tmp_path)
    assert equal(texts(type(model).from_pretrained(tmp_path, dtype=model.dtype)), before)


@torch.no_grad()
def test_weights_that_are_written_to_are_used() -> None:
    model, other = mixture("mixtral"), mixture("mixtral")
    hf_accel.optimize(model, least(model))
    texts(model)
    for each in (model, other):
        each.model.layers[1].mlp.experts.down_proj[2].mul_(-1.5)
    expected = texts(other)
    assert equal(texts(model), expected)
    assert section(model)["handed_on"] > 0
    hf_accel.restore(model)
    assert equal(texts(model), expected)
    assert torch.equal(model.model.layers[1].mlp.experts.down_proj, other.model.layers[1].mlp.experts.down_proj)


def test_gradients_pass_through_the_models_own_code() -> None:
    model, other = mixture("mixtral"), mixture("mixtral")
    hf_accel.optimize(model, least(model))
    for each in (model, other):
        each(prompt(), labels=prompt()).loss.backward()
    assert torch.equal(model.model.layers[0].mlp.gate.weight.grad, other.model.layers[0].mlp.gate.weight.grad)
    assert torch.equal(model.model.layers[0].mlp.experts.down_proj.grad,
                       other.model.layers[0].mlp.experts.down_proj.grad)  # fmt: skip


def test_the_report_says_what_the_budget_costs() -> None:
    model = mixture("qwen3_moe")
    hf_accel.optimize(model, ExpertOffloadConfig(share=0.5))
    assert section(model)["hit_rate"] is None
    texts(model)
    found, text = section(model), str(hf_accel.report(model))
    assert found["hit_rate"] == found["hits"] / (found["hits"] + found["misses"])
    assert found["read_bytes"] == found["misses"] * slots_of(model).sizes[0]
    assert f"90% of the routing needs {found['concentration']:.0%} of the experts" in text
    assert f"{found['misses']} misses" in text


def test_a_plan_says_what_a_budget_will_cost() -> None:
    """As it is found when the text is then read token by token, which is the routing of a single call."""
    model, ids = mixture("qwen3_moe"), prompt(1, 120)
    before = fingerprint(model)
    [preview] = hf_accel.plan(model, ExpertOffloadConfig(share=0.5), calibration=ids).previews
    assert not changes(before, fingerprint(model))
    hf_accel.optimize(model, ExpertOffloadConfig(share=0.5))
    cache = DynamicCache()
    with torch.no_grad():
        for token in ids[0]:
            model(token[None, None], **{CACHE: cache})
    found = section(model)
    assert preview.concentration == pytest.approx(found["concentration"], abs=0.01)
    assert preview.hit_rate == pytest.approx(found["hit_rate"], abs=0.03)
    assert preview.hit_rate < 0.97
    assert f"{preview.hit_rate:.1%} of what a token wants is in memory, on 120 tokens" in str(preview)
    assert hf_accel.plan(mixture("qwen3_moe"), ExpertOffloadConfig()).previews[0].source == "the model's own samples"


def test_no_goal_chooses_it() -> None:
    setting = Setting.of(mixture("olmoe"))
    for goal in (Goal("exact"), Goal("fast", 0.05), Goal("memory", 0.2, saves_memory=True)):
        offer = Patcher.for_config(ExpertOffloadConfig()).candidates(goal, setting)
        assert not offer.configs


def test_a_checkpoint_that_was_loaded_packed() -> None:
    """As a user has it who never had room for the original: MXFP4 as stored, on the file it is read from no more."""
    model = hf_accel.from_pretrained(mxfp4_folder())
    before = texts(model)
    hf_accel.optimize(model, least(model))
    assert equal(texts(model), before)
    assert section(model)["handed_on"] == 0
    assert section(model)["misses"] > 0
    hf_accel.restore(model)
    assert equal(texts(model), before)


def test_hooks_on_packed_products_fire() -> None:
    model = mixture("qwen3_moe")
    hf_accel.optimize(model, [hf_accel.WeightOnlyConfig(), ExpertOffloadConfig()])
    before = texts(model)
    assert section(model)["handed_on"] == 0
    seen: list[Any] = []
    experts = modules_of(model)[0]
    handles = [product.register_forward_hook(lambda *args: seen.append(args)) for product in experts.down_proj]
    assert equal(texts(model), before)
    assert seen
    for handle in handles:
        handle.remove()
    served = section(model)["handed_on"]
    assert equal(texts(model), before)
    assert section(model)["handed_on"] == served > 0
