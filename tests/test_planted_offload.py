"""Mistakes in offloading experts, and for each the test that turns red: a further table, see `test_planted.py`."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import numpy as np
import pytest
import test_offload
import test_offload_faults
import test_offload_slots
from planting import Defect, Patch, Test, instead, is_red, nothing, result

from hf_accel.errors import StorageError
from hf_accel.experts.offload import config, guard, patcher, preview, slots, stored
from hf_accel.experts.offload.file import ExpertsFile
from hf_accel.experts.offload.store import ExpertStore
from hf_accel.kernels import native


def rounds_one_by_one(patch: Patch) -> None:
    """Each round begins its sums anew."""
    right = native.NativeExperts.__call__

    def wrong(self: Any, *given: Any, sums: Any = None, **options: Any) -> Any:
        return right(self, *given, **options)

    patch.setattr(native.NativeExperts, "__call__", wrong)


def slots_of_the_wrong_expert(patch: Patch) -> None:
    put = stored.StoredExperts.put
    patch.setattr(stored.StoredExperts, "put", lambda self, expert, at: put(self, (expert + 1) % 4, at))


def mapping_after_leaving(patch: Patch) -> None:
    """An expert that left is taken from the slot that another one has now."""
    put = test_offload_slots.Owner.put
    patch.setattr(test_offload_slots.Owner, "put", lambda self, expert, at: at and put(self, expert, at))


def without_pins(patch: Patch) -> None:
    claim = slots.Slots._claim

    def wrong(self: Any, wanted: np.ndarray) -> Any:
        missing = claim(self, wanted)
        self._score[wanted] = self._heat[wanted]
        return missing

    patch.setattr(slots.Slots, "_claim", wrong)


def without_fading(patch: Patch) -> None:
    begin = slots.Slots.__init__

    def wrong(self: Any, *given: Any) -> None:
        begin(self, *given)
        self._growth = 1.0

    patch.setattr(slots.Slots, "__init__", wrong)


def short_reads(patch: Patch) -> None:
    read = ExpertsFile.read

    def wrong(self: Any, *given: Any) -> None:
        with suppress(StorageError):
            read(self, *given)

    patch.setattr(ExpertsFile, "read", wrong)


PLANTED: dict[str, tuple[Defect, Test]] = {
    "each round begins anew": (rounds_one_by_one, test_offload.test_several_rounds_make_the_same_bits_as_one),
    "an expert for another": (slots_of_the_wrong_expert, test_offload.test_text_is_stocks),
    "an expert that left": (mapping_after_leaving, test_offload_slots.test_the_coldest_leaves),
    "what is in use leaves": (without_pins, test_offload_slots.test_what_is_in_use_does_not_leave),
    "heat that does not fade": (without_fading, test_offload_slots.test_heat_fades),
    "a budget that is not kept": (
        instead(slots.Slots, "_room", lambda self, size: np.empty(size, np.uint8)),
        test_offload_slots.test_bytes_are_those_of_the_budget_whatever_the_sizes,
    ),
    "pins of a failed read": (
        instead(slots.Slots, "_give_up", nothing),
        test_offload_slots.test_a_failed_read_keeps_nothing,
    ),
    "weights that were written to": (
        instead(stored.StoredExperts, "are_there", lambda self: True),
        test_offload.test_weights_that_are_written_to_are_used,
    ),
    "weights that stay in memory": (
        instead(stored.StoredExperts, "move", lambda self, mapping, module: self.__dict__.update(kernel=None)),
        test_offload.test_weights_leave_memory_and_come_back,
    ),
    "hooks on products": (
        instead(guard.Guard, "_has_products", lambda self, module: True),
        test_offload.test_hooks_on_packed_products_fire,
    ),
    "a preview of another budget": (
        instead(preview, "concentration", lambda rows, sizes: 0.5),
        test_offload.test_a_plan_says_what_a_budget_will_cost,
    ),
    "calls that the module serves": (
        instead(guard.Guard, "holds", lambda self, module: False),
        test_offload.test_text_is_stocks,
    ),
    "a short read": (short_reads, test_offload_faults.test_a_lost_file_is_an_error_and_never_text),
    "too small a budget": (
        instead(patcher.ExpertOffloadPatcher, "_too_small", lambda *_: []),
        test_offload_faults.test_a_budget_below_one_layers_active_experts_is_refused,
    ),
    "any value for a field": (
        instead(config.ExpertOffloadConfig, "__post_init__", nothing),
        test_offload_faults.test_a_value_that_does_not_fit_is_refused,
    ),
    "a full disk": (
        instead(ExpertsFile, "_reserve", nothing),
        test_offload_faults.test_a_full_disk_leaves_the_model_as_it_was,
    ),
    "a share of the routing": (
        result(test_offload_slots, "concentration", lambda share: share and share / 2),
        test_offload_slots.test_concentration_is_the_least_share_that_carries_most_of_the_routing,
    ),
    "originals that do not come back": (
        instead(ExpertStore, "bring_back", nothing),
        test_offload.test_weights_leave_memory_and_come_back,
    ),
}


@pytest.mark.native
@pytest.mark.parametrize("title", PLANTED)
def test_a_planted_defect_is_seen(title: str, tmp_path_factory: Any, monkeypatch: Patch) -> None:
    defect, test = PLANTED[title]
    with monkeypatch.context() as patch:
        defect(patch)
        assert is_red(test, tmp_path=lambda: tmp_path_factory.mktemp("planted"), monkeypatch=patch)
