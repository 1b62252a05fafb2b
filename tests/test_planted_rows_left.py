"""Mistakes in letting rows leave: a table as that of `test_planted.py`."""

from __future__ import annotations

from typing import Any

import pytest
import test_rows_leave as calls
import test_rows_leave_caches as caches
import torch
from planting import Defect, Patch, Test, instead, is_red, nothing, result

from hf_accel.cache.buffers import Buffers
from hf_accel.cache.layers.evicting import EvictingLayer
from hf_accel.cache.layers.tiered import TieredLayer
from hf_accel.cache.tiers.tiers import Tiers
from hf_accel.core.calls import cache_rows, inputs, single_tokens
from hf_accel.core.calls.forward import Stepper
from hf_accel.core.calls.present import Present
from hf_accel.core.calls.single_tokens import SingleTokens
from hf_accel.core.model import onlookers
from hf_accel.decoding import leaving, staying
from hf_accel.decoding.leaving import Leaving


def rows_of_the_next(patch: Patch) -> None:
    honest = Present.spread
    patch.setattr(Present, "spread", lambda self, tensor: honest(self, tensor).roll(1, 0))


def whole_masks(patch: Patch) -> None:
    honest = inputs._of_rows

    def wrong(given: Any, index: torch.Tensor, rows: int) -> Any:
        chosen = honest(given, index, rows)
        if "attention_mask" in given:  # the first rows' instead of those that stay
            chosen["attention_mask"] = given["attention_mask"][: len(index)]
        return chosen

    patch.setattr(inputs, "_of_rows", wrong)


def rows_are_not_moved(patch: Patch) -> None:
    patch.setattr(Buffers, "_moved_rows", lambda self, buffer, slots: buffer.narrow(0, 0, len(slots)))


def rows_are_not_copied(patch: Patch) -> None:
    patch.setattr(Buffers, "_copied_rows", lambda self, before, slots: before[: len(slots)].clone())


def lengths_stay(patch: Patch) -> None:
    honest = Buffers.keep_rows

    def wrong(self: Buffers, slots: list[int], *, gives_back: bool) -> int:
        rows, freed = self.rows, honest(self, slots, gives_back=gives_back)
        self.rows = None if rows is None else rows[: len(slots)]
        return freed

    patch.setattr(Buffers, "keep_rows", wrong)


def states_of_the_first(patch: Patch) -> None:
    honest = cache_rows.keep_rows

    def wrong(layers: Any, slots: list[int], device: torch.device, *, gives_back: bool) -> int:
        for layer in layers:
            is_coming = hasattr(layer, "reorder_cache") and not hasattr(layer, "keep_rows")
            honest([layer], list(range(len(slots))) if is_coming else slots, device, gives_back=gives_back)
        return 0

    patch.setattr(single_tokens, "keep_rows", wrong)


def last_first(patch: Patch) -> None:
    honest = Present.leave
    patch.setattr(Present, "leave", lambda self, slots: honest(self, sorted(slots)))


def blocks_keep_their_rows(patch: Patch) -> None:
    patch.setattr(
        TieredLayer, "keep_rows", lambda self, slots, gives_back: self.buffers.keep_rows(slots, gives_back=False)
    )


def counts_stay(patch: Patch) -> None:
    honest = EvictingLayer.keep_rows

    def wrong(self: EvictingLayer, slots: list[int], *, gives_back: bool) -> int:
        counts, freed = self._counts, honest(self, slots, gives_back=gives_back)
        self._counts = counts[: len(slots)]
        return freed

    patch.setattr(EvictingLayer, "keep_rows", wrong)


def lengths_of_all(patch: Patch) -> None:
    patch.setattr(Stepper, "_present_lengths", lambda self: self.lengths[: len(self.present.order)])


def always_pays(patch: Patch) -> None:
    patch.setattr(leaving, "COPY", 0)


PLANTED: dict[str, tuple[Defect, Test]] = {
    "logits go to the wrong rows": (rows_of_the_next, calls.test_the_text_is_stocks_and_passes_shrink),
    "masks of other rows": (whole_masks, calls.test_the_text_is_stocks_and_passes_shrink),
    "a row of the cache is not moved": (rows_are_not_moved, caches.test_what_remains_is_what_was_there),
    "a row of the cache is not copied": (rows_are_not_copied, caches.test_what_remains_is_what_was_there),
    "rows keep the lengths of others": (lengths_stay, caches.test_rows_of_different_lengths_leave),
    "states of other rows": (states_of_the_first, calls.test_recurrent_states_leave_with_their_rows),
    "rows are known in another order": (last_first, caches.test_what_remains_is_what_was_there),
    "blocks of tiers keep their rows": (blocks_keep_their_rows, caches.test_what_remains_is_what_was_there),
    "evictions count other rows": (counts_stay, caches.test_layers_that_evict_forget_with_their_rows),
    "no memory is given back": (
        instead(Buffers, "_copied_rows", Buffers._moved_rows),
        caches.test_memory_is_given_back_where_half_of_it_is_empty,
    ),
    "assigned tensors are written": (
        instead(Buffers, "_copied_rows", Buffers._moved_rows),
        caches.test_tensors_that_were_assigned_are_left_alone,
    ),
    "blocks in memory are chosen from": (instead(Tiers, "lends", lambda self, layer: False), caches.test_tiers),
    "rows leave what is seen": (
        instead(leaving, "call_obstacle", nothing),
        calls.test_rows_stay_where_somebody_would_see_them_leave,
    ),
    "hooks are not looked for": (
        instead(staying, "onlooker", nothing),
        calls.test_rows_stay_where_somebody_would_see_them_leave,
    ),
    "what modules keep is not looked for": (
        instead(onlookers, "_is_of_rows", lambda value, rows: False),
        calls.test_rows_stay_where_modules_keep_something_of_them,
    ),
    "the longest row leaves": (
        instead(staying, "_rope_obstacle", nothing),
        calls.test_rows_stay_where_the_longest_moves_the_others_positions,
    ),
    "nothing is weighed": (always_pays, calls.test_rows_stay_where_no_time_is_left_to_pay_for_moving_them),
    "rows never leave": (instead(Leaving, "consider", nothing), calls.test_the_text_is_stocks_and_passes_shrink),
    "rows never leave a cache of transformers": (
        instead(single_tokens, "cache_rows_stay", lambda cache, rows: "they stay"),
        calls.test_caches_of_transformers_and_native_layers,
    ),
    "nothing leaves without a cache": (
        result(SingleTokens, "rows_stay", lambda found: "they stay"),
        calls.test_without_a_cache,
    ),
    "rows apart have the lengths of others": (lengths_of_all, calls.test_rows_leave_steps_of_several_tokens),
}


@pytest.mark.parametrize("mistake", list(PLANTED))
def test_its_test_turns_red(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plant, test = PLANTED[mistake]
    plant(monkeypatch)
    assert is_red(test)
