"""Budgets that are too small, disks that fill up or fail, and a file that is lost in the middle of a text."""

from __future__ import annotations

import copy
import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from fingerprint import changes, fingerprint
from mixtures import UNREGISTERED, mixture
from models import build
from test_offload import equal, least, modules_of, section, slots_of, texts
from test_spill import failing

import hf_accel
from hf_accel.experts.offload import ExpertOffloadConfig, patcher
from hf_accel.experts.offload.describing import described
from hf_accel.kernels import native
from hf_accel.kernels.native import library

pytestmark = pytest.mark.native


@pytest.mark.parametrize(
    "values",
    [
        {"budget_bytes": 0},
        {"budget_bytes": 1.5},
        {"budget_bytes": True},
        {"share": 0},
        {"share": 1.01},
        {"share": "half"},
        {"share": float("nan")},
        {"folder": 3},
    ],
    ids=str,
)
def test_a_value_that_does_not_fit_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(hf_accel.ConfigError, match=f"ExpertOffloadConfig.{next(iter(values))} is"):
        ExpertOffloadConfig(**values)


def refused(model: Any, config: ExpertOffloadConfig, match: str, kind: type = hf_accel.UnsupportedModelError) -> None:
    before = fingerprint(model)
    with pytest.raises(kind, match=match):
        hf_accel.optimize(model, config)
    assert not changes(before, fingerprint(model))


def test_a_budget_below_one_layers_active_experts_is_refused() -> None:
    model = mixture("mixtral")
    enough = least(model).budget_bytes
    assert enough is not None
    refused(model, ExpertOffloadConfig(budget_bytes=enough - 1), f"give budget_bytes of {enough:,} at least")
    refused(model, ExpertOffloadConfig(share=0.01), "is below the 2 experts of")
    hf_accel.optimize(model, ExpertOffloadConfig(budget_bytes=enough))


def test_a_budget_is_that_of_the_weights_as_they_are_then() -> None:
    """Experts that a step before puts in few bits need less; where they were given up, the model goes on in memory."""
    quantized = hf_accel.WeightOnlyConfig(bits=4)
    model = mixture("qwen3_moe")
    dense = least(model).budget_bytes
    with hf_accel.optimized(model, quantized):
        packed = least(model).budget_bytes
        before = texts(model)
    assert packed is not None
    assert dense is not None
    assert packed < dense
    config = ExpertOffloadConfig(budget_bytes=packed)
    with hf_accel.optimized(model, [quantized, config]):
        assert equal(texts(model), before)
        assert section(model)["misses"] > 0
    short = ExpertOffloadConfig(budget_bytes=packed - 1)
    refused(model, short, f"give budget_bytes of {dense:,} at least")
    hf_accel.optimize(model, [quantized, short], originals="drop")
    [*_, skip] = hf_accel.report(model).skipped
    assert f"give budget_bytes of {packed:,} at least" in skip.reason
    assert equal(texts(model), before)


def test_models_and_machines_that_do_not_fit_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    config = ExpertOffloadConfig()
    refused(build("llama"), config, "no stacked experts that can be moved")
    refused(mixture(UNREGISTERED), config, "no stacked experts that can be moved to a file .* no gate in transformers'")
    refused(mixture("mixtral").double(), config, "no products of torch.float64")
    monkeypatch.setattr(library, "is_available", lambda: False)
    refused(mixture("mixtral"), config, "the native library is not there")


def test_experts_of_another_layout_are_left_to_stock() -> None:
    model = mixture("mixtral")
    model.model.layers[0].mlp.experts.act_fn = torch.nn.Tanh()
    before = texts(model)
    hf_accel.optimize(model, ExpertOffloadConfig())
    [skip] = hf_accel.report(model).skipped
    assert "model.layers.0.mlp.experts stay as they are: their gate" in skip.reason
    assert len(modules_of(model)) == 1
    assert equal(texts(model), before)


def test_a_result_that_differs_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    right = native.NativeExperts.__call__
    monkeypatch.setattr(native.NativeExperts, "__call__", lambda *a, **k: right(*a, **k) * 1.01)
    refused(mixture("mixtral"), ExpertOffloadConfig(), "differ from their own code by", hf_accel.VerificationError)


def test_folders_that_cannot_take_the_file_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = mixture("mixtral")
    (tmp_path / "file").touch()
    for folder in ("nowhere", "file", "file/below"):
        refused(model, ExpertOffloadConfig(folder=str(tmp_path / folder)), "no file can be written in the folder")
    config = ExpertOffloadConfig(folder=str(tmp_path))
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(patcher.shutil, "disk_usage", lambda folder: usage)
    refused(model, config, "bytes, and 1,000 are free in")
    monkeypatch.undo()

    def read_only(**options: Any) -> Any:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("tempfile.mkstemp", read_only)
    refused(model, config, "Name a folder that exists", hf_accel.ConfigError)


@pytest.mark.parametrize(
    "name, number, after, partial",
    [("posix_fallocate", errno.ENOSPC, 0, 0), ("pwritev", errno.ENOSPC, 1, 0), ("pwritev", errno.EIO, 0, 100)],
)
def test_a_full_disk_leaves_the_model_as_it_was(
    name: str, number: int, after: int, partial: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = mixture("mixtral")
    before = texts(model)
    monkeypatch.setattr(os, name, failing(name, number, after, partial))
    match = "the file of experts in .* could not be"
    refused(model, ExpertOffloadConfig(folder=str(tmp_path)), match, hf_accel.StorageError)
    monkeypatch.undo()
    assert not os.listdir(tmp_path)
    assert equal(texts(model), before)


def test_a_system_that_cannot_reserve_room_finds_a_full_disk_by_writing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mixture("mixtral")
    before = texts(model)
    monkeypatch.setattr(os, "posix_fallocate", failing("posix_fallocate", errno.EOPNOTSUPP))
    hf_accel.optimize(model, ExpertOffloadConfig())
    assert equal(texts(model), before)


def test_a_disk_that_fails_once_ends_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mixture("mixtral")
    before = texts(model)
    hf_accel.optimize(model, least(model))
    monkeypatch.setattr(os, "preadv", failing("preadv", errno.EIO, after=7))
    with pytest.raises(hf_accel.StorageError, match="could not be read"):
        texts(model)
    monkeypatch.undo()
    assert equal(texts(model), before)
    hf_accel.restore(model)
    assert equal(texts(model), before)


def lose(model: Any, size: int) -> None:
    os.ftruncate(slots_of(model).file._descriptor, size)


def test_a_lost_file_is_an_error_and_never_text(tmp_path: Path) -> None:
    model = mixture("mixtral")
    hf_accel.optimize(model, least(model))
    texts(model)
    second = described(model, model.dtype)[0][1][1].tensors[0][1]
    assert second > 0
    lose(model, second)
    for act in (texts, copy.deepcopy, lambda model: model.state_dict(), lambda model: model.save_pretrained(tmp_path)):
        with pytest.raises(hf_accel.StorageError, match=r"was truncated.*Load the model anew"):
            act(model)
    with pytest.raises(hf_accel.StorageError, match="was truncated"), torch.enable_grad():
        model(torch.tensor([[9, 10, 11]]))
    assert f"is lost from byte {second:,} on" in str(hf_accel.report(model))
    with pytest.raises(
        hf_accel.IrreversibleError, match=r"experts of model\.layers\.1\.mlp\.experts cannot be restored"
    ):
        hf_accel.restore(model)
    assert section(model)["misses"] > 0, "it is optimised still"
    first = mixture("mixtral").model.layers[0].mlp.experts.gate_up_proj
    assert torch.equal(model.model.layers[0].mlp.experts.gate_up_proj, first)


def test_what_is_in_memory_goes_on_without_the_file() -> None:
    model = mixture("mixtral")
    before = texts(model)
    hf_accel.optimize(model, ExpertOffloadConfig(share=1.0))
    texts(model)
    lose(model, 0)
    assert equal(texts(model), before)
