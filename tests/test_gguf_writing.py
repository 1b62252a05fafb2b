"""Models written to GGUF files: the gguf package reads the same bits, and so do we; what cannot be said is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf_files import TINY, build, of_kind, permuted, write
from models import prompt
from typer.testing import CliRunner

import hf_accel
from hf_accel import UnsupportedModelError, WeightOnlyConfig, export_gguf
from hf_accel.assets import demo_path
from hf_accel.cli import app
from hf_accel.kernels.weights import PackedWeight
from hf_accel.ops.affine import Scheme, quantize
from hf_accel.quantization.gguf.loading import load_gguf, packed_weights
from hf_accel.quantization.gguf.types import encoded, type_for
from hf_accel.quantization.modules.linear import QuantizedLinear


def rounded(name: str, dtype: torch.dtype = torch.bfloat16, **options: Any) -> Any:
    model = build(name)
    for parameter in model.parameters():  # and no buffers: frequencies stay in fp32, as they do in loading
        parameter.data = parameter.data.to(dtype)
    return hf_accel.optimize(model, WeightOnlyConfig(**{"group_size": 32} | options))


def dequantized(path: Path) -> dict[str, np.ndarray]:
    """Return name -> the package's own dequantization of what a file holds."""
    found = {}
    for tensor in gguf.GGUFReader(path).tensors:
        found[tensor.name] = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    return found


@pytest.mark.parametrize("name", list(TINY))
def test_what_is_written_comes_back_bit_by_bit(name: str, tmp_path: Path) -> None:
    head = None if name.startswith("gemma") else 8
    model = rounded(name, head=head)
    report = export_gguf(model, tmp_path / "x.gguf")
    again = load_gguf(tmp_path / "x.gguf").model
    mine, theirs = packed_weights(model), packed_weights(again)
    assert mine.keys() == theirs.keys()
    assert not report.rounded
    assert report.types["Q4_0"] == len(mine) - (head is not None)
    for key, weight in mine.items():
        assert torch.equal(weight.dequantize(), theirs[key].dequantize())
    state, found = model.state_dict(), again.state_dict()
    assert all(torch.equal(state[key], found[key]) for key in state if state[key].is_floating_point())
    assert again.dtype is torch.bfloat16
    assert torch.equal(model(prompt(2, 20)).logits, again(prompt(2, 20)).logits)


def test_the_package_dequantizes_our_weights_with_rows_of_heads_where_llama_cpp_has_them(tmp_path: Path) -> None:
    model = rounded("llama")
    export_gguf(model, tmp_path / "x.gguf")
    found = dequantized(tmp_path / "x.gguf")
    weights = {key: weight.dequantize().numpy() for key, weight in packed_weights(model).items()}
    assert np.array_equal(found["blk.1.attn_q.weight"], permuted(weights["model.layers.1.self_attn.q_proj"], 4))
    assert np.array_equal(found["blk.1.attn_k.weight"], permuted(weights["model.layers.1.self_attn.k_proj"], 2))
    assert np.array_equal(found["blk.1.attn_v.weight"], weights["model.layers.1.self_attn.v_proj"])
    assert np.array_equal(found["output.weight"], weights["lm_head"])
    table = next(t for t in gguf.GGUFReader(tmp_path / "x.gguf").tensors if t.name == "token_embd.weight")
    assert table.tensor_type is gguf.GGMLQuantizationType.BF16
    fields = gguf.GGUFReader(tmp_path / "x.gguf").fields
    assert fields["llama.attention.head_count_kv"].contents() == 2
    assert fields["llama.rope.dimension_count"].contents() == 32


def test_norms_of_gemma_are_stored_one_higher(tmp_path: Path) -> None:
    model = rounded("gemma2", head=None)
    export_gguf(model, tmp_path / "x.gguf")
    expected = model.model.norm.weight.detach().float().numpy() + np.float32(1)
    assert np.array_equal(dequantized(tmp_path / "x.gguf")["output_norm.weight"], expected)
    assert gguf.GGUFReader(tmp_path / "x.gguf").fields["gemma2.final_logit_softcapping"].contents() == 5.0


CASES = {
    "4 bits": (Scheme(4, 32), "Q4_0"),
    "groups of 64": (Scheme(4, 64), "Q4_0"),
    "3 bits": (Scheme(3, 32), "Q4_0"),
    "2 bits": (Scheme(2, 128), "Q4_0"),
    "8 bits": (Scheme(8), "Q8_0"),
    "8 bits in groups": (Scheme(8, 64), "Q8_0"),
    "fp4": (Scheme(4, 32, code_book="fp4"), "MXFP4"),
}


@pytest.mark.parametrize("case", CASES)
def test_every_symmetric_weight_has_a_type(case: str) -> None:
    scheme, kind = CASES[case]
    values = torch.randn(40, 128, generator=torch.Generator().manual_seed(0))
    weight = PackedWeight.pack(quantize(values, scheme, torch.bfloat16))
    assert type_for(weight) == kind
    blocks = encoded(weight, kind).numpy()
    found = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[kind])
    assert np.array_equal(found, weight.dequantize().numpy())


def test_scales_that_fp16_does_not_hold_have_none(tmp_path: Path) -> None:
    values = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    assert type_for(PackedWeight.pack(quantize(values, Scheme(4, 32), torch.float32))) is None
    assert type_for(PackedWeight.pack(quantize(values * 1e-8, Scheme(4, 32), torch.bfloat16))) is None
    assert type_for(PackedWeight.pack(quantize(values[:, :40], Scheme(8), torch.bfloat16))) is None
    model = rounded("llama", torch.float32)
    report = export_gguf(model, tmp_path / "x.gguf")
    assert list(report.rounded) == ["lm_head.weight"]  # one scale of fp32 per row
    found = load_gguf(tmp_path / "x.gguf", torch.float32).model.lm_head.weight
    exact = packed_weights(model)["lm_head"].dequantize()
    assert torch.equal(found, exact.half().float())
    assert float((found - exact).abs().max() / exact.abs().max()) == report.rounded["lm_head.weight"]
    assert "bfloat16" in str(report)


def test_offsets_of_a_file_go_back_into_one(tmp_path: Path) -> None:
    written = write(tmp_path / "x.gguf", "llama", build("llama"), of_kind("Q4_1", table="Q8_0"))
    report = export_gguf(load_gguf(tmp_path / "x.gguf").model, tmp_path / "y.gguf")
    again = dequantized(tmp_path / "y.gguf")
    assert all(np.array_equal(again[name], values) for name, values in written.items())
    assert report.types == {"F32": 5, "Q4_1": 15, "Q8_0": 1}


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_model_that_is_not_packed_keeps_its_dtype(dtype: str, tmp_path: Path) -> None:
    model = build("qwen2").to(getattr(torch, dtype))
    report = export_gguf(model, tmp_path / "x.gguf")
    assert report.types[{"float32": "F32", "float16": "F16", "bfloat16": "BF16"}[dtype]] >= 15
    again = load_gguf(tmp_path / "x.gguf", model.dtype).model
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())


def test_rotary_scaling_of_llama_3_comes_back(tmp_path: Path) -> None:
    model = build("llama")
    config = model.config
    config.rope_parameters |= {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    model = type(model)(config).eval()
    export_gguf(model, tmp_path / "x.gguf")
    again = load_gguf(tmp_path / "x.gguf", torch.float32).model
    assert torch.equal(again.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)


def refused(change: str) -> Any:
    model = build("llama" if change != "window" else "mistral")
    if change == "activation":
        model.config.hidden_act = "gelu"
    if change == "rope":
        model.config.rope_parameters |= {"rope_type": "yarn", "factor": 4.0}
    if change == "architecture":
        model.config.model_type = "olmo9"
    if change == "adapter":
        model.model.layers[0].mlp.up_proj.register_parameter("lora_A", torch.nn.Parameter(torch.zeros(2, 2)))
    if change == "two tables":
        return hf_accel.optimize(build("gemma").bfloat16(), WeightOnlyConfig(bits=4, group_size=32, head=8))
    return model


@pytest.mark.parametrize("change", ["activation", "rope", "architecture", "adapter", "two tables"])
def test_what_a_file_cannot_say_is_refused_and_nothing_is_written(change: str, tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"before")
    with pytest.raises(UnsupportedModelError):
        export_gguf(refused(change), tmp_path / "x.gguf")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("x.gguf", b"before")]


def test_a_window_that_llama_cpp_does_not_have_bounds_the_context(tmp_path: Path) -> None:
    model = build("mistral")
    model.config.sliding_window = 64
    report = export_gguf(model, tmp_path / "x.gguf")
    assert gguf.GGUFReader(tmp_path / "x.gguf").fields["llama.context_length"].contents() == 64
    assert "64 tokens" in str(report)


def test_a_write_that_fails_leaves_the_file_that_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.gguf").write_bytes(b"before")
    left = [3]

    def full(*given: Any, **options: Any) -> None:
        left[0] -= 1
        if not left[0]:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", full)
    with pytest.raises(hf_accel.CheckpointError, match="No space"):
        export_gguf(build("llama"), tmp_path / "x.gguf")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("x.gguf", b"before")]


def test_the_command_writes_what_it_says(tmp_path: Path) -> None:
    out = tmp_path / "demo.gguf"
    result = CliRunner().invoke(app, ["export", str(demo_path()), str(out), "--bits", "4"])
    assert result.exit_code == 0, result.output
    assert "35 Q4_0" in result.output
    again = CliRunner().invoke(app, ["export", str(out), str(tmp_path / "again.gguf"), "--json"])
    assert again.exit_code == 0, again.output
    first, second = (gguf.GGUFReader(path).tensors for path in (out, tmp_path / "again.gguf"))
    assert all(np.array_equal(one.data, two.data) for one, two in zip(first, second, strict=True))
    wrong = CliRunner().invoke(app, ["export", str(demo_path()), str(tmp_path / "folder")])
    assert wrong.exit_code == 2
    assert isinstance(load_gguf(out).model.lm_head, QuantizedLinear)
