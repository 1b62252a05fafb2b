"""Models with packed weights come back from disk bit for bit, and stock code never takes them for something else."""

from __future__ import annotations

import copy
import json
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from models import NAMES, build, prompt
from quantized_files import FOUR, PRIVATE, difference, logits, quantized, reloaded, saved, wide
from transformers import AutoModelForCausalLM

import hf_accel
from hf_accel import WeightOnlyConfig
from hf_accel.ops.affine import Scheme
from hf_accel.quantization.modules.linear import QuantizedLinear


def is_public(folder: Path) -> bool:
    return (folder / "model.safetensors").exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_eight_bits_come_back_bit_for_bit(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = quantized(reloaded(build(name), dtype), WeightOnlyConfig(bits=8))
    expected = logits(model)
    model.save_pretrained(tmp_path)
    assert is_public(tmp_path) is (name not in PRIVATE)
    again = hf_accel.from_pretrained(tmp_path)
    assert again.dtype is dtype
    assert not again.training
    assert type(again).__name__ == type(model).__name__
    assert torch.equal(logits(again), expected)
    text = again.generate(prompt(), max_new_tokens=6, do_sample=False)
    assert torch.equal(text, model.generate(prompt(), max_new_tokens=6, do_sample=False))
    for one, two in zip(model.modules(), again.modules(), strict=True):
        if isinstance(one, QuantizedLinear):
            assert two.scheme == one.scheme
            assert two.scales.dtype is one.scales.dtype
            assert two.dtype is one.dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("symmetric", [True, False])
def test_four_bits_come_back_bit_for_bit(symmetric: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    expected = saved(tmp_path, wide(dtype), WeightOnlyConfig(bits=4, group_size=32, symmetric=symmetric))
    again = hf_accel.from_pretrained(tmp_path)
    assert again.model.layers[0].mlp.up_proj.scheme == Scheme(4, 32, symmetric)
    assert again.lm_head.scheme == Scheme(8)
    assert torch.equal(logits(again), expected)


@pytest.mark.parametrize("head", [8, 4, None])
def test_a_tied_head_comes_back(head: int | None, tmp_path: Path) -> None:
    model = wide(tie_word_embeddings=True)
    expected = saved(tmp_path, model, WeightOnlyConfig(bits=4, group_size=32, head=head))
    assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"] is (head is None)
    again = hf_accel.from_pretrained(tmp_path)
    assert torch.equal(logits(again), expected)
    again.tie_weights()
    assert torch.equal(logits(again), expected)


@pytest.mark.parametrize("tied", [True, False])
def test_packed_embeddings_come_back_and_share_their_codes(tied: bool, tmp_path: Path) -> None:
    expected = saved(tmp_path, wide(tie_word_embeddings=tied), WeightOnlyConfig(bits=8, embeddings=8))
    again = hf_accel.from_pretrained(tmp_path)
    assert torch.equal(logits(again), expected)
    table, head = again.get_input_embeddings(), again.get_output_embeddings()
    assert (table.codes.data_ptr() == head.codes.data_ptr()) is tied


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_shards_and_what_an_earlier_save_left(name: str, tmp_path: Path) -> None:
    stock = build(name)
    stock.generation_config.temperature, stock.generation_config.do_sample = 0.5, True
    stock.save_pretrained(tmp_path, max_shard_size="20kB")
    expected = saved(tmp_path, stock, WeightOnlyConfig(bits=8), max_shard_size="30kB")
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(files) > 3
    assert all(file.startswith("hf_accel" if name in PRIVATE else "model") for file in files)
    [index] = tmp_path.glob("*.index.json")
    assert set(json.loads(index.read_text())["weight_map"].values()) == set(files)
    again = hf_accel.from_pretrained(tmp_path)
    assert torch.equal(logits(again), expected)
    assert again.generation_config.temperature == 0.5
    saved(tmp_path, build(name), WeightOnlyConfig(bits=8))
    assert len(list(tmp_path.glob("*.safetensors*"))) == 1


@pytest.mark.parametrize("config", [WeightOnlyConfig(bits=8), WeightOnlyConfig(bits=8, embeddings=8)])
def test_a_loaded_model_is_optimised_saved_and_restored(config: WeightOnlyConfig, tmp_path: Path) -> None:
    expected = saved(tmp_path / "first", wide(), config)
    model = hf_accel.from_pretrained(tmp_path / "first")
    hf_accel.save_pretrained(model, tmp_path / "second")
    assert torch.equal(logits(hf_accel.from_pretrained(tmp_path / "second")), expected)
    hf_accel.optimize(model, [hf_accel.KVCacheConfig(), hf_accel.DecodingConfig()])
    model.save_pretrained(tmp_path / "third")
    hf_accel.restore(model)
    for folder in ("second", "third"):
        for file in (tmp_path / "first").glob("*.safetensors"):
            assert (tmp_path / folder / file.name).read_bytes() == file.read_bytes()
    assert torch.equal(logits(model), expected)
    if config.embeddings is None:
        model.save_pretrained(tmp_path / "fourth")  # stock's
        assert torch.equal(logits(hf_accel.from_pretrained(tmp_path / "fourth")), expected)
    else:
        with pytest.raises(hf_accel.UnsupportedModelError, match=r"hf_accel\.save_pretrained"):
            model.save_pretrained(tmp_path / "fourth")


def test_models_without_packed_weights_are_stock_on_disk(tmp_path: Path) -> None:
    stock = build("llama")
    hf_accel.save_pretrained(hf_accel.optimize(build("llama"), hf_accel.KVCacheConfig()), tmp_path)
    assert torch.equal(logits(hf_accel.from_pretrained(tmp_path)), logits(stock))
    assert hf_accel.from_pretrained(tmp_path, dtype="bfloat16").dtype is torch.bfloat16


def test_restored_models_are_saved_as_stock_does(tmp_path: Path) -> None:
    stock = wide()
    expected = logits(stock)
    hf_accel.restore(quantized(stock, FOUR)).save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), expected)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_saved_as_the_original(copied: Any, tmp_path: Path) -> None:
    model = quantized(wide(), FOUR)
    copied(model).save_pretrained(tmp_path)
    assert torch.equal(logits(hf_accel.from_pretrained(tmp_path)), logits(model))
    private = copied(quantized(build("gpt2"), WeightOnlyConfig(bits=8)))
    with pytest.raises(hf_accel.UnsupportedModelError, match=r"hf_accel\.save_pretrained\(model, folder\)"):
        private.save_pretrained(tmp_path / "private")
    assert not list((tmp_path / "private").glob("*.safetensors"))


def test_another_dtype_is_asked_for(tmp_path: Path) -> None:
    expected = saved(tmp_path)
    model = hf_accel.from_pretrained(tmp_path, dtype=torch.bfloat16, device="cpu")
    assert model.dtype is torch.bfloat16
    assert difference(logits(model), expected) < 0.1
    with pytest.raises(hf_accel.ConfigError, match="dtype"):
        hf_accel.from_pretrained(tmp_path, dtype="int8")


def test_options_that_cannot_be_served_are_refused(tmp_path: Path) -> None:
    model = quantized(wide(), FOUR)
    with pytest.raises(hf_accel.ConfigError, match="'push_to_hub'"):
        model.save_pretrained(tmp_path / "a", push_to_hub=True)
    model.save_pretrained(tmp_path / "a", is_main_process=False)
    assert not (tmp_path / "a").exists()
    (tmp_path / "file").touch()
    with pytest.raises(hf_accel.CheckpointError, match="is a file"):
        model.save_pretrained(tmp_path / "file")
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(hf_accel.CheckpointError, match=r"pytorch_model\.bin"):
        quantized(build("gpt2"), WeightOnlyConfig(bits=8)).save_pretrained(tmp_path)


@pytest.mark.parametrize("name", sorted(PRIVATE))
def test_stock_code_never_opens_the_private_layout(name: str, tmp_path: Path) -> None:
    saved(tmp_path, build(name), WeightOnlyConfig(bits=8))
    for cls in (AutoModelForCausalLM, type(build(name))):
        with pytest.raises(OSError, match=r"no file named model\.safetensors"):
            cls.from_pretrained(tmp_path)


def test_without_the_package_stock_code_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = saved(tmp_path)
    for module in [name for name in sys.modules if name.partition(".")[0] == "compressed_tensors"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "compressed_tensors", None)
    for place in ("transformers.utils.quantization_config", "transformers.quantizers.quantizer_compressed_tensors"):
        monkeypatch.setattr(f"{place}.is_compressed_tensors_available", lambda: False)
    for cls in (AutoModelForCausalLM, type(wide())):
        with pytest.raises(ImportError, match="compressed-tensors"):
            cls.from_pretrained(tmp_path)
    assert torch.equal(logits(hf_accel.from_pretrained(tmp_path)), expected)


@pytest.mark.peft
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_adapters_are_saved_by_themselves(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model = quantized(wide(), FOUR)
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"], r=2))
    adapted.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.glob("*.safetensors")] == ["adapter_model.safetensors"]
    with pytest.raises(hf_accel.UnsupportedModelError, match="an adapter"):
        model.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.glob("*.safetensors")] == ["adapter_model.safetensors"]
