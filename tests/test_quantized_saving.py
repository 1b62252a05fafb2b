"""Saving that is interrupted, configs that stay as they were, and vocabularies that are resized."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fingerprint import changes, fingerprint
from models import build
from quantized_files import FOUR, logits, quantized, reloaded, saved, wide
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM

import hf_accel
from hf_accel import WeightOnlyConfig
from hf_accel.quantization.files import saving
from hf_accel.quantization.files.pack_quantized import PackQuantized

EIGHT = WeightOnlyConfig(bits=8)


class Interrupted(BaseException):
    """What ends a process in the middle of saving."""


def interrupted_after(count: int, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return `function`, which raises from the call after `count` calls on."""
    calls = iter(range(count))

    def limited(*args: Any, **options: Any) -> Any:
        if next(calls, None) is None:
            raise Interrupted
        return function(*args, **options)

    return limited


@pytest.mark.parametrize("place, count", [("save_file", 0), ("save_file", 2), *(("replace", n) for n in range(6))])
def test_an_interrupted_save_leaves_the_old_folder_or_none(
    place: str, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = saved(tmp_path, max_shard_size="20kB")
    other = wide(rms_norm_eps=1e-2)
    with torch.no_grad():
        other.model.norm.weight += 1
    model = quantized(other, FOUR)
    owner: Any = os if place == "replace" else saving
    with monkeypatch.context() as patch:
        patch.setattr(owner, place, interrupted_after(count, getattr(owner, place)))
        with pytest.raises(Interrupted):
            model.save_pretrained(tmp_path, max_shard_size="20kB")
    if place == "save_file":
        assert torch.equal(logits(hf_accel.from_pretrained(tmp_path)), expected)
    else:
        with pytest.raises(hf_accel.CheckpointError, match=r"config\.json cannot be read"):
            hf_accel.from_pretrained(tmp_path)
        with pytest.raises((OSError, ValueError)):
            AutoModelForCausalLM.from_pretrained(tmp_path)
    (tmp_path / ".hf_accel.part").mkdir()  # of a process that was killed
    model.save_pretrained(tmp_path, max_shard_size="20kB")
    assert torch.equal(logits(hf_accel.from_pretrained(tmp_path)), logits(model))
    assert not (tmp_path / ".hf_accel.part").exists()


def test_folders_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = quantized(wide(), FOUR)
    (tmp_path / "file").touch()
    with pytest.raises(hf_accel.CheckpointError, match="cannot be written"):
        model.save_pretrained(tmp_path / "file" / "below")
    for error in (OSError(28, "No space left on device"), MemoryError(), RuntimeError("can't allocate memory")):

        def fails(*args: Any, error: Exception = error, **options: Any) -> None:
            raise error

        monkeypatch.setattr(saving, "save_file", fails)
        with pytest.raises(hf_accel.CheckpointError, match="cannot be written") as found:
            model.save_pretrained(tmp_path / "full")
        assert found.value.__cause__ is error
        assert not list((tmp_path / "full").iterdir())
    for folder in ("", None, 5):
        with pytest.raises(hf_accel.ConfigError, match="folder"):
            model.save_pretrained(folder)
    with pytest.raises(hf_accel.ConfigError, match="max_shard_size"):
        model.save_pretrained(tmp_path / "size", max_shard_size="large")


@pytest.mark.parametrize("error", [MemoryError("none left"), RuntimeError("can't allocate memory"), TypeError("odd")])
def test_memory_that_is_short_while_loading(error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path)

    def fails(*args: Any) -> None:
        raise error

    monkeypatch.setattr(PackQuantized, "read", fails)
    with pytest.raises(hf_accel.CheckpointError) as found:
        hf_accel.from_pretrained(tmp_path)
    assert found.value.__cause__ is error


def test_devices_and_folders_that_are_none(tmp_path: Path) -> None:
    saved(tmp_path)
    with pytest.raises(hf_accel.ConfigError, match="nonsense"):
        hf_accel.from_pretrained(tmp_path, device="nonsense")
    with pytest.raises(hf_accel.CheckpointError, match="nowhere"):
        hf_accel.from_pretrained(tmp_path / "nowhere")


def test_a_folder_without_packed_weights_is_never_filled_in(tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path / "plain")
    saved(tmp_path / "packed")
    for folder in (tmp_path / "plain", tmp_path / "packed"):
        path = folder / "config.json"
        config = json.loads(path.read_text())
        config["num_hidden_layers"] += 1
        config.pop("quantization_config", None)
        path.write_text(json.dumps(config))
        with pytest.raises(hf_accel.CheckpointError, match="lacks the tensor"):
            hf_accel.from_pretrained(folder)


def test_a_config_that_is_not_the_saved_one_is_named(tmp_path: Path) -> None:
    saved(tmp_path)
    path = tmp_path / "config.json"
    content = json.loads(path.read_text())
    content["transformers_version"], content["rms_norm_eps"] = "0", 0.5
    path.write_text(json.dumps(content))
    with pytest.raises(hf_accel.CheckpointError, match="rms_norm_eps differs"):
        hf_accel.from_pretrained(tmp_path)


def test_what_saving_writes_is_not_left_in_the_config(tmp_path: Path) -> None:
    model = quantized(wide(), EIGHT)
    before = model.config.to_dict()
    model.save_pretrained(tmp_path / "one")
    copies = [copy.deepcopy(model), hf_accel.from_pretrained(tmp_path / "one")]
    for number, other in enumerate(copies):  # these are saved by transformers
        other.save_pretrained(tmp_path / str(number))
        assert torch.equal(logits(hf_accel.from_pretrained(tmp_path / str(number))), logits(model))
    for other in (model, *copies):
        assert "quantization_config" not in other.config.to_dict()
        new = type(other)(copy.deepcopy(other.config))
        assert getattr(new, "hf_quantizer", None) is None
        new.save_pretrained(tmp_path / "new")
        assert "quantization_config" not in json.loads((tmp_path / "new" / "config.json").read_text())
    assert model.config.to_dict() == before


@pytest.mark.compressed_tensors
def test_a_copy_of_a_model_taken_over_keeps_its_own_description(tmp_path: Path) -> None:
    saved(tmp_path / "packed", wide(), EIGHT)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    model = copy.deepcopy(hf_accel.optimize(stock, hf_accel.CompressedTensorsConfig()))
    described = model.config.quantization_config
    model.save_pretrained(tmp_path / "again")
    assert model.config.quantization_config is described
    assert torch.equal(logits(hf_accel.from_pretrained(tmp_path / "again")), logits(model))


def test_a_model_that_its_config_does_not_describe_is_refused(tmp_path: Path) -> None:
    model = quantized(wide(), EIGHT)
    del model.model.layers[1]
    with pytest.raises(hf_accel.UnsupportedModelError, match=r"layers\.2.* so nothing could load"):
        model.save_pretrained(tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_biases_that_share_memory_are_stored_each_by_itself(tmp_path: Path) -> None:
    config = AutoConfig.for_model(
        "bert", vocab_size=128, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, is_decoder=True, tie_word_embeddings=True,
    )  # fmt: skip
    model = quantized(AutoModelForCausalLM.from_config(config).eval(), EIGHT)
    head = model.cls.predictions
    assert head.bias.data_ptr() == head.decoder.bias.data_ptr()
    model.save_pretrained(tmp_path / "ours")
    copy.deepcopy(model).save_pretrained(tmp_path / "stock")
    for folder in ("ours", "stock"):
        assert torch.equal(logits(hf_accel.from_pretrained(tmp_path / folder)), logits(model))


def test_a_model_without_parameters_of_its_own_generates_and_comes_back(tmp_path: Path) -> None:
    config = AutoConfig.for_model(
        "olmo", vocab_size=128, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model = reloaded(AutoModelForCausalLM.from_config(config), torch.bfloat16)
    model = quantized(model, WeightOnlyConfig(bits=8, embeddings=8))
    assert all(parameter.numel() == 0 for parameter in model.parameters())
    assert (model.dtype, model.device.type) == (torch.bfloat16, "cpu")
    text = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4)
    model.save_pretrained(tmp_path)
    again = hf_accel.from_pretrained(tmp_path)
    assert torch.equal(logits(again), logits(model))
    assert torch.equal(again.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4), text)


def test_every_tensor_has_a_checksum(tmp_path: Path) -> None:
    saved(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        content = json.loads(file.metadata()["hf_accel"])
        assert set(content["sums"]) == set(file.keys())
    assert content["config"] == json.loads((tmp_path / "config.json").read_text())


OPERATIONS: dict[str, Callable[[Any], Any]] = {
    "more tokens": lambda model: model.resize_token_embeddings(140),
    "more tokens, no mean": lambda model: model.resize_token_embeddings(140, mean_resizing=False),
    "fewer tokens": lambda model: model.resize_token_embeddings(100),
    "multiple": lambda model: model.resize_token_embeddings(pad_to_multiple_of=80),
    "as many tokens": lambda model: model.resize_token_embeddings(128),
    "as many, multiple": lambda model: model.resize_token_embeddings(pad_to_multiple_of=64),
    "tie": lambda model: model.tie_weights(),
    "initialise": lambda model: model.init_weights(),
    "reset the head": lambda model: model.get_output_embeddings().reset_parameters(),
    "fill a weight": lambda model: model.model.layers[0].mlp.up_proj.weight.data.zero_(),
    "add to a weight": lambda model: model.model.layers[0].mlp.up_proj.weight.data.__iadd__(1),
    "write into a weight": lambda model: model.model.layers[0].mlp.up_proj.weight.__setitem__(0, 1.0),
    "dequantize": lambda model: model.dequantize(),
}


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("config", [EIGHT, WeightOnlyConfig(bits=8, embeddings=8)], ids=["head", "head and table"])
@pytest.mark.parametrize("tied", [False, True])
def test_nothing_is_changed_by_halves(config: WeightOnlyConfig, tied: bool, operation: str) -> None:
    stock = wide(tie_word_embeddings=tied)
    original = logits(stock)
    model = quantized(stock, config)
    before, expected = fingerprint(model), logits(model)
    try:
        OPERATIONS[operation](model)
    except hf_accel.UnsupportedModelError:
        assert not changes(before, fingerprint(model))
    assert torch.equal(logits(model), expected)
    assert torch.equal(logits(hf_accel.restore(model)), original)


@pytest.mark.parametrize("rows", [140, 100])
def test_a_loaded_model_is_resized_as_stock_is(rows: int, tmp_path: Path) -> None:
    saved(tmp_path / "small", wide(), EIGHT)
    model = hf_accel.from_pretrained(tmp_path / "small")
    expected = model.lm_head.weight.dequantize()
    table = model.get_input_embeddings().weight.detach().clone()
    model.resize_token_embeddings(rows)
    kept = min(rows, 128)
    assert model.config.vocab_size == rows
    assert torch.equal(model.lm_head.weight[:kept], expected[:kept])
    assert torch.equal(model.get_input_embeddings().weight[:kept], table[:kept])
    model.save_pretrained(tmp_path / "resized")
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        assert torch.equal(hf_accel.from_pretrained(tmp_path / "resized")(ids).logits, model(ids).logits)


def test_a_loaded_table_refuses_to_be_resized(tmp_path: Path) -> None:
    expected = saved(tmp_path, wide(), WeightOnlyConfig(bits=8, embeddings=8))
    model = hf_accel.from_pretrained(tmp_path)
    before = fingerprint(model)
    with pytest.raises(hf_accel.UnsupportedModelError, match="stored in 8 bits"):
        model.resize_token_embeddings(140)
    assert not changes(before, fingerprint(model))
    assert torch.equal(logits(model), expected)


def test_without_the_stamp_nothing_is_checked_and_nothing_else_changes(tmp_path: Path) -> None:
    """A folder copied by tools that drop metadata is one of other origin."""
    from safetensors.torch import load_file, save_file

    expected = saved(tmp_path / "ours")
    folder = shutil.copytree(tmp_path / "ours", tmp_path / "copied")
    save_file(load_file(folder / "model.safetensors"), folder / "model.safetensors", metadata={"format": "pt"})
    assert torch.equal(logits(hf_accel.from_pretrained(folder)), expected)
