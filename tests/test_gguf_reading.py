"""GGUF files written by the gguf package alone: our weights are its dequantization to the bit, our text stock's."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import gguf
import gguf_files
import numpy as np
import pytest
import torch
from gguf_files import TINY, build, of_kind, tensors_of, write
from models import prompt
from torch import Tensor
from transformers import AutoModelForCausalLM

import hf_accel
from hf_accel.core.steps.patcher import Fidelity
from hf_accel.quantization.gguf.loading import GgufModel, load_gguf, packed_weights
from hf_accel.quantization.gguf.reader import Entry
from hf_accel.quantization.gguf.types import packed
from hf_accel.quantization.modules.embedding import QuantizedEmbedding
from hf_accel.quantization.modules.linear import QuantizedLinear

EXACT = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4", "IQ4_NL")
LLAMA = ("llama", "mistral")
PRODUCT = 1e-2  # of the largest logit: what rounding activations to 8 bits may change


def of_model(name: str, model: Any, written: dict[str, np.ndarray]) -> dict[str, Tensor]:
    """Return name in the model -> values of a file's tensors, as transformers' processors turn them."""
    found = {}
    for key, stored in zip(tensors_of_names(name, model), tensors_of(name, model), strict=True):
        values = torch.from_numpy(written[stored].copy())
        if name in LLAMA and stored.split(".")[-2] in ("attn_q", "attn_k"):
            heads = model.config.num_attention_heads if "attn_q" in stored else model.config.num_key_value_heads
            values = (
                values.view(heads, len(values) // heads // 2, 2, *values.shape[1:])
                .transpose(1, 2)
                .reshape(values.shape)
            )
        if name.startswith("gemma") and stored.endswith("norm.weight"):
            values = values - 1
        found[key] = values
    return found


def tensors_of_names(name: str, model: Any) -> list[str]:
    return [key for key in model.state_dict() if not (key == "lm_head.weight" and model.config.tie_word_embeddings)]


def twin(name: str, written: dict[str, np.ndarray]) -> Any:
    """Return the model in fp32 with the file's values, by transformers alone."""
    model = build(name)
    model.load_state_dict(of_model(name, model, written), strict=False)
    model.tie_weights()
    return model


def weights_of(model: Any) -> dict[str, Tensor]:
    """Return name -> fp32 values of everything in a model, packed or not."""
    found = {key: value.float() for key, value in model.state_dict().items()}
    return found | {f"{key}.weight": packed.dequantize() for key, packed in packed_weights(model).items()}


def read(tmp_path: Path, name: str, kinds: gguf_files.Kinds, **options: Any) -> tuple[GgufModel, dict[str, np.ndarray]]:
    path = tmp_path / "x.gguf"
    written = write(path, name, build(name), kinds)
    return load_gguf(path, **options), written


@pytest.mark.parametrize("kind", EXACT)
@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma"])
def test_weights_are_the_package_s_dequantization_to_the_bit(name: str, kind: str, tmp_path: Path) -> None:
    found, written = read(tmp_path, name, of_kind(kind, table=kind))
    expected = of_model(name, build(name), written)
    mine = weights_of(found.model)
    assert all(torch.equal(mine[key], value) for key, value in expected.items())
    assert found.is_close
    assert found.types[kind] == sum(len(value.shape) > 1 for value in expected.values())


@pytest.mark.parametrize("name", list(TINY))
def test_text_is_that_of_the_model_with_the_file_s_values(name: str, tmp_path: Path) -> None:
    found, written = read(tmp_path, name, of_kind("Q8_0", table="Q8_0"), dtype=torch.float32)
    ids = prompt(2, 24)
    with torch.no_grad():
        ours, expected = found.model(ids).logits, twin(name, written)(ids).logits
    assert (ours - expected).abs().max() <= PRODUCT * expected.abs().max()
    assert not found.model.training


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0", "MXFP4", "Q6_K", "F16"])
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_logits_are_those_of_stock_s_expansion(
    name: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "Q6_K":  # blocks of 256 columns
        tiny = copy.deepcopy(TINY[name])
        tiny.config.update(hidden_size=256, intermediate_size=256, head_dim=tiny.config["head_dim"] and 64)
        monkeypatch.setitem(TINY, name, tiny)
    found, _ = read(tmp_path, name, of_kind(kind), dtype=torch.float32)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="x.gguf", dtype=torch.float32)
    ids = prompt(1, 24)
    with torch.no_grad():
        ours, expected = found.model(ids).logits, stock.eval()(ids).logits
    bound = {"F16": 1e-5, "Q8_0": PRODUCT, "Q6_K": 5 * PRODUCT}.get(kind, 20 * PRODUCT)
    assert (ours - expected).abs().max() <= bound * expected.abs().max()


@pytest.mark.parametrize("kind", ["Q4_K", "Q5_K", "IQ4_XS"])
def test_grids_of_32_columns_are_kept_and_others_are_told(kind: str, tmp_path: Path) -> None:
    values = np.random.default_rng(0).standard_normal((48, 512), dtype=np.float32)

    def of(type_name: str) -> tuple[Any, Tensor]:
        blocks = gguf_files.quantized(values, gguf.GGMLQuantizationType[type_name])
        expected = torch.from_numpy(gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[type_name]))
        return packed(Entry("x", values.shape, type_name, 0, blocks.nbytes), torch.from_numpy(blocks)), expected

    found, expected = of(kind)
    assert found.error == 0
    assert (found.weight.dequantize() - expected).abs().max() <= 2**-22 * expected.abs().max()
    found, expected = of("Q6_K")
    error = ((found.weight.dequantize() - expected).abs() / expected.abs().amax(dim=1, keepdim=True)).max()
    assert 0 < found.error <= 1 / 250
    assert float(error) == pytest.approx(found.error)


def test_nothing_is_expanded_and_a_tied_head_has_the_codes_of_the_table(tmp_path: Path) -> None:
    found, _ = read(tmp_path, "qwen2", of_kind("Q4_0", table="Q8_0"))
    model = found.model
    assert model.dtype is torch.bfloat16
    products = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    assert all(isinstance(module, QuantizedLinear) for module in products)
    table = model.get_input_embeddings()
    assert isinstance(table, QuantizedEmbedding)
    assert table.codes is model.get_output_embeddings().codes
    assert sum(p.numel() for p in model.parameters() if p.dim() > 1) == 0
    row = model(input_ids=prompt(1, 4), output_hidden_states=True).hidden_states[0]
    assert torch.equal(row, table.packed.dequantize()[prompt(1, 4)].to(model.dtype))


@pytest.mark.parametrize(("table", "dtype"), [("F32", "bfloat16"), ("BF16", "bfloat16"), ("F16", "float16")])
def test_the_dtype_is_the_smallest_that_holds_every_dense_value(table: str, dtype: str, tmp_path: Path) -> None:
    assert read(tmp_path, "gemma", of_kind("Q8_0", table))[0].model.dtype is getattr(torch, dtype)


def test_values_that_no_half_holds_are_read_in_float32(tmp_path: Path) -> None:
    def uneven(tensors: dict[str, np.ndarray]) -> None:
        tensors["output_norm.weight"] = tensors["output_norm.weight"] * np.float32(1.0001)

    write(tmp_path / "x.gguf", "llama", build("llama"), of_kind("Q8_0"), uneven)
    assert load_gguf(tmp_path / "x.gguf").model.dtype is torch.float32


@pytest.mark.parametrize("kind", ["llama3", "linear", "other"])
def test_rotary_scalings_of_a_file_are_computed(kind: str, tmp_path: Path) -> None:
    config = copy.deepcopy(build("llama").config)
    base = 1 / config.rope_parameters["rope_theta"] ** (np.arange(0, 32, 2) / 32)
    if kind == "llama3":
        parameters = {
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
        config.rope_parameters |= {"rope_type": "llama3", **parameters}
        expected = type(build("llama"))(config).model.rotary_emb.inv_freq.numpy()
    else:
        expected = base / (4 if kind == "linear" else np.linspace(1, 3, 16))

    def describe(writer: gguf.GGUFWriter) -> None:
        if kind == "linear":
            writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(4.0)
        else:
            writer.add_tensor("rope_freqs.weight", (base / expected).astype(np.float32))

    write(tmp_path / "x.gguf", "llama", build("llama"), of_kind("Q8_0"), describe=describe)
    model = load_gguf(tmp_path / "x.gguf").model
    rotary = model.model.rotary_emb
    rotary(torch.zeros(1, 1, 64), torch.arange(1)[None])
    assert np.allclose(rotary.inv_freq.numpy(), expected, rtol=1e-5)
    assert rotary.attention_scaling == 1.0


def test_load_optimises_what_it_read_and_tells_of_it(tmp_path: Path) -> None:
    written = write(tmp_path / "x.gguf", "llama", build("llama"), of_kind("Q4_0", table="F16"))
    model = hf_accel.load(tmp_path / "x.gguf", [hf_accel.DecoderBlockConfig()])
    plain = load_gguf(tmp_path / "x.gguf").model
    report = hf_accel.report(model)
    assert "15 tensors of Q4_0 as they are" in report.applied[0].summary
    assert report.applied[0].fidelity == Fidelity.CLOSE.value
    assert report.weight_bytes == sum(int(entry.n_bytes) for entry in gguf.GGUFReader(tmp_path / "x.gguf").tensors) != 0
    ids = prompt(1, 12)
    assert torch.equal(model.generate(ids, max_new_tokens=12), plain.generate(ids, max_new_tokens=12))
    assert len(written) == 21
    with pytest.raises(hf_accel.IrreversibleError):
        hf_accel.restore(model)


def test_dense_products_of_a_file_can_be_rounded_as_they_are_read(tmp_path: Path) -> None:
    write(tmp_path / "x.gguf", "llama", build("llama"), of_kind("F32"))
    config = hf_accel.WeightOnlyConfig(bits=4, group_size=32)
    model = hf_accel.load(tmp_path / "x.gguf", config)
    expected = hf_accel.optimize(load_gguf(tmp_path / "x.gguf").model, config)
    mine, theirs = packed_weights(model), packed_weights(expected)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name].dequantize(), theirs[name].dequantize()) for name in mine)


@pytest.mark.parametrize("kind", ["Q4_0", "F16"])
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_transformers_own_loading_takes_our_config(name: str, kind: str, tmp_path: Path) -> None:
    """Nothing of it is exchanged: without the config transformers reads files as before."""
    expected = read(tmp_path, name, of_kind(kind, table="Q8_0"))[0].model
    options = {"gguf_file": "x.gguf", "quantization_config": hf_accel.GGUFConfig()}
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True, **options)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.dtype is expected.dtype
    assert packed_weights(model).keys() == packed_weights(expected).keys()
    assert torch.equal(model(prompt(2, 20)).logits, expected(prompt(2, 20)).logits)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="x.gguf")
    assert not packed_weights(plain)


def test_a_file_that_transformers_reads_as_another_model_is_refused_there(tmp_path: Path) -> None:
    read(tmp_path, "gemma2", of_kind("Q4_0"))
    options = {"gguf_file": "x.gguf", "quantization_config": hf_accel.GGUFConfig()}
    with pytest.raises(hf_accel.UnsupportedModelError, match=r"attn_logit_softcapping = 50\.0"):
        AutoModelForCausalLM.from_pretrained(tmp_path, **options)


def test_a_model_with_offsets_of_its_own_is_not_saved_as_a_checkpoint(tmp_path: Path) -> None:
    model = read(tmp_path, "llama", of_kind("Q4_1"))[0].model
    with pytest.raises(hf_accel.UnsupportedModelError, match="export_gguf"):
        hf_accel.save_pretrained(model, tmp_path / "saved")
    model = read(tmp_path, "gemma", of_kind("Q4_0", table="Q8_0"))[0].model
    hf_accel.save_pretrained(model, tmp_path / "saved")
    again = hf_accel.from_pretrained(tmp_path / "saved")
    assert torch.equal(model(prompt()).logits, again(prompt()).logits)
