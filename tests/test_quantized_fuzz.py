"""Files that were changed anywhere: a saved folder gives the same logits, or an error of ours. Never other logits."""

from __future__ import annotations

import copy
import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from quantized_files import logits, saved, wide

import hf_accel
from hf_accel import WeightOnlyConfig
from hf_accel.errors import CheckpointError, ConfigError, UnsupportedModelError

OURS = (CheckpointError, ConfigError, UnsupportedModelError)
VALUES: list[Any] = [None, True, 0, -1, 2**70, 1.5, "text", [], [1], ["text"], {}, {"a": 1}, [[[]]]]
JSON = ["config.json", "generation_config.json", "model.safetensors.index.json"]


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    folder = tmp_path_factory.mktemp("sharded")
    return folder, saved(folder, wide(num_hidden_layers=1), max_shard_size="40kB")


@pytest.fixture(scope="module", params=[None, 8], ids=["public", "private"])
def single(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    folder = tmp_path_factory.mktemp("single")
    model = wide(num_hidden_layers=1, tie_word_embeddings=True)
    return folder, saved(folder, model, WeightOnlyConfig(bits=8, embeddings=request.param))


def outcome(folder: Path, expected: torch.Tensor) -> str:
    """Return "" where the folder gives the logits or an error of ours, else what it gives."""
    try:
        found = logits(hf_accel.from_pretrained(folder))
    except OURS:
        return ""
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "" if torch.equal(found, expected) else "other logits"


def paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in inner:
        yield from paths(child, (*path, key))


def changed(content: Any, path: tuple[Any, ...], value: Any) -> Any:
    if not path:
        return value
    content = copy.deepcopy(content)
    place = content
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return content


def check_json(folder: Path, expected: torch.Tensor, count: int | None) -> None:
    for file in JSON:
        text = (folder / file).read_text()
        content = json.loads(text)
        cases = [(path, value) for path in paths(content) for value in VALUES]
        for path, value in cases if count is None else random.Random(1).sample(cases, count):
            (folder / file).write_text(json.dumps(changed(content, path, value)))
            try:
                assert outcome(folder, expected) == "", (file, path, value)
            finally:
                (folder / file).write_text(text)


def test_values_of_wrong_types(sharded: tuple[Path, torch.Tensor]) -> None:
    check_json(*sharded, count=60)


@pytest.mark.slow
def test_every_value_of_every_wrong_type(sharded: tuple[Path, torch.Tensor]) -> None:
    check_json(*sharded, count=None)


@pytest.mark.parametrize("file", JSON)
@pytest.mark.parametrize("start", ["[", '{"a":'])
def test_json_too_deep_to_read(file: str, start: str, sharded: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    folder = shutil.copytree(sharded[0], tmp_path / "deep")
    (folder / file).write_text(start * 100_000)
    with pytest.raises(CheckpointError, match=file.replace(".", r"\.")):
        hf_accel.from_pretrained(folder)


def check_bytes(folder: Path, expected: torch.Tensor, flips: int, cuts: int) -> int:
    """Flip bits and cut the file of a folder; every second flip is in its header. Returns how many loads failed."""
    [path] = folder.glob("*.safetensors")
    content, draw, refused = path.read_bytes(), random.Random(2), 0
    header = 8 + int.from_bytes(content[:8], "little")
    cases = [(draw.randrange(header) if n % 2 else draw.randrange(header, len(content)), False) for n in range(flips)]
    cases += [(draw.randrange(len(content)), True) for _ in range(cuts)]
    for place, cut in cases:
        damaged = bytearray(content)
        damaged[place] ^= 1 << draw.randrange(8)
        path.write_bytes(content[:place] if cut else damaged)
        try:
            assert outcome(folder, expected) == "", (place, cut, header)
            if not cut and place >= header:
                with pytest.raises(CheckpointError, match=r"checksum|NaN|it says") as error:
                    hf_accel.from_pretrained(folder)
                assert str(path) in str(error.value)
                refused += 1
        finally:
            path.write_bytes(content)
    return refused


def test_flipped_bits_and_cut_files(single: tuple[Path, torch.Tensor]) -> None:
    assert check_bytes(*single, flips=60, cuts=15) == 30


@pytest.mark.slow
def test_many_flipped_bits_and_cut_files(single: tuple[Path, torch.Tensor]) -> None:
    assert check_bytes(*single, flips=3000, cuts=300) == 1500


def test_shards_of_two_saves_are_not_mixed(sharded: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    folder = shutil.copytree(sharded[0], tmp_path / "mixed")
    other = wide(num_hidden_layers=1)
    with torch.no_grad():
        other.model.norm.weight += 1
        other.model.layers[0].mlp.up_proj.weight.mul_(2)
    saved(tmp_path / "other", other, max_shard_size="40kB")
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(names) > 1
    for name in names:
        if (tmp_path / "other" / name).read_bytes() != (folder / name).read_bytes():
            break
    shutil.copy(tmp_path / "other" / name, folder / name)
    with pytest.raises(CheckpointError, match=f"{name} is part of another save"):
        hf_accel.from_pretrained(folder)


def test_checkpoints_without_checksums_load_as_before(sharded: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(sharded[0], tmp_path / "foreign")
    index = json.loads((folder / JSON[2]).read_text())
    (folder / JSON[2]).write_text(json.dumps({"weight_map": index["weight_map"]}))
    for path in folder.glob("*.safetensors"):
        save_file(load_file(path), path, metadata={"format": "pt"})
    assert torch.equal(logits(hf_accel.from_pretrained(folder)), sharded[1])
