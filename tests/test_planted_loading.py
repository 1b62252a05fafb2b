"""Mistakes in reading models in few bits, and in keeping them: see `test_planted.py`."""

from __future__ import annotations

from typing import Any

import pytest
import test_kept_packs
import test_loading
import test_loading_damage
import torch
from planting import Defect, Patch, Test, instead, is_red

from hf_accel.core.journal import Journal
from hf_accel.quantization.reading import budget, folder, kept, mapped, pack, pages, quantizer, stream


def first_tensor_only(patch: Patch) -> None:
    """Only what has a rounded tensor's name in the files is shown: what is split from it is not."""
    patch.setattr(
        quantizer.ReadingQuantizer,
        "param_needs_quantization",
        lambda self, model, param_name, **options: param_name in self.places,
    )


def tied_weights_taken(patch: Patch) -> None:
    patch.setattr(quantizer, "getattr", lambda owner, name, *other: (
        {} if name == "all_tied_weights_keys" else getattr(owner, name, *other)
    ), raising=False)  # fmt: skip


def undone_altogether(patch: Patch) -> None:
    def refuse(self: Journal, reason: str) -> None:
        self.first(lambda: (_ for _ in ()).throw(ValueError(reason)))

    patch.setattr(Journal, "refuse", refuse)


def shapes_of_the_files(patch: Patch) -> None:
    before = quantizer.ReadingQuantizer.postprocess_model

    def after(self: Any, model: Any, **options: Any) -> None:
        self.shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        before(self, model, **options)

    patch.setattr(quantizer.ReadingQuantizer, "postprocess_model", after)


PLANTED: dict[str, tuple[Defect, Test]] = {
    "shapes that nobody compares": (shapes_of_the_files, test_loading_damage.test_wrong_tensors_are_named),
    "tensors that are split": (first_tensor_only, test_loading.test_a_tensor_that_is_split_into_products),
    "weights taken that others share": (tied_weights_taken, test_loading.test_configs),
    "the dtype of the files": (
        instead(folder._Saved, "_stored_dtype", lambda self: torch.float32),
        test_loading.test_a_config_that_names_no_dtype,
    ),
    "missing tensors filled in": (
        instead(folder, "_check_complete", lambda *given: None),
        test_loading_damage.test_wrong_tensors_are_named,
    ),
    "a read that ends early": (
        instead(stream, "_fill", lambda bytes_, stored: bytes_.zero_()),
        test_loading_damage.test_a_file_that_is_cut_short_while_it_is_read,
    ),
    "pages that are kept": (
        instead(pages.MappedFiles, "give_back", lambda self, tensor: None),
        test_loading.test_loading_by_transformers_gives_pages_back,
    ),
    "a budget without the tensor at hand": (
        instead(budget, "_largest", lambda *given: 0),
        test_loading_damage.test_budgets,
    ),
    "whole models within a budget": (
        instead(budget, "LADDER", budget.LADDER[:1]),
        test_loading_damage.test_budgets,
    ),
    "what a call has built stays": (
        undone_altogether,
        test_loading.test_a_call_with_options_of_its_own_may_still_be_undone,
    ),
    "files told by name alone": (
        instead(kept, "_told", lambda path: [path.name]),
        test_kept_packs.test_packs_of_other_files_are_refused,
    ),
    "contents that nobody looks at": (
        instead(kept, "_digest", lambda *given: ""),
        test_kept_packs.test_packs_of_other_files_are_refused,
    ),
    "versions that do not count": (
        instead(kept, "versions", dict),
        test_kept_packs.test_other_configs_dtypes_and_versions,
    ),
    "tensors at any place": (
        instead(pack, "ALIGNMENT", 8),
        test_kept_packs.test_tensors_that_share_memory_share_it_again,
    ),
    "tied again": (
        instead(mapped, "untie", lambda *given: None),
        test_kept_packs.test_models_come_back_from_their_packs,
    ),
}


@pytest.mark.parametrize("title", PLANTED)
def test_a_planted_defect_is_seen(title: str, tmp_path_factory: Any, monkeypatch: Patch) -> None:
    defect, test = PLANTED[title]
    with monkeypatch.context() as patch:
        defect(patch)
        assert is_red(test, monkeypatch=patch, tmp_path=lambda: tmp_path_factory.mktemp("planted"))
