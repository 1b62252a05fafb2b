"""Damaged, truncated and foreign files: every fault is a CheckpointError that names file and tensor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models import build
from quantized_files import saved
from safetensors import safe_open
from safetensors.torch import save_file

import hf_accel
from hf_accel import WeightOnlyConfig


def edit_tensors(folder: Path, change: Any) -> None:
    with safe_open(folder / "model.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def edit_config(folder: Path, change: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config["quantization_config"])
    path.write_text(json.dumps(config))


UP = "model.layers.1.mlp.up_proj"


@pytest.mark.parametrize(
    "name, change",
    [
        (f"{UP}.weight_packed", lambda t: t.pop(f"{UP}.weight_packed")),
        (f"{UP}.weight_scale", lambda t: t.pop(f"{UP}.weight_scale")),
        ("model.norm.weight", lambda t: t.pop("model.norm.weight")),
        (f"{UP}.weight_packed", lambda t: t.update({f"{UP}.weight_packed": t[f"{UP}.weight_packed"][:, :-1].clone()})),
        (f"{UP}.weight_packed", lambda t: t.update({f"{UP}.weight_packed": t[f"{UP}.weight_packed"].float()})),
        (f"{UP}.weight_scale", lambda t: t[f"{UP}.weight_scale"].fill_(float("nan"))),
        (f"{UP}.weight_shape", lambda t: t[f"{UP}.weight_shape"].fill_(7)),
        ("model.norm.weight", lambda t: t.update({"model.norm.weight": torch.ones(3)})),
        ("model.norm.weight", lambda t: t.update({"model.norm.weight": t["model.norm.weight"].int()})),
        ("another.weight", lambda t: t.update({"another.weight": torch.ones(3)})),
        (f"{UP}.weight_g_idx", lambda t: t.update({f"{UP}.weight_g_idx": torch.ones(64)})),
    ],
)
def test_wrong_tensors_are_named_with_their_file(name: str, change: Any, tmp_path: Path) -> None:
    saved(tmp_path)
    edit_tensors(tmp_path, change)
    with pytest.raises(hf_accel.CheckpointError) as error:
        hf_accel.from_pretrained(tmp_path)
    assert name in str(error.value)
    assert str(tmp_path / "model.safetensors") in str(error.value)


@pytest.mark.parametrize("kept", [0, 4, 500, 0.3, 0.999])
def test_truncated_files_are_named(kept: float, tmp_path: Path) -> None:
    saved(tmp_path)
    path = tmp_path / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: int(kept if kept > 1 else kept * len(content))])
    with pytest.raises(hf_accel.CheckpointError, match=r"model\.safetensors is damaged, truncated"):
        hf_accel.from_pretrained(tmp_path)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors.index.json", "generation_config.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe"])
def test_files_that_are_no_json_are_named(file: str, content: bytes, tmp_path: Path) -> None:
    saved(tmp_path, max_shard_size="20kB")
    (tmp_path / file).write_bytes(content)
    with pytest.raises(hf_accel.CheckpointError, match=file.replace(".", r"\.")):
        hf_accel.from_pretrained(tmp_path)


def test_missing_files_are_named(tmp_path: Path) -> None:
    saved(tmp_path, max_shard_size="20kB")
    shard = min(tmp_path.glob("model-*.safetensors"))
    shard.unlink()
    with pytest.raises(hf_accel.CheckpointError, match=f"{shard.name} is missing"):
        hf_accel.from_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(hf_accel.CheckpointError, match=r"config\.json cannot be read"):
        hf_accel.from_pretrained(tmp_path)


def test_an_index_cannot_lead_out_of_the_folder(tmp_path: Path) -> None:
    saved(tmp_path / "model", max_shard_size="20kB")
    path = tmp_path / "model" / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"] = dict.fromkeys(index["weight_map"], "../other.safetensors")
    path.write_text(json.dumps(index))
    with pytest.raises(hf_accel.CheckpointError, match="lies outside"):
        hf_accel.from_pretrained(tmp_path / "model")


def first_weights(config: dict[str, Any]) -> dict[str, Any]:
    return config["config_groups"]["group_0"]["weights"]


@pytest.mark.parametrize(
    "found, change",
    [
        ("'bitsandbytes'", lambda c: c.update(quant_method="bitsandbytes")),
        ("'float-quantized'", lambda c: c["config_groups"]["group_0"].update(format="float-quantized")),
        ("'float'", lambda c: first_weights(c).update(type="float")),
        ("5 bits", lambda c: first_weights(c).update(num_bits=5)),
        ("'block'", lambda c: first_weights(c).update(strategy="block")),
        ("groups of 16", lambda c: first_weights(c).update(group_size=16)),
        ("input_activations", lambda c: c["config_groups"]["group_0"].update(input_activations={"num_bits": 8})),
        ("cache", lambda c: c.update(kv_cache_scheme={"num_bits": 8})),
        ("sparse", lambda c: c.update(sparsity_config={"format": "sparse-24-bitmask"})),
        ("'frozen'", lambda c: c.update(quantization_status="frozen")),
        ("no config_groups", lambda c: c.pop("config_groups")),
        ("pattern", lambda c: c.update(ignore=["re:("])),
    ],
)
def test_other_formats_are_refused_by_what_they_are(found: str, change: Any, tmp_path: Path) -> None:
    saved(tmp_path)
    edit_config(tmp_path, change)
    with pytest.raises(hf_accel.CheckpointError, match=r"config\.json describes") as error:
        hf_accel.from_pretrained(tmp_path)
    assert found in str(error.value)


def test_experts_that_are_not_complete_are_refused(tmp_path: Path) -> None:
    saved(tmp_path, build("mixtral"), WeightOnlyConfig(bits=8))
    lost = "model.layers.0.mlp.experts.gate_up_proj.2"
    edit_config(tmp_path, lambda c: [g["targets"].remove(lost) for g in c["config_groups"].values()])
    with pytest.raises(hf_accel.CheckpointError, match=lost):
        hf_accel.from_pretrained(tmp_path)
