"""Training in few bits by other hands: Trainer, checkpoints, autocast, peft, and the recipe that distils."""

from __future__ import annotations

import copy
import math
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from fingerprint import changes, fingerprint
from test_qat import IDS, few, in_training, logits, original, products, trained
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments

import hf_accel
from hf_accel.errors import ConfigError, ConflictError, UnsupportedModelError
from hf_accel.quantization import adapting
from hf_accel.quantization.learned import trained_products
from hf_accel.recipes import qat
from hf_accel.recipes.qat_callback import QATCallback

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
SHORT: dict[str, Any] = {"window": 16, "batch_size": 4, "bf16": False, "evaluations": 0, "picture": False}


def trainer(model: Any, folder: Path, steps: int, *callbacks: TrainerCallback, **options: Any) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=2, learning_rate=1e-2, report_to="none",
        logging_steps=1, save_steps=2, use_cpu=True, disable_tqdm=True, lr_scheduler_type="constant", **options,
    )  # fmt: skip
    rows = [{"input_ids": row, "labels": row} for row in IDS.repeat(8, 1)]
    return Trainer(model=model, args=arguments, train_dataset=rows, callbacks=list(callbacks))


def bits(model: Any) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def test_the_trainer_trains_and_resumes_to_the_same_bits(tmp_path: Path) -> None:
    model = in_training(2)
    whole = trainer(model, tmp_path / "whole", 4, QATCallback())
    whole.train()
    logged = [entry for entry in whole.state.log_history if "qat_changed" in entry]
    assert len(logged) == 4
    assert 0 < logged[-1]["qat_changed"] < 1
    assert logged[-1]["qat_clipped"] >= 0

    resumed = in_training(2)
    trainer(resumed, tmp_path / "whole", 4, QATCallback()).train(
        resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2")
    )
    assert_same_bits(bits(resumed), bits(model))
    other = in_training(2)
    other.load_state_dict(model.state_dict())
    assert hf_accel.report(other).qat.to_dict() == hf_accel.report(model).qat.to_dict()
    assert torch.equal(logits(hf_accel.convert_qat(other)), logits(hf_accel.convert_qat(model)))


def gradients(model: Any) -> dict[str, Tensor]:
    model(IDS, labels=IDS).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_gradients_under_checkpointing_and_autocast() -> None:
    model = trained(in_training(3)).train()
    plain = gradients(model)
    assert len(plain) == 28
    model.zero_grad()
    model.gradient_checkpointing_enable()
    assert_same_bits(gradients(model), plain)
    model.zero_grad()
    model.gradient_checkpointing_disable()
    with torch.autocast("cpu", torch.bfloat16):
        halves = gradients(model)
    for name, gradient in halves.items():
        assert gradient.dtype is torch.float32
        assert (gradient - plain[name]).norm() < 0.1 * plain[name].norm(), name


class Broken(TrainerCallback):
    """Breaks something after the first step."""

    def __init__(self, change: Any) -> None:
        self.change = change

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.change(model.model.layers[1].mlp.up_proj)


BREAKAGES = {
    "off": (lambda module: setattr(module, "is_on", False), r"layers\.1\.mlp\.up_proj is off at step 1"),
    "weights": (lambda module: module.weight.data.fill_(math.inf), r"\.1\.mlp\.up_proj holds weights .* diverged"),
    "scales": (lambda module: module.log_factors.data.fill_(-200), r"layers\.1\.mlp\.up_proj holds .* or are 0"),
}


@pytest.mark.parametrize("name", BREAKAGES)
def test_the_callback_stops_what_has_gone_wrong(name: str, tmp_path: Path) -> None:
    change, message = BREAKAGES[name]
    with pytest.raises(UnsupportedModelError, match=message):
        trainer(in_training(2), tmp_path, 4, Broken(change), QATCallback()).train()


def test_the_callback_wants_products_in_training_and_in_the_optimizer(tmp_path: Path) -> None:
    model = original()
    with pytest.raises(UnsupportedModelError, match="No product of the model is in training"):
        trainer(model, tmp_path, 1, QATCallback()).train()
    made = trainer(model, tmp_path, 1, QATCallback())
    made.optimizer = torch.optim.AdamW(model.parameters())
    hf_accel.optimize(model, [few()])
    with pytest.raises(UnsupportedModelError, match=r"optimizer does not have the weight of model\.layers\.0"):
        made.train()
    watch = QATCallback()
    watch.modules = {path: module for path, _, _, module in trained_products(model)}
    with pytest.raises(UnsupportedModelError, match="The loss is nan at step 3"):
        watch.on_log(None, TrainerState(global_step=3), None, logs={"loss": math.nan})


def adapted(model: Any, **options: Any) -> Any:
    peft = pytest.importorskip("peft")
    torch.manual_seed(3)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return hf_accel.get_qat_peft_model(model, config)


@pytest.mark.parametrize("autocasts", [False, True])
def test_lora_under_fake_quantization_is_deployed_as_it_was_trained(autocasts: bool) -> None:
    model = original()
    before = fingerprint(model)
    hf_accel.optimize(model, [few()])
    start = bits(model)
    peft_model = adapted(model)
    learning = [name for name, parameter in peft_model.named_parameters() if parameter.requires_grad]
    assert len(learning) == 3 * 14
    with torch.autocast("cpu", torch.bfloat16, enabled=autocasts):
        trained(peft_model, rate=1e-2)
        expected = logits(peft_model)
    module = peft_model.base_model.model.model.layers[0].mlp.up_proj
    delta = module.get_delta_weight("default")
    assert torch.equal(module.base_layer.weight, start["model.layers.0.mlp.up_proj.weight"]), "LoRA leaves the weight"
    with pytest.raises(UnsupportedModelError, match=r"adapters beside them\. Merge them before"):
        hf_accel.convert_qat(peft_model)
    merged = peft_model.merge_and_unload()
    assert merged is model
    found = model.model.layers[0].mlp.up_proj
    assert torch.equal(found.weight, start["model.layers.0.mlp.up_proj.weight"] + delta)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocasts):
        assert torch.equal(logits(model), expected), "merging changes nothing"
    codes = {path: module.affine().codes for path, _, _, module in trained_products(model)}
    hf_accel.convert_qat(model)
    assert all(torch.equal(product.packed.unpack().codes, codes[path]) for path, product in products(model).items())
    hf_accel.restore(model)
    assert not changes(before, fingerprint(model))


def test_adapters_that_cannot_be_merged_exactly_are_refused() -> None:
    peft = pytest.importorskip("peft")
    model = in_training(2)
    with pytest.raises(ValueError, match=r"FakeQuantizedLinear.* is not supported"):  # peft's own
        peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(target_modules=["up_proj"]))
    for options, message in (
        ({"lora_dropout": 0.1}, "neither dropout nor a bias"),
        ({"use_dora": True}, "peft refuses the adapters"),
    ):
        with pytest.raises(ConfigError, match=message):
            adapted(copy.deepcopy(model), **options)
    with pytest.raises(ConfigError, match=r"a peft\.LoraConfig; IA3Config was given"):
        hf_accel.get_qat_peft_model(model, peft.IA3Config(target_modules=["up_proj"]))
    with pytest.raises(UnsupportedModelError, match="No product of this model is in training"):
        hf_accel.get_qat_peft_model(original(), peft.LoraConfig())
    model = adapted(model).eval()
    with pytest.raises(UnsupportedModelError, match="Adapters per row"):
        model(IDS, adapter_names=["default"] * len(IDS))


def test_an_adapter_can_be_switched_off() -> None:
    model = in_training(2)
    expected = logits(model)
    peft_model = adapted(model)
    assert not torch.equal(logits(peft_model), expected)
    with peft_model.disable_adapter():
        assert torch.equal(logits(peft_model), expected)
    assert isinstance(peft_model.base_model.model.model.layers[0].mlp.up_proj, adapting.lora_class())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lora_rank", [None, 4])
def test_the_recipe_trains_towards_the_original(dtype: torch.dtype, lora_rank: int | None) -> None:
    model = original(dtype)
    before, expected = fingerprint(model), logits(model)
    config = few(3)
    rate = 3e-3 if lora_rank is None else 3e-2
    result = qat(model, config, IDS.repeat(8, 1), steps=12, learning_rate=rate, lora_rank=lora_rank, **SHORT)
    assert result.model is model
    assert result.after.kl < result.before.kl
    assert result.uptrained.copied_bytes == 0
    assert 0 < result.shares["changed"] < 1
    assert "% of the KL of the start closed" in str(result)
    assert len(products(model)) == 14
    assert hf_accel.report(model).quality == result.after
    hf_accel.restore(model)
    assert not any(module._forward_hooks for module in model.modules()), "hidden states were recorded by hooks"
    assert not changes(before, fingerprint(model))
    assert torch.equal(logits(model), expected)


def test_the_recipe_puts_the_model_back_after_an_error() -> None:
    model = original()
    before = fingerprint(model)
    config = few()
    with pytest.raises(UnsupportedModelError, match=r"holds weights .* diverged"):
        qat(model, config, IDS.repeat(8, 1), steps=3, callbacks=[Broken(BREAKAGES["weights"][0])], **SHORT)
    assert not changes(before, fingerprint(model))
    with pytest.raises(ConfigError, match="teacher cannot be given"):
        qat(model, config, IDS, teacher=model)
    with pytest.raises(ConfigError, match="config is a QATConfig"):
        qat(model, hf_accel.WeightOnlyConfig())
    hf_accel.optimize(model, [config])
    with pytest.raises(ConflictError, match="optimised by hf_accel"):
        qat(model, config, IDS, steps=1)


def test_training_can_go_on_before_it_is_deployed() -> None:
    model = original()
    config = few(3)
    result = qat(model, config, IDS.repeat(8, 1), steps=2, converts=False, **SHORT)
    assert not products(model)
    assert len(list(trained_products(model))) == 14
    kept = hf_accel.report(model).qat.share("changed")
    assert kept == result.shares["changed"]
    trained(model)
    hf_accel.convert_qat(model)
    assert hf_accel.report(model).qat.share("changed") > kept


class Stopped(TrainerCallback):
    """Presses control C after some steps."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 3:
            raise KeyboardInterrupt


def test_an_interrupted_run_of_the_recipe_ends_with_the_same_bits(tmp_path: Path) -> None:
    options = SHORT | {"steps": 5, "checkpoint_minutes": 0}
    config, text = few(), IDS.repeat(8, 1)
    expected, model = original(), original()
    qat(expected, config, text, **options)
    with pytest.raises(KeyboardInterrupt):
        qat(model, config, text, out=tmp_path, callbacks=[Stopped()], **options)
    assert torch.equal(logits(model), logits(original()))
    assert qat(model, config, text, out=tmp_path, **options).uptrained.resumed_at == 2
    assert_same_bits(bits(model), bits(expected))


def test_the_recipe_calibrates_its_start_on_the_text() -> None:
    text = IDS.repeat(8, 1)
    results = [
        qat(original(), few(2, start="gptq"), each, steps=2, converts=False, **SHORT | {"calibration": given})
        for each, given in ((text, None), (text, text.flatten()[:512]))
    ]
    starts = [next(trained_products(result.model))[3].start_codes for result in results]
    assert torch.equal(starts[0], starts[1])
    once = iter(list(text))
    assert sys.modules[qat.__module__]._beginning(once, None, original()) is None
    assert len(list(once)) == len(text), "what can be read once is left for training"
