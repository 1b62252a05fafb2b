"""Mistakes in describing layers by running them, and for each the test that turns red; see `test_planted.py`."""

from __future__ import annotations

from typing import Any

import novel
import pytest
import test_discovery_heads
import test_discovery_layers
import test_discovery_parts
import test_image_text
import torch
from planting import Defect, Patch, Test, instead, is_red, nothing, result

from hf_accel.core.model.discovery import activations, attention, discovering, heads, hearing, layer, norms
from hf_accel.core.model.discovery.forms import AngleForm, CallForm
from hf_accel.core.model.discovery.heads import CalledNorm
from hf_accel.kernels.native import Heads
from hf_accel.layers.audit import RecordedLayer
from hf_accel.layers.guard import BlockStep


def every_attention_is_causal(patch: Patch) -> None:
    def told(owner: Any, name: str, *default: Any) -> Any:
        return True if name == "is_causal" else getattr(owner, name, *default)

    patch.setattr(attention, "getattr", told, raising=False)


def the_first_reading(readings: Any, what: str) -> Any:
    return next(iter(readings))[1]


def left(case: str) -> Test:
    """Return the test that layers of this kind are left as they are."""
    return lambda: test_discovery_layers.test_what_is_not_understood_is_left(case)


PLANTED: dict[str, tuple[Defect, Test]] = {
    "epsilons do not show": (
        instead(norms, "_ROWS", (1.0, 1.0)), test_discovery_parts.test_every_kind_of_norm,
    ),
    "norms that round alike": (
        result(norms, "_rounding", lambda kind: "rms"), test_discovery_parts.test_every_kind_of_norm,
    ),
    "a norm is one on the whole": (
        instead(norms, "_worst_rows", lambda found, expected: (found - expected).flatten(2).norm(dim=2).amin(1)),
        test_discovery_parts.test_a_lookalike_is_refused,
    ),
    "activations at large values": (
        instead(activations, "_GRID", torch.linspace(20, 30, 9)), test_discovery_parts.test_activations,
    ),
    "the first of two readings": (
        instead(heads, "the_best", the_first_reading), test_discovery_heads.test_two_readings_are_refused,
    ),
    "a row of heads": (
        instead(heads, "heads_at", lambda places, d, group: Heads(places[0] * d, group * d, d)),
        test_discovery_heads.test_heads_of_a_fused_product_group_by_group,
    ),
    "a gate that lies in a row": (
        instead(heads, "heads_at", lambda places, d, group: Heads(places[0] * d, group * d, d)),
        test_discovery_heads.test_gates,
    ),
    "halves for everything": (
        instead(heads, "ROTARIES", ("none", "halves")), test_discovery_heads.test_pairs_by_angles_in_two_halves,
    ),
    "angles as they come": (
        instead(AngleForm, "of", lambda self, given: given), test_discovery_heads.test_how_angles_are_meant,
    ),
    "one axis for all columns": (
        instead(AngleForm, "of", lambda self, given: (given[0][0], given[1][0])),
        test_discovery_heads.test_angles_by_axis,
    ),
    "calls after images that never fit": (
        instead(CallForm, "fits", lambda self, arguments: False),
        lambda: test_image_text.test_text_after_images("qwen2_vl"),
    ),
    "norms by their weights alone": (
        instead(CalledNorm, "read", lambda *given, **options: True),
        test_discovery_heads.test_equal_norms_are_told_apart_by_what_they_were_given,
    ),
    "clamps unheard": (
        instead(hearing, "_CLAMPS", frozenset()), left("clamped"),
    ),
    "the beginning of a text alone": (
        instead(discovering, "_far", lambda model: []), left("queries by position"),
    ),
    "masks that nobody follows": (
        instead(attention, "_has_its_mask", lambda record, heard: True), left("a window of its own"),
    ),
    "every attention is causal": (
        every_attention_is_causal, left("not causal"),
    ),
    "weights that nobody asks about": (
        instead(layer._Layer, "_check_nothing_is_left", nothing), left("zeros aside"),
    ),
    "no factors": (
        instead(layer._Layer, "_numbers", lambda self: [1.0]),
        lambda: test_discovery_layers.test_structures(novel.scaled),
    ),
    "no feed-forward part as it is": (
        instead(layer._Layer, "_modules", lambda self: iter(())),
        test_discovery_layers.test_a_feed_forward_part_that_no_kernel_knows_runs_as_it_is,
    ),
    "calls that never fit": (
        instead(CallForm, "fits", lambda self, arguments: False),
        test_discovery_layers.test_a_made_up_architecture_runs_natively,
    ),
    "an audit that passes all": (
        instead(RecordedLayer, "difference", lambda *given: 0.0),
        test_discovery_layers.test_a_layer_that_fails_its_audit_is_left_while_others_run,
    ),
    "a guard that does not look": (
        instead(BlockStep, "is_current", lambda self: True),
        test_discovery_layers.test_layers_that_change_between_calls,
    ),
    "copies are asked again": (
        instead(discovering, "_parts", lambda model, path: object()),
        test_discovery_layers.test_copies_take_over_what_was_found,
    ),
    "the user's own model is run": (
        instead(discovering, "twin", lambda model: model),
        test_discovery_layers.test_describing_leaves_the_model_alone,
    ),
}  # fmt: skip


@pytest.mark.native
@pytest.mark.parametrize("title", PLANTED)
def test_a_planted_defect_is_seen(title: str, monkeypatch: Patch) -> None:
    defect, test = PLANTED[title]
    with monkeypatch.context() as patch:
        defect(patch)
        assert is_red(test)
