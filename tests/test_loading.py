"""Models read in few bits are, bit for bit, those that are quantized in memory."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from models import prompt
from reading import FOUR, assert_same, in_memory, written
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

import hf_accel
from hf_accel import DecodingConfig, WeightOnlyConfig
from hf_accel.quantization.reading import quantizer

EIGHT = WeightOnlyConfig(bits=8)
NAMES = ["llama", "qwen2", "gemma2", "phi3", "gpt2", "mixtral", "qwen3_moe", "llava"]


@pytest.mark.parametrize("name", NAMES)
def test_models_are_those_quantized_in_memory(name: str, tmp_path: Path) -> None:
    folder = written(tmp_path, name, sharded=True)
    whole = in_memory(folder)
    assert_same(hf_accel.load(folder, FOUR), whole)
    cls = AutoModelForImageTextToText if name == "llava" else AutoModelForCausalLM
    assert_same(cls.from_pretrained(folder, quantization_config=FOUR, device_map="cpu"), whole)


@pytest.mark.parametrize(
    "config",
    [
        EIGHT,
        WeightOnlyConfig(bits=3, head=None),
        WeightOnlyConfig(bits=2, symmetric=False, embeddings=8),
        WeightOnlyConfig(bits=4, head=4, layers={"*.q_proj": None, "*.up_proj": 8, "model.layers.0.*": (4, 32)}),
    ],
)
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_configs(name: str, config: WeightOnlyConfig, tmp_path: Path) -> None:
    folder = written(tmp_path, name, torch.bfloat16)
    assert_same(hf_accel.load(folder, config), in_memory(folder, config))


@pytest.mark.parametrize("wanted", [None, torch.float32, torch.bfloat16, "float16"])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_of_files_and_of_the_model(stored: torch.dtype, wanted: Any, tmp_path: Path) -> None:
    folder = written(tmp_path, "llama", stored)
    whole = in_memory(folder, dtype=wanted or "auto")
    assert whole.dtype == (stored if wanted is None else getattr(torch, str(wanted).removeprefix("torch.")))
    assert_same(hf_accel.load(folder, FOUR, dtype=wanted), whole)


def test_a_config_that_names_no_dtype(tmp_path: Path) -> None:
    folder = written(tmp_path, "llama", torch.bfloat16)
    config = json.loads((folder / "config.json").read_text())
    del config["dtype"]
    (folder / "config.json").write_text(json.dumps(config))
    assert_same(hf_accel.load(folder, FOUR), in_memory(folder))


def test_a_tensor_that_is_split_into_products(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Old files may hold gate and up as one; the first of the two stays as it is here, the second does not."""
    from transformers import conversion_mapping
    from transformers.core_model_loading import Chunk, WeightConverter

    folder = written(tmp_path, "llama")
    config = WeightOnlyConfig(bits=4, layers={"*.gate_proj": None})
    whole = in_memory(folder, config)
    tensors = load_file(folder / "model.safetensors")
    for layer in range(3):
        parts = [tensors.pop(f"model.layers.{layer}.mlp.{part}_proj.weight") for part in ("gate", "up")]
        tensors[f"model.layers.{layer}.mlp.both.weight"] = torch.cat(parts)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    targets = ["mlp.gate_proj.weight", "mlp.up_proj.weight"]
    conversion_mapping.register_checkpoint_conversion_mapping(
        "llama", [WeightConverter("mlp.both.weight", targets, [Chunk(dim=0)])], overwrite=True
    )
    try:
        assert_same(hf_accel.load(folder, config), whole)
    finally:
        conversion_mapping._checkpoint_conversion_mapping_cache.pop("llama")


@pytest.mark.parametrize("is_equal", [True, False])
def test_a_file_with_both_of_two_tied_tensors(is_equal: bool, tmp_path: Path) -> None:
    folder = written(tmp_path, "qwen2")
    tensors = load_file(folder / "model.safetensors")
    table = tensors["model.embed_tokens.weight"]
    tensors["lm_head.weight"] = table.clone() if is_equal else table.flip(0).contiguous()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert_same(hf_accel.load(folder, EIGHT), in_memory(folder, EIGHT))


def test_weights_are_given_up_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When a weight is rounded, no other that is to be rounded is in memory in full precision."""
    folder = written(tmp_path, "llama")
    seen = []

    class Watched(quantizer.ReadingQuantizer):
        def take(self, name: str, tensor: torch.Tensor) -> None:
            held = [name for name, (target, part) in self.places.items() if not getattr(target.module, part).is_meta]
            seen.append((name, held, len(self.packed)))
            super().take(name, tensor)

    monkeypatch.setitem(quantizer.auto.AUTO_QUANTIZER_MAPPING, "hf_accel", Watched)
    hf_accel.load(folder, FOUR)
    assert [packed for *_, packed in seen] == list(range(3 * 7 + 1))
    assert not any(held for _, held, _ in seen)


@pytest.mark.skipif(sys.platform != "linux", reason="mappings are looked up in /proc")
def test_loading_by_transformers_gives_pages_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a mapped file only what stays in the model is in memory in the end; a copy of it is left alone."""
    folder = written(tmp_path, "llama", torch.float16, hidden_size=256, intermediate_size=1024, head_dim=64)
    path, resident = folder / "model.safetensors", []

    class Watched(quantizer.ReadingQuantizer):
        def postprocess_model(self, model: Any, **options: Any) -> None:
            text = Path("/proc/self/smaps").read_text()
            parts = re.findall(re.escape(str(path)) + r"\n(?:.*\n)*?Rss: +(\d+) kB", text)
            resident.append(1024 * sum(map(int, parts)))
            super().postprocess_model(model, **options)

    monkeypatch.setitem(quantizer.auto.AUTO_QUANTIZER_MAPPING, "hf_accel", Watched)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=FOUR)
    assert_same(model, in_memory(folder))
    assert 0 < resident[0] < path.stat().st_size / 2


def test_goals_and_configs_are_applied_to_what_was_read(tmp_path: Path) -> None:
    folder = written(tmp_path, "llama")
    model = hf_accel.load(folder, [FOUR, DecodingConfig()])
    twin = in_memory(folder)
    report = hf_accel.report(model)
    assert [type(step.config) for step in report.applied] == [WeightOnlyConfig, DecodingConfig]
    assert torch.equal(model.generate(prompt(), max_new_tokens=6), twin.generate(prompt(), max_new_tokens=6))
    assert report.calls.served == 1
    plan = hf_accel.Plan.of([FOUR, DecodingConfig()])
    assert hf_accel.report(hf_accel.load(folder, plan)).applied == report.applied
    exact = hf_accel.report(hf_accel.load(folder, ["exact", FOUR]))
    assert (exact.goal, exact.applied[0].config) == ("exact", FOUR)


def test_the_report_is_that_of_memory_and_nothing_is_restored(tmp_path: Path) -> None:
    folder = written(tmp_path, "llama")
    model = hf_accel.load(folder, FOUR)
    found = hf_accel.report(model).to_dict()
    expected = hf_accel.report(in_memory(folder)).to_dict()
    assert found == expected
    with pytest.raises(hf_accel.IrreversibleError, match="originals were never in memory"):
        hf_accel.restore(model)
    assert hf_accel.report(model).to_dict() == found


def test_a_call_with_options_of_its_own_may_still_be_undone(tmp_path: Path) -> None:
    """Only going back to before loading is refused: what one call has built is taken back on its error."""
    from hf_accel.core.calls.hosting import host_of

    host = host_of(hf_accel.load(written(tmp_path, "llama"), FOUR))
    assert host is not None

    def fails() -> None:
        host.journal.set_attribute(host, "mark", 1)
        raise KeyError("built")

    with pytest.raises(KeyError, match="built"):
        host.built_once("a call", 1, 1, fails)
    assert "mark" not in vars(host)


def test_models_that_were_read_are_saved_and_optimised(tmp_path: Path) -> None:
    folder = written(tmp_path, "llama")
    stock = AutoModelForCausalLM.from_pretrained(folder, quantization_config=FOUR)
    stock.save_pretrained(tmp_path / "again")
    with torch.no_grad():
        expected = stock(prompt()).logits
        assert torch.equal(hf_accel.from_pretrained(tmp_path / "again")(prompt()).logits, expected)
        hf_accel.optimize(stock, DecodingConfig())
        hf_accel.restore(stock)
        assert torch.equal(stock(prompt()).logits, expected)


def test_what_is_not_rounded_is_loaded_as_it_is(tmp_path: Path) -> None:
    folder = written(tmp_path, "llama")
    model = hf_accel.load(folder, DecodingConfig())
    assert_same(model, AutoModelForCausalLM.from_pretrained(folder))
    hf_accel.restore(model)


def test_progress_is_told_of_every_tensor(tmp_path: Path) -> None:
    ticks: list[int] = []
    folder = written(tmp_path, "llama")
    hf_accel.load(folder, FOUR, progress=lambda: ticks.append(1))
    assert len(ticks) >= len(load_file(folder / "model.safetensors"))
