"""Second moments of what products read, against a textbook twin, and what observing leaves behind: nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from fingerprint import changes, fingerprint
from models import FEW, build, prompt
from torch import Tensor, nn

from hf_accel import UnsupportedModelError, WeightOnlyConfig
from hf_accel.core.model.anatomy import Anatomy
from hf_accel.measure.quality import CalibrationText
from hf_accel.quantization.modules.linear import linear_weight
from hf_accel.quantization.observing import Moment, Observed, observe, portions
from hf_accel.quantization.targets import Target, targets


def text(rows: int = 3, tokens: int = 17) -> CalibrationText:
    return CalibrationText(prompt(rows, tokens), "random tokens", is_own=False)


def targets_of(model: Any) -> list[Target]:
    return targets(Anatomy.of(model), WeightOnlyConfig(bits=8))[0]


def textbook(model: Any, text: CalibrationText, module: nn.Module) -> tuple[Tensor, int]:
    """Return X^T X in fp64 and the number of rows of X: all that `module` reads, by calls of its forward."""
    read: list[Tensor] = []
    forward = module.forward
    module.forward = lambda x: (read.append(x.double().flatten(0, -2)), forward(x))[1]  # type: ignore[method-assign]
    with torch.no_grad():
        model(text.ids, use_cache=False)
    del module.forward
    x = torch.cat(read)
    return x.T @ x, len(x)


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("name", FEW)
def test_moments_equal_a_textbook(name: str) -> None:
    model = build(name)
    chosen = targets_of(model)
    observed = observe(model, text(), chosen)
    assert not observed.skipped
    assert list(observed.moments) == [target.path for target in chosen]
    for target in chosen:
        expected, count = textbook(model, text(), target.module)
        moment = observed.moments[target.path]
        assert moment.count == count == 3 * 17
        assert moment.total.dtype == torch.float64
        assert moment.total.shape == (linear_weight(target.module).shape[1],) * 2
        assert distance(moment.total, expected) < 1e-5, target.path


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_are_added_up_exactly(dtype: torch.dtype) -> None:
    """Row by row and all at once the model rounds alike but for ties; a sum in half precision would be 1e-3 off."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(4000, 24, generator=generator).to(dtype)
    moment = Moment.of(24)
    for part in inputs.view(40, 10, 10, 24):
        moment.add(part)
    exact = inputs.double().T @ inputs.double()
    assert moment.count == 4000
    assert distance(moment.total, exact) < 1e-6
    assert distance((inputs.T @ inputs).double(), exact) > 1e-4
    model = build("llama", dtype)
    chosen = targets_of(model)
    observed = observe(model, text(1), chosen)
    for target in chosen:
        assert observed.moments[target.path].total.dtype == torch.float64
        assert distance(observed.moments[target.path].total, textbook(model, text(1), target.module)[0]) < 1e-5


def test_products_that_read_one_tensor_share_one_moment() -> None:
    model = build("llama")
    moments = observe(model, text(), targets_of(model)).moments
    owners: dict[int, list[str]] = {}
    for path, moment in moments.items():
        owners.setdefault(id(moment), []).append(path.removeprefix("model.layers."))
    siblings = [paths for paths in owners.values() if paths[0].startswith("0.")]
    assert siblings == [
        ["0.self_attn.q_proj", "0.self_attn.k_proj", "0.self_attn.v_proj"],
        ["0.self_attn.o_proj"],
        ["0.mlp.gate_proj", "0.mlp.up_proj"],
        ["0.mlp.down_proj"],
    ]


class Reading(nn.Module):
    """Products `a` and `b`, which read what `between` makes of each other's input."""

    config = None
    device = torch.device("cpu")

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)
        self.between = between

    def forward(self, ids: Tensor, use_cache: bool) -> Tensor:
        x = torch.nn.functional.one_hot(ids % 16, 16).float()
        return self.a(input=x).sum() + self.b(self.between(x)).sum()

    @property
    def targets(self) -> list[Target]:
        scheme = WeightOnlyConfig(bits=8).scheme(8, 16)[0]
        return [Target(name, self, name, scheme) for name in ("a", "b")]


def test_a_tensor_that_changes_between_two_products_is_not_shared() -> None:
    model = Reading(lambda x: x.mul_(2.0))
    for mode in (False, True):
        with torch.inference_mode(mode):
            moments = observe(model, text(), model.targets).moments
        assert torch.equal(moments["b"].total, 4 * moments["a"].total)
    equal = Reading(lambda x: x.clone())
    moments = observe(equal, text(), equal.targets).moments
    assert moments["a"] is not moments["b"], "equal values are not one tensor"
    assert torch.equal(moments["a"].total, moments["b"].total)


def test_products_that_share_at_times_are_refused() -> None:
    given = text()
    for other in (0, -1):
        row = given.ids[other] % 16
        model = Reading(lambda x, row=row: x.clone() if torch.equal(x[0].argmax(-1), row) else x)
        with pytest.raises(UnsupportedModelError, match="b and a read one tensor for some rows"):
            observe(model, given, model.targets)
        assert not hooks_of(model)


def hooks_of(model: nn.Module) -> list[str]:
    return [
        f"{path} {name}"
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if "hooks" in name and value
    ]


def test_nothing_is_left_behind() -> None:
    model = build("qwen2").train()
    model.model.layers[0].eval()
    before, random = fingerprint(model), torch.get_rng_state()
    modes = [module.training for module in model.modules()]
    observe(model, text(), targets_of(model))
    assert not hooks_of(model)
    assert not changes(before, fingerprint(model))
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)


def test_a_model_in_training_is_observed_as_it_evaluates() -> None:
    model = Reading(nn.Dropout(0.5)).train()
    moments = observe(model, text(), model.targets).moments
    assert moments["b"] is moments["a"], "nothing is dropped between them"
    assert model.training
    assert model.between.training


@pytest.mark.parametrize("error", [RuntimeError("of the model"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_hooks_are_gone_after_an_error(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    chosen = targets_of(model)
    before, calls = fingerprint(model), [0]
    mlp = type(model.model.layers[1].mlp)
    forward = mlp.forward

    def failing(self: Any, x: Tensor) -> Tensor:
        calls[0] += 1
        if calls[0] == 4:  # layer 1, row 1
            raise error
        return forward(self, x)

    monkeypatch.setattr(mlp, "forward", failing)
    with pytest.raises(type(error)):
        observe(model, text(), chosen)
    assert calls == [4]
    assert not hooks_of(model)
    assert not changes(before, fingerprint(model))


def test_portions_bound_the_memory_and_change_nothing() -> None:
    model = build("llama")
    chosen = targets_of(model)
    whole = observe(model, text(), chosen).moments
    sizes = {target.path: 4 * linear_weight(target.module).shape[1] ** 2 for target in chosen}
    bound = 3 * max(sizes.values())
    parts = list(portions(chosen, bound))
    assert [target for part in parts for target in part] == chosen
    assert len(parts) > 2
    for part in parts:
        assert sum(sizes[target.path] for target in part) <= bound
        found = observe(model, text(), part).moments
        assert list(found) == [target.path for target in part]
        for path, moment in found.items():
            assert torch.equal(moment.total, whole[path].total)
    assert [len(part) for part in portions(chosen, 1)] == [1] * len(chosen), "one is always taken"
    assert not list(portions([], 1))


def sentences(observed: Observed) -> str:
    return "; ".join(observed.skipped)


def test_experts_that_are_modules_see_the_tokens_sent_to_them() -> None:
    model = Reading(lambda x: x[x[..., :8].sum(-1) > 0])
    moments = observe(model, text(), model.targets).moments
    sent = int((text().ids % 16 < 8).sum())
    assert 0 < sent < 3 * 17
    assert (moments["a"].count, moments["b"].count) == (3 * 17, sent)
    starved = Reading(lambda x: x[:, :0])
    observed = observe(starved, text(), starved.targets)
    assert list(observed.moments) == ["a"]
    assert sentences(observed) == "the text sends no token to: b"


def test_experts_in_one_parameter_are_said_to_be_left_out() -> None:
    model = build("mixtral")
    chosen = targets_of(model)
    observed = observe(model, text(), chosen)
    experts = [target.path for target in chosen if target.scheme is None]
    assert experts
    assert sentences(observed) == f"experts in 3-D parameters cannot be observed: {', '.join(experts)}"
    assert list(observed.moments) == [target.path for target in chosen if target.scheme is not None]


def test_products_that_read_nothing_or_no_numbers_are_said_to_be_left_out() -> None:
    model = build("llama")
    chosen = targets_of(model)
    beside = nn.Module()
    beside.idle = nn.Linear(8, 32)
    idle = Target("beside.idle", beside, "idle", chosen[0].scheme)
    model.model.layers[-1].mlp.up_proj.weight.data.fill_(torch.inf)
    observed = observe(model, text(), [*chosen, idle])
    lost = ["lm_head", f"model.layers.{len(model.model.layers) - 1}.mlp.down_proj"]
    assert set(observed.moments) == {target.path for target in chosen} - set(lost)
    assert sentences(observed) == (
        f"the text sends no token to: beside.idle; NaN or infinity is read by: {', '.join(lost)}"
    )
