"""Each kind of mistake in saving and loading, planted, turns its check red: the checks can see."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import test_quantized_fuzz as fuzz
import test_quantized_saving as saves
from quantized_files import saved, wide
from test_saved_architectures import check
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

from hf_accel.quantization.files import checkpoint, integrity, inventory, loading, rebuilding, saving
from hf_accel.quantization.files import seal as storage

Patch = pytest.MonkeyPatch


def comes_back(model_type: str, folder: Path) -> None:
    assert not check(model_type, folder).startswith("refused")


def values_that_are_not_summed(patch: Patch, folder: Path) -> None:
    for module in (integrity, checkpoint):
        patch.setattr(module, "checksum", lambda name, tensor: name)
    fuzz.check_bytes(folder, saved(folder, wide(num_hidden_layers=1), saves.EIGHT), flips=20, cuts=0)


def a_config_that_is_not_compared(patch: Patch, folder: Path) -> None:
    patch.setattr(checkpoint, "changed_values", lambda saved, found: [])
    fuzz.check_json(folder, saved(folder, wide(num_hidden_layers=1), max_shard_size="40kB"), count=60)


def stock_not_rehearsed(patch: Patch, folder: Path) -> None:
    patch.setattr(inventory, "obstacle_to_stock", lambda empty, packed, stored: "")
    comes_back("llama4_text", folder)


def initialising_not_rehearsed(patch: Patch, folder: Path) -> None:
    patch.setattr(rebuilding, "_initialising", lambda empty, packed: "")
    comes_back("gpt_bigcode", folder)


def the_class_of_the_auto_model(patch: Patch, folder: Path) -> None:
    for module in (rebuilding, loading):
        patch.setattr(module, "model_class", lambda config: MODEL_FOR_CAUSAL_LM_MAPPING[type(config)])
    comes_back("llava", folder)


def names_as_they_are_in_files(patch: Patch, folder: Path) -> None:
    patch.setattr(loading, "loaded_names", lambda model, names: {name: name for name in names})
    comes_back("gpt_neox", folder)


def tensors_that_share_memory(patch: Patch, folder: Path) -> None:
    patch.setattr(saving, "unshared", lambda tensors: tensors)
    saves.test_biases_that_share_memory_are_stored_each_by_itself(folder)


def the_config_moved_first(patch: Patch, folder: Path) -> None:
    def moved(source: Path, target: Path) -> None:
        for name in sorted(os.listdir(source)):
            os.replace(source / name, target / name)

    patch.setattr(saving, "_move_all", moved)
    saves.test_an_interrupted_save_leaves_the_old_folder_or_none("replace", 1, folder, patch)


def a_config_that_is_left_behind(patch: Patch, folder: Path) -> None:
    patch.setattr(storage, "_Passing", lambda owner, content: content)
    saves.test_what_saving_writes_is_not_left_in_the_config(folder)


def a_resize_that_is_not_checked(patch: Patch, folder: Path) -> None:
    patch.setattr(storage.Seal, "check_resize", lambda self, *given: None)
    saves.test_nothing_is_changed_by_halves(saves.EIGHT, False, "more tokens")


DEFECTS: list[Callable[[Patch, Path], None]] = [
    values_that_are_not_summed,
    a_config_that_is_not_compared,
    stock_not_rehearsed,
    initialising_not_rehearsed,
    the_class_of_the_auto_model,
    names_as_they_are_in_files,
    tensors_that_share_memory,
    the_config_moved_first,
    a_config_that_is_left_behind,
    a_resize_that_is_not_checked,
]


@pytest.mark.parametrize("defect", DEFECTS, ids=lambda defect: defect.__name__)
def test_a_planted_defect_is_found(defect: Any, tmp_path: Path, monkeypatch: Patch) -> None:
    with pytest.raises((Exception, pytest.fail.Exception)):
        defect(monkeypatch, tmp_path)
