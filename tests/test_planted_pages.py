"""Mistakes in asking for large pages and in what is said of threads: a table as that of `test_planted.py`."""

from __future__ import annotations

from typing import Any

import pytest
import test_large_pages
import test_topology
import torch
from planting import Defect, Patch, Test, instead, is_red, nothing

from hf_accel import loading
from hf_accel.cache import buffers
from hf_accel.cli import advice
from hf_accel.core.journal import Journal
from hf_accel.kernels import pages
from hf_accel.measure import threads, topology
from hf_accel.pages import patcher
from hf_accel.quantization.modules import linear
from hf_accel.quantization.reading import folder


def moved_though_shared(patch: Patch) -> None:
    patch.setattr(patcher, "Counter", lambda places: dict.fromkeys(places, 1))


def copies_of_zeros(patch: Patch) -> None:
    patch.setattr(pages, "copied", lambda tensor: torch.zeros_like(tensor))


def inner_pages_only(patch: Patch) -> None:
    honest = pages._range
    patch.setattr(pages, "_range", lambda tensor: (honest(tensor)[0] + (4 << 20), honest(tensor)[1]))


def grants_of_the_nearest(patch: Patch) -> None:
    patch.setattr(topology, "min", lambda granted, default: max(granted, default=default), raising=False)


def threads_stay(patch: Patch) -> None:
    honest = threads.thread_trial

    def wrong(topology: Any) -> Any:
        try:
            return honest(topology)
        finally:
            torch.set_num_threads(torch.get_num_threads() + 1)

    patch.setattr(test_topology, "thread_trial", wrong)


PLANTED: dict[str, tuple[Defect, Test]] = {
    "weights that shared memory are apart": (
        moved_though_shared,
        test_large_pages.test_weights_that_share_a_files_memory_go_on_sharing,
    ),
    "copies that are none": (copies_of_zeros, test_large_pages.test_weights_in_a_file_are_copied_and_come_back),
    "nothing is given back": (
        instead(Journal, "did", nothing),
        test_large_pages.test_weights_in_a_file_are_copied_and_come_back,
    ),
    "a part of what was asked": (inner_pages_only, test_large_pages.test_only_memory_that_fills_a_page_is_asked_for),
    "asked again and again": (
        instead(pages, "_PATIENCE", 1000),
        test_large_pages.test_a_refusing_system_is_not_asked_for_every_page,
    ),
    "a refusal that is not told": (
        instead(pages, "obstacle", lambda: None),
        test_large_pages.test_systems_without_large_pages,
    ),
    "small weights, too": (
        instead(pages, "is_large", lambda tensor: True),
        test_large_pages.test_models_without_large_weights_are_refused,
    ),
    "packs are left as they are": (
        instead(linear.pages, "settle", nothing),
        test_large_pages.test_packed_weights_are_settled,
    ),
    "caches are left as they are": (
        instead(buffers.pages, "advise", lambda tensor: tensor),
        test_large_pages.test_buffers_of_a_cache_are_advised_before_they_are_written,
    ),
    "mapped though it was asked for": (
        instead(loading, "_has_large_pages", lambda configs: False),
        test_large_pages.test_packs_are_read_instead_of_mapped,
    ),
    "more threads for nothing": (
        instead(threads, "_WORTH", 1.0),
        test_topology.test_few_threads_are_best_where_more_gain_nothing,
    ),
    "threads that stay as tried": (threads_stay, test_topology.test_a_trial_leaves_the_threads_as_they_were),
    "a list that is misread": (
        instead(topology, "_numbers", lambda text: {int(part[0]) for part in text.split(",") if part}),
        test_topology.test_nodes_and_siblings,
    ),
    "grants of the nearest group only": (
        grants_of_the_nearest,
        test_topology.test_what_the_control_group_grants,
    ),
    "nodes that nobody hears of": (instead(advice, "_nodes", lambda *given: []), test_topology.test_advice),
    "half a model": (
        instead(folder, "_check_complete", nothing),
        test_large_pages.test_a_file_that_lacks_a_tensor_is_refused,
    ),
}


@pytest.mark.native
@pytest.mark.parametrize("title", PLANTED)
def test_a_planted_defect_is_seen(title: str, tmp_path_factory: Any, monkeypatch: Patch) -> None:
    defect, test = PLANTED[title]
    with monkeypatch.context() as patch:
        defect(patch)
        assert is_red(test, tmp_path=lambda: tmp_path_factory.mktemp("planted"), monkeypatch=patch)
