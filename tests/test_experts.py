"""Models whose experts run natively write what they write by transformers' own code."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from typing import Any

import pytest
import torch
from heads import model_of
from mixtures import LAYERED, MIXTURES, UNREGISTERED, mixture
from models import Tiny, build, padded, prompt
from torch import Tensor
from transformers import PreTrainedModel

import hf_accel
from hf_accel.core.model.anatomy import Anatomy, holds_experts
from hf_accel.core.model.experts import RoutedExperts, described_experts
from hf_accel.experts.implementation import STEPS
from hf_accel.experts.router import NativeRouter
from hf_accel.kernels import native

pytestmark = pytest.mark.native
NATIVE = [hf_accel.NativeExpertsConfig()]
LAYERS = [hf_accel.KVCacheConfig(), hf_accel.NativeLinearConfig(), hf_accel.DecoderBlockConfig()]
DRAFTS = [hf_accel.DecodingConfig(), hf_accel.SpeculativeConfig(drafter="lookup", max_draft_tokens=3, adaptive=False)]
REGISTERED = [name for name in MIXTURES if name != UNREGISTERED]


def texts(model: PreTrainedModel) -> list[Tensor]:
    """Return greedy text of one prompt and of a padded batch, and sampled text."""
    ids, batch = prompt(), padded([3, 9, 6])
    torch.manual_seed(0)
    return [
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False),
        model.generate(**batch, max_new_tokens=12, do_sample=False),
        model.generate(**batch, max_new_tokens=12, do_sample=True, top_p=0.9),
    ]


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def experts_of(model: PreTrainedModel) -> list[Any]:
    return [module for module in model.modules() if holds_experts(module)]


def implementations(model: PreTrainedModel) -> set[str]:
    return {str(module.config._experts_implementation) for module in experts_of(model)}


def steps_of(model: PreTrainedModel) -> list[Any]:
    return [STEPS[module] for module in experts_of(model)]


@pytest.mark.parametrize("name", REGISTERED)
def test_text_is_stocks(name: str) -> None:
    model = mixture(name)
    before = texts(model)
    rest = LAYERS if name in LAYERED else [hf_accel.NativeLinearConfig()]
    hf_accel.optimize(model, [*NATIVE, *rest])
    assert not hf_accel.report(model).skipped
    assert equal(texts(model), before)
    assert all(step.counts.sum() for step in steps_of(model))
    hf_accel.restore(model)
    assert implementations(model) == {"grouped_mm"}
    assert equal(texts(model), before)


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "granitemoe"])
def test_text_with_drafts_is_stocks(name: str) -> None:
    model = mixture(name)
    before = texts(model)
    hf_accel.optimize(model, [*NATIVE, *(LAYERS if name in LAYERED else []), *DRAFTS])
    assert equal(texts(model), before)


@pytest.mark.parametrize("threads", [1, 2])
def test_rows_are_those_that_routers_send(threads: int) -> None:
    model = mixture("olmoe")
    hf_accel.optimize(model, [*NATIVE, *LAYERS])
    sent = [torch.zeros(4, dtype=torch.int64) for _ in model.model.layers]

    def count(index: int) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            sent[index].add_(torch.bincount(output[2].flatten(), minlength=4))

        return hook

    for index, layer in enumerate(model.model.layers):
        layer.mlp.gate.register_forward_hook(count(index))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        texts(model)
    finally:
        torch.set_num_threads(before)
    assert [step.counts.tolist() for step in steps_of(model)] == [counts.tolist() for counts in sent]
    routing = hf_accel.report(model).to_dict()["expert_routing"]
    assert [layer["counts"] for layer in routing["layers"].values()] == [counts.tolist() for counts in sent]
    form = steps_of(model)[0].form
    assert routing["bytes_per_token"] == 2 * 2 * 3 * form.inner * form.hidden * 4


def test_a_token_reads_the_experts_that_it_is_sent_to() -> None:
    model = mixture("qwen2_moe")  # two of four experts, and a shared one
    table, rest = model.get_input_embeddings().weight.numel(), sum(p.numel() for p in model.parameters())
    idle = sum(p.numel() for module in experts_of(model) for p in module.parameters()) // 2
    assert Anatomy.of(model).read_bytes == 4 * (rest - table - idle)
    hf_accel.optimize(model, [hf_accel.WeightOnlyConfig(bits=8), *NATIVE])
    idle = sum(module.expert_bytes * 2 for module in model.modules() if isinstance(module, RoutedExperts))
    assert Anatomy.of(model).read_bytes == Anatomy.of(model).weight_bytes - 4 * table - idle


@pytest.mark.parametrize(
    "name", ["mixtral", "qwen3_moe", "olmoe", "granitemoe", "qwen2_moe", "deepseek_v2", "aria", "gpt_oss"]
)
def test_routers_return_what_they_returned(name: str) -> None:
    def routed(model: PreTrainedModel) -> list[Any]:
        found: list[Any] = []
        for module in model.modules():
            if hasattr(module, "top_k") and "weight" in module._parameters:
                module.register_forward_hook(lambda module, args, output: found.append(output))
        model.generate(prompt(), max_new_tokens=6, do_sample=False)
        return found

    expected = routed(mixture(name))
    model = mixture(name)
    hf_accel.optimize(model, NATIVE)
    routers = [module for module in model.modules() if isinstance(module, NativeRouter)]
    assert len(routers) == len(experts_of(model))
    found = routed(model)
    assert len(found) == len(expected) > 0
    for ours, stocks in zip(found, expected, strict=True):
        assert [x.dtype for x in ours] == [x.dtype for x in stocks]
        assert torch.equal(ours[2], stocks[2])
        torch.testing.assert_close(ours[:2], stocks[:2], rtol=1e-3, atol=1e-4)
    hf_accel.restore(model)
    assert not any(isinstance(module, NativeRouter) for module in model.modules())


def test_a_router_that_chooses_within_groups_is_left_alone() -> None:
    groups = {"topk_method": "group_limited_greedy", "n_routed_experts": 6, "n_group": 3, "topk_group": 1}
    model = model_of(Tiny("deepseek_v2", MIXTURES["deepseek_v2"].config | groups))
    before = texts(model)
    hf_accel.optimize(model, NATIVE)
    assert not any(isinstance(module, NativeRouter) for module in model.modules())
    assert all(step.counts.sum() == 0 for step in steps_of(model))
    assert equal(texts(model), before)


@pytest.mark.parametrize("norm", [False, True])
def test_a_router_of_large_weights_is_told_from_one_without_norm(norm: bool) -> None:
    model = model_of(Tiny("qwen3_moe", MIXTURES["qwen3_moe"].config | {"norm_topk_prob": norm}))
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.weight.mul_(1e3)  # every random token goes to one expert
    hf_accel.optimize(model, NATIVE)
    routers = [module for module in model.modules() if isinstance(module, NativeRouter)]
    assert [router.step.routing.is_normed for router in routers] == [norm, norm]


def test_a_router_of_more_digits_than_its_weight_is_left_alone() -> None:
    model = mixture("deepseek_v2").bfloat16()  # it multiplies in fp32
    hf_accel.optimize(model, NATIVE)
    assert not any(isinstance(module, NativeRouter) for module in model.modules())
    model = mixture("granitemoe").bfloat16()  # it widens what was rounded
    hf_accel.optimize(model, NATIVE)
    assert sum(isinstance(module, NativeRouter) for module in model.modules()) == 2


@pytest.mark.parametrize("change", ["weight", "top_k", "norm_topk_prob"])
def test_a_changed_router_is_followed(change: str) -> None:
    def changed(model: PreTrainedModel) -> list[Tensor]:
        gate = model.model.layers[0].mlp.gate
        if change == "weight":
            with torch.no_grad():
                gate.weight.neg_()
        else:
            setattr(gate, change, {"top_k": 3, "norm_topk_prob": not gate.norm_topk_prob}[change])
        return texts(model)

    before, expected = texts(mixture("qwen3_moe")), changed(mixture("qwen3_moe"))
    model = mixture("qwen3_moe")
    hf_accel.optimize(model, [*NATIVE, *LAYERS])
    found = changed(model)
    assert equal(found, expected)
    assert not equal(found, before)


def test_calls_of_our_own_are_not_counted() -> None:
    model = mixture("qwen3_moe")
    hf_accel.optimize(model, [*NATIVE, *LAYERS, *DRAFTS])
    assert not any(step.counts.any() for step in steps_of(model))
    assert "no tokens were routed yet" in str(hf_accel.report(model))


def test_experts_in_no_registry_are_left_to_stock() -> None:
    model = mixture(UNREGISTERED)
    with pytest.raises(hf_accel.UnsupportedModelError, match="no stacked experts"):
        hf_accel.optimize(model, NATIVE)
    with pytest.raises(hf_accel.UnsupportedModelError, match="no stacked experts"):
        hf_accel.optimize(build("llama"), NATIVE)


def test_an_unknown_gate_is_left_to_stock() -> None:
    model = mixture("mixtral")
    experts_of(model)[0].act_fn = torch.nn.Tanh()
    before = texts(model)
    hf_accel.optimize(model, NATIVE)
    [skip] = hf_accel.report(model).skipped
    assert "layers.0.mlp.experts stay with transformers' code: their gate" in skip.reason
    assert equal(texts(model), before)


def test_a_result_that_differs_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    right = native.NativeExperts.__call__
    monkeypatch.setattr(native.NativeExperts, "__call__", lambda *a, **k: right(*a, **k) * 1.01)
    model = mixture("mixtral")
    with pytest.raises(hf_accel.VerificationError, match=r"layers\.0\.mlp\.experts .* differ from their own code"):
        hf_accel.optimize(model, NATIVE)
    assert implementations(model) == {"grouped_mm"}


@pytest.mark.parametrize("layers", [False, True], ids=["experts", "layers"])
def test_changed_weights_are_followed(layers: bool) -> None:
    def changed(model: PreTrainedModel) -> list[list[Tensor]]:
        found = [texts(model)]
        with torch.no_grad():
            experts_of(model)[1].down_proj.mul_(-1.5)
            found.append(texts(model))
            experts_of(model)[0].gate_up_proj.data = experts_of(model)[1].gate_up_proj.data.clone()
            found.append(texts(model))
        experts_of(model)[0].act_fn = torch.nn.ReLU()
        found.append(texts(model))
        experts_of(model)[1].act_fn = torch.nn.Tanh()  # no native form
        found.append(texts(model))
        other = mixture("qwen3_moe").state_dict()
        model.load_state_dict({name: tensor.flip(0) for name, tensor in other.items()}, assign=True)
        found.append(texts(model))
        return found

    expected = changed(mixture("qwen3_moe"))
    assert len({tuple(map(str, map(Tensor.tolist, text))) for text in expected}) == len(expected)
    model = mixture("qwen3_moe")
    hf_accel.optimize(model, [*NATIVE, *(LAYERS if layers else [])])
    assert all(equal(a, b) for a, b in zip(changed(model), expected, strict=True))


def test_the_users_choice_of_implementation_stays() -> None:
    model = mixture("olmoe")
    hf_accel.optimize(model, NATIVE)
    model.set_experts_implementation("eager")
    before = [step.counts.clone() for step in steps_of(model)]
    texts(model)
    assert all(torch.equal(step.counts, counts) for step, counts in zip(steps_of(model), before, strict=True))
    hf_accel.restore(model)
    assert implementations(model) == {"eager"}


def test_another_implementation_is_not_replaced() -> None:
    model = mixture("olmoe")
    for module in experts_of(model):
        module.config._experts_implementation_internal = "sonicmoe"
    with pytest.raises(hf_accel.UnsupportedModelError, match="run by sonicmoe"):
        hf_accel.optimize(model, NATIVE)


@pytest.mark.parametrize("stock", ["eager", "batched_mm"])
def test_what_is_not_covered_runs_as_it_was_asked_for(stock: str) -> None:
    model = mixture("gpt_oss")
    model.set_experts_implementation(stock)
    ids = prompt()
    before = model(ids).logits
    hf_accel.optimize(model, NATIVE)
    assert implementations(model) == {"hf_accel"}
    after = model(ids).logits  # with gradients
    assert torch.equal(after, before)
    after.sum().backward()
    assert experts_of(model)[0].down_proj.grad.any()


def test_a_model_of_the_same_config_is_left_alone() -> None:
    one = mixture("mixtral")
    other = type(one)(one.config)
    hf_accel.optimize(one, NATIVE)
    assert implementations(one) == {"hf_accel"}
    assert implementations(other) == {"grouped_mm"}


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_stock(copied: Any) -> None:
    model = mixture("mixtral")
    before = texts(model)
    hf_accel.optimize(model, NATIVE)
    made = copied(model)
    assert implementations(made) == {"grouped_mm"}
    assert equal(texts(made), before)


def test_saved_models_do_not_name_it(tmp_path: Any) -> None:
    model = mixture("qwen3_moe")
    hf_accel.optimize(model, NATIVE)
    model.save_pretrained(tmp_path)
    assert "hf_accel" not in (tmp_path / "config.json").read_text()
    loaded = type(model).from_pretrained(tmp_path)
    assert implementations(loaded) == {"grouped_mm"}


def test_a_model_that_is_gone_leaves_nothing() -> None:
    model = mixture("mixtral")
    hf_accel.optimize(model, NATIVE)
    seen = weakref.ref(experts_of(model)[0].down_proj)
    count = len(STEPS)
    del model
    gc.collect()
    assert seen() is None
    assert len(STEPS) < count


def test_ranks_of_other_processes_are_skipped() -> None:
    """An expert-parallel layer marks rows of others by the number of its experts."""
    model = mixture("qwen3_moe")
    hf_accel.optimize(model, NATIVE)
    module = experts_of(model)[0]
    module._is_expert_parallel = True
    hidden, ids = torch.randn(5, 48), torch.tensor([[0, 4], [4, 4], [3, 1], [4, 2], [1, 0]])
    weights = torch.rand(5, 2).masked_fill(ids == 4, 0.0)
    with torch.no_grad():
        found, expected = module(hidden, ids, weights), type(module).forward.__wrapped__(module, hidden, ids, weights)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert not found[1].any()


@pytest.mark.parametrize("name", REGISTERED)
def test_forms_are_described(name: str) -> None:
    form = described_experts(experts_of(mixture(name))[0])
    is_clamped = name == "gpt_oss"
    assert (form.gate.alpha, form.gate.limit) == ((1.702, 7.0) if is_clamped else (0.0, 0.0))
    assert (form.interleaved, form.biased) == (is_clamped, is_clamped)
    assert form.transposed is (name in ("gpt_oss", "aria"))
