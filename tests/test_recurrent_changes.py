"""Native steps of mixers follow what may change, give way to what may not, and are refused where they differ."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from recurrent_models import recurrent
from test_recurrent import NATIVE, _without_a_clock, equal, served, texts
from torch import nn
from transformers.models.lfm2 import modeling_lfm2

import hf_accel
from hf_accel.core.model.shadow import twin
from hf_accel.core.steps.setting import Setting
from hf_accel.recurrent import audit, delta, forms, patcher, scan, short_conv, ssd, trial
from hf_accel.recurrent.audit import audited
from hf_accel.recurrent.mixers import mixers_of

__all__ = ["_without_a_clock", "served"]  # fixtures
pytestmark = pytest.mark.native
Change = Callable[[Any], Any]


class Twice(nn.Module):
    """Stands around a projection, as adapters do, and changes what it gives."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 1.25 * self.inner(x)


def _scaled(mixer: Any, name: str) -> None:
    with torch.no_grad():
        getattr(mixer, name).mul_(1.5)


def _exchanged(mixer: Any, name: str) -> None:
    setattr(mixer, name, nn.Parameter(getattr(mixer, name).detach() * 1.5))


def _other_norm(mixer: Any) -> None:
    mixer.norm = type(mixer.norm)(mixer.norm.weight.shape[0], eps=0.5)


FOLLOWED: dict[str, tuple[str, Change]] = {
    "another rate": ("qwen3_next", lambda mixer: _exchanged(mixer, "A_log")),
    "a rate in place": ("qwen3_next", lambda mixer: _scaled(mixer, "A_log")),
    "another bias of time steps": ("granite", lambda mixer: _exchanged(mixer, "dt_bias")),
    "another weight": ("lfm2", lambda mixer: setattr(mixer.conv, "weight", nn.Parameter(mixer.conv.weight * 2))),
    "a projection that is wrapped": ("mamba", lambda mixer: setattr(mixer, "x_proj", Twice(mixer.x_proj))),
    "an output that is wrapped": ("qwen3_next", lambda mixer: setattr(mixer, "out_proj", Twice(mixer.out_proj))),
    "a hook on a projection": (
        "granite",
        lambda mixer: mixer.in_proj.register_forward_hook(lambda module, args, output: output * 1.25),
    ),
}
STOCKS: dict[str, tuple[str, Change]] = {
    "a hook on the norm": (
        "granite",
        lambda mixer: mixer.norm.register_forward_hook(lambda module, args, output: output * 1.25),
    ),
    "another activation": ("qwen3_next", lambda mixer: setattr(mixer, "activation", "gelu")),
    "another norm": ("qwen3_next", _other_norm),
    "an attribute of the norm": ("granite", lambda mixer: setattr(mixer.norm, "variance_epsilon", 0.5)),
    "a multiplier": ("falcon_h1", lambda mixer: setattr(mixer, "ssm_in_multiplier", 0.5)),
    "sizes that do not fit": ("jamba", lambda mixer: setattr(mixer, "dt_proj", Twice(mixer.dt_proj))),
}


def changed(case: tuple[str, Change]) -> tuple[Any, list[torch.Tensor] | type]:
    """Return a stock model after a change, and its text or the kind of error it raises."""
    name, change = case
    model = recurrent(name)
    change(next(iter(mixers_of(model).values())))
    try:
        return model, texts(model)
    except AttributeError as error:
        return model, type(error)


@pytest.mark.parametrize("title", FOLLOWED)
def test_what_may_change_is_followed(title: str, served: list[bool]) -> None:
    name, change = FOLLOWED[title]
    _, expected = changed(FOLLOWED[title])
    model = recurrent(name)
    before = texts(model)
    hf_accel.optimize(model, NATIVE)
    texts(model)
    change(next(iter(mixers_of(model).values())))
    served.clear()
    found = texts(model)
    assert equal(found, expected)  # type: ignore[arg-type]
    assert not equal(found, before)
    assert all(served)


@pytest.mark.parametrize("title", STOCKS)
def test_what_may_not_is_stocks(title: str, served: list[bool]) -> None:
    name, change = STOCKS[title]
    _, expected = changed(STOCKS[title])
    model = recurrent(name)
    hf_accel.optimize(model, NATIVE)
    texts(model)
    change(next(iter(mixers_of(model).values())))
    served.clear()
    if isinstance(expected, type):
        with pytest.raises(expected):
            texts(model)
    else:
        assert equal(texts(model), expected)
    assert not served or not all(served)


@pytest.mark.peft
# peft 0.21 asks transformers 5.23 for an attribute under its old name
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("is_before", [True, False])
def test_adapters_on_projections_are_called(is_before: bool, served: list[bool]) -> None:
    from peft import LoraConfig, get_peft_model

    def adapted(model: Any) -> Any:
        torch.manual_seed(4)
        lora = LoraConfig(
            r=2, target_modules=["in_proj_qkvz", "out_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
        )
        return get_peft_model(model, lora).eval()

    expected, model = texts(adapted(recurrent("qwen3_next"))), recurrent("qwen3_next")
    before = texts(model)
    if is_before:
        found = hf_accel.optimize(adapted(model), NATIVE)
    else:
        found = adapted(hf_accel.optimize(model, NATIVE))
    served.clear()
    assert equal(texts(found), expected)
    assert not equal(expected, before)
    assert all(served)


def test_a_function_that_is_patched_is_seen(served: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    model = recurrent("lfm2")
    hf_accel.optimize(model, NATIVE)
    texts(model)
    right = modeling_lfm2.causal_conv1d_update
    monkeypatch.setattr(modeling_lfm2, "causal_conv1d_update", lambda *args: right(*args) * 1.25)
    served.clear()
    stock = recurrent("lfm2")
    assert equal(texts(model), texts(stock))
    assert not any(served)


@pytest.mark.parametrize(
    ("name", "kind", "wrong"),
    [
        ("qwen3_next", delta, {"beta_scale": 1.5}),
        ("granite", ssd, {"is_silu": False}),
        ("lfm2", short_conv, {"is_silu": True}),
    ],
)
def test_readings_that_differ_are_refused(
    name: str, kind: Any, wrong: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = kind.forms
    monkeypatch.setattr(
        kind, "forms", lambda *args: [replace(form, shape=replace(form.shape, **wrong)) for form in right(*args)]
    )
    model = recurrent(name)
    classes, before = [type(module) for module in model.modules()], texts(model)
    with pytest.raises(hf_accel.VerificationError, match="differs from what it holds by"):
        hf_accel.optimize(model, NATIVE)
    assert [type(module) for module in model.modules()] == classes
    assert equal(texts(model), before)


def test_of_readings_that_cannot_be_told_apart_none_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    right = scan.forms
    monkeypatch.setattr(
        scan, "forms", lambda *args: [form for found in right(*args) for form in (found, replace(found, title="same"))]
    )
    with pytest.raises(hf_accel.VerificationError, match="cannot be told apart"):
        hf_accel.optimize(recurrent("mamba"), NATIVE)


def test_a_tensor_that_no_reading_knows_is_refused() -> None:
    model = recurrent("qwen3_5")
    for mixer in mixers_of(model).values():
        mixer.register_buffer("of_tomorrow", torch.ones(3))
    with pytest.raises(hf_accel.VerificationError, match="holds what no mixer known here does"):
        hf_accel.optimize(model, NATIVE)


def test_mixers_that_are_not_faster_run_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patcher, "share_of_time", lambda mixer, form: 1.2)
    with pytest.raises(hf_accel.VerificationError, match="120% of the time of its own"):
        hf_accel.optimize(recurrent("lfm2"), NATIVE)


def test_a_trial_leaves_projections_out_and_the_model_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "_known", {})
    model = recurrent("qwen3_next")
    before = texts(model)
    mixer = next(iter(audited(model).values()))
    form = mixer.form
    assert form is not None
    assert 0 < trial.share_of_time(mixer, form) < 10
    assert all(isinstance(mixer.module._modules[name], trial._Recorded) for name in form.called)
    assert equal(texts(model), before)


def test_an_audit_reads_padded_rows_and_several_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = recurrent("granite"), []
    right = audit.Audited.look
    monkeypatch.setattr(audit.Audited, "look", lambda self, *args: (seen.append(args[0].shape), right(self, *args)))
    audited(model)
    assert seen == [(2, 1, 48)] * 2 * audit.STEPS
    calls: list[Any] = []
    monkeypatch.setattr(audit, "twin", lambda model: _told(twin(model), calls))
    audited(model)
    assert calls[0]["attention_mask"].tolist() == [[0] + [1] * 8, [1] * 9]


def _told(model: Any, calls: list[Any]) -> Any:
    right = model.generate

    def generate(*args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs)
        return right(*args, **kwargs)

    model.generate = generate
    return model


def test_plans_that_are_tried_again_remember_the_audit(monkeypatch: pytest.MonkeyPatch) -> None:
    model = recurrent("lfm2")
    setting, asked = Setting.of(model), []
    setting.keep_prepared()
    monkeypatch.setattr(patcher, "audited", lambda model: (asked.append(model), audited(model))[1])
    made = patcher.RecurrentStepPatcher(hf_accel.RecurrentStepConfig())
    first = made._forms(setting, mixers_of(model))
    assert made._forms(setting.over(twin(model)), mixers_of(model)) == first
    assert len(asked) == 1


def test_norms_are_found_by_running_them() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.eps = nn.Parameter(torch.randn(8)), 1e-6

        def forward(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
            return self.weight * x + gate

    assert forms.norms_of(Odd(), 8, (8,)) == []
    model = recurrent("granite")
    norm = next(iter(mixers_of(model).values())).norm
    (found,) = forms.norms_of(norm, 96, (96, 48))
    assert (found.size, found.eps, found.gates_first) == (norm.group_size, norm.variance_epsilon, True)
