"""Packs that are kept beside a model: the next start maps them, and none is used that is of anything else."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models import prompt
from reading import FOUR, assert_same, in_memory, packs, written
from safetensors.torch import load_file, save_file

import hf_accel
from hf_accel import CheckpointError, ConfigError, DecodingConfig, WeightOnlyConfig
from hf_accel.measure import machine
from hf_accel.quantization.reading import folder as reading
from hf_accel.quantization.reading import pack


def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the list that each reading of a model's own files joins."""
    found: list[str] = []
    before = reading._Saved._in_few_bits

    def noted(self: Any, rounding: WeightOnlyConfig) -> Any:
        found.append(str(self.place))
        return before(self, rounding)

    monkeypatch.setattr(reading._Saved, "_in_few_bits", noted)
    return found


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2", "mixtral", "llava"])
@pytest.mark.parametrize("config", [FOUR, WeightOnlyConfig(bits=8, embeddings=8)], ids=["four", "tables"])
def test_models_come_back_from_their_packs(
    name: str, config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = counted(monkeypatch)
    folder = written(tmp_path, name, torch.bfloat16)
    first = hf_accel.load(folder, config, cache=True)
    second = hf_accel.load(folder, config, cache=True)
    assert len(reads) == 1
    assert_same(second, first)
    assert_same(second, in_memory(folder, config))
    assert hf_accel.report(second).to_dict() == hf_accel.report(first).to_dict()
    assert str(hf_accel.report(second)) == str(hf_accel.report(first))


def test_tensors_lie_in_the_file_where_kernels_take_them(tmp_path: Path) -> None:
    folder = written(tmp_path, "llama")
    hf_accel.load(folder, FOUR, cache=True)
    model = hf_accel.load(folder, FOUR, cache=True)
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    mapped = [line[0].split("-") for line in lines if line[-1] == str(packs(folder)[0])]
    for name, tensor in model.state_dict().items():
        assert tensor.data_ptr() % 64 == 0, name
        assert any(int(start, 16) <= tensor.data_ptr() < int(end, 16) for start, end in mapped), name


def test_writing_to_a_mapped_model_leaves_the_pack_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = counted(monkeypatch)
    folder = written(tmp_path, "llama")
    expected = hf_accel.load(folder, FOUR, cache=True)
    with torch.no_grad():
        for tensor in hf_accel.load(folder, FOUR, cache=True).state_dict().values():
            tensor.zero_()
    assert_same(hf_accel.load(folder, FOUR, cache=True), expected)
    assert len(reads) == 1


def change_weight(folder: Path) -> None:
    """Change one weight, and leave size and time of the file as they were."""
    path = folder / "model.safetensors"
    before = path.stat()
    tensors = load_file(path)
    tensors["model.layers.1.mlp.up_proj.weight"] += 1
    save_file(tensors, path, {"format": "pt"})
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def touch(folder: Path) -> None:
    os.utime(folder / "model.safetensors")


def change_config(folder: Path) -> None:
    path = folder / "config.json"
    before = path.stat()
    path.write_text(path.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def add_file(folder: Path) -> None:
    shutil.copy(folder / "model.safetensors", folder / "other.safetensors")


@pytest.mark.parametrize("change", [change_weight, touch, change_config, add_file])
def test_packs_of_other_files_are_refused(change: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = counted(monkeypatch)
    folder = written(tmp_path, "llama")
    hf_accel.load(folder, FOUR, cache=True)
    change(folder)
    model = hf_accel.load(folder, FOUR, cache=True)
    assert len(reads) == 2
    assert_same(model, in_memory(folder))
    assert_same(hf_accel.load(folder, FOUR, cache=True), model)
    assert len(reads) == 2
    assert len(packs(folder)) == 1  # that of the old files is replaced


def test_other_configs_dtypes_and_versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = counted(monkeypatch)
    folder = written(tmp_path, "llama")
    for config, dtype in ((FOUR, None), (WeightOnlyConfig(bits=8), None), (FOUR, torch.bfloat16)):
        model = hf_accel.load(folder, config, dtype=dtype, cache=True)
        assert_same(model, in_memory(folder, config, dtype=dtype or "auto"))
    assert len(reads) == len(packs(folder)) == 3
    another = SimpleNamespace(version=lambda name: "another", PackageNotFoundError=ImportError)
    monkeypatch.setattr(machine, "metadata", another)
    hf_accel.load(folder, FOUR, cache=True)
    assert len(reads) == 4


@pytest.mark.parametrize("place", [0, 20, 45, 200, -1])
def test_damaged_packs_are_made_anew(place: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mark, digest, length and header, and the end of the file."""
    reads = counted(monkeypatch)
    folder = written(tmp_path, "llama")
    hf_accel.load(folder, FOUR, cache=True)
    (path,) = packs(folder)
    content = bytearray(path.read_bytes())
    if place < 0:
        del content[place:]
    else:
        content[place] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="Delete it"):
        pack.Pack(path)
    assert_same(hf_accel.load(folder, FOUR, cache=True), in_memory(folder))
    assert len(reads) == 2
    pack.Pack(path)


def test_an_interrupted_writing_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = written(tmp_path, "llama")
    monkeypatch.setattr(pack.os, "replace", lambda *given: (_ for _ in ()).throw(OSError("no room")))
    with pytest.raises(CheckpointError, match=r"cannot be kept as .*no room"):
        hf_accel.load(folder, FOUR, cache=True)
    assert packs(folder) == []


def test_a_place_that_cannot_be_written_is_told_before_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = counted(monkeypatch)
    folder = written(tmp_path, "llama")
    folder.with_name("model.hf_accel").write_text("a file")
    with pytest.raises(CheckpointError, match="cannot be kept in"):
        hf_accel.load(folder, FOUR, cache=True)
    assert reads == []


def test_caching_what_is_not_packed_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="keeps packed weights"):
        hf_accel.load(written(tmp_path, "llama"), [], cache=True)


def test_a_budget_finds_its_pack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = counted(monkeypatch)
    folder = written(tmp_path, "llama")
    budget = hf_accel.report(hf_accel.load(folder, [])).weight_bytes - 1
    first, second = (hf_accel.load(folder, [], memory_budget_bytes=budget, cache=True) for _ in range(2))
    assert len(reads) == 1
    assert_same(first, second)


def test_models_of_the_hub_are_kept_beside_its_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = counted(monkeypatch)
    snapshot = tmp_path / "hub" / "models--owner--name" / "snapshots" / "1234"
    snapshot.parent.mkdir(parents=True)
    shutil.move(written(tmp_path, "llama"), snapshot)
    monkeypatch.setattr(reading, "snapshot_download", lambda name, **options: str(snapshot))
    first, second = (hf_accel.load("owner/name", FOUR, cache=True) for _ in range(2))
    assert len(reads) == 1
    assert first.name_or_path == second.name_or_path == "owner/name"
    assert len(list((tmp_path / "hf_accel" / "models--owner--name").iterdir())) == 1


def test_tensors_that_share_memory_share_it_again(tmp_path: Path) -> None:
    tensor = torch.arange(12.0)
    empty = torch.empty(0)
    tensors = {
        "odd": torch.ones(3),
        "one": tensor,
        "two": tensor,
        "part": tensor[:4],
        "turned": tensor.view(3, 4).T,
        "none": empty,
    }
    pack.write(tmp_path / "a.pack", {"is": [1]}, tensors)
    found = pack.Pack(tmp_path / "a.pack")
    assert found.about == {"is": [1]}
    for name, wanted in tensors.items():
        assert torch.equal(found.tensor(name), wanted), name
        assert found.tensor(name).data_ptr() % 64 == 0, name
    assert found.tensor("one") is found.tensor("two")
    with pytest.raises(CheckpointError, match="lacks the tensor three"):
        found.tensor("three")


def test_text_from_a_pack(tmp_path: Path) -> None:
    folder = written(tmp_path, "llama")
    hf_accel.load(folder, FOUR, cache=True)
    model = hf_accel.load(folder, [FOUR, DecodingConfig()], cache=True)
    expected = in_memory(folder).generate(prompt(), max_new_tokens=8)
    assert torch.equal(model.generate(prompt(), max_new_tokens=8), expected)
