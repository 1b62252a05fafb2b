"""Native layers that are not what their descriptions say turn their tests red."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import test_native_block_parts as parts
import torch
from planting import Defect, Patch, is_red

from hf_accel.kernels import native
from hf_accel.kernels.native import NativeBlock, Norm, block


def described(change: Callable[[Any, Any], tuple[Any, Any]]) -> Defect:
    """C is told of another layer than Python was."""

    def plant(patch: Patch) -> None:
        right = block._packed

        def wrong(shape: Any, weights: Any, dtype: Any) -> bytes:
            return right(*change(shape, weights), dtype)

        patch.setattr(block, "_packed", wrong)

    return plant


def of_shape(**changes: Callable[[Any], Any]) -> Defect:
    return described(lambda s, w: (replace(s, **{name: change(s) for name, change in changes.items()}), w))


def of_norms(change: Callable[[Norm], Norm]) -> Defect:
    return described(lambda s, w: (s, replace(w, **{name: change(norm) for name, norm in w.norms.items()})))


def without(*names: str) -> Defect:
    return described(lambda s, w: (s, replace(w, **dict.fromkeys(names))))


def another_result(change: Callable[[Any, Any], Any]) -> Defect:
    def plant(patch: Patch) -> None:
        right = NativeBlock.__call__
        patch.setattr(
            NativeBlock, "__call__", lambda self, hidden, **kwargs: change(hidden, right(self, hidden, **kwargs))
        )

    return plant


def unchecked(patch: Patch) -> None:
    patch.setattr(block, "checked_dtype", lambda shape, weights: weights.o.weight.dtype)


def without_checks_of_calls(patch: Patch) -> None:
    right = NativeBlock.__call__

    def wrong(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return right(self, *args, **kwargs)
        except ValueError:
            return None

    patch.setattr(NativeBlock, "__call__", wrong)


def other(*kinds: str) -> Callable[[Norm], Norm]:
    """Norms of the first kind are of the second."""
    return lambda norm: replace(norm, kind=kinds[1], bias=None) if norm.kind == kinds[0] else norm


TWIN = parts.test_layers_are_what_their_descriptions_say
PLANTED: dict[str, tuple[Defect, Callable[..., Any]]] = {
    "a bias of norms that is left out": (of_norms(lambda norm: replace(norm, bias=None)), TWIN),
    "a norm that adds one": (of_norms(other("rms_once", "rms_unit")), TWIN),
    "a norm that keeps the mean": (of_norms(other("layer", "rms_once")), TWIN),
    "norms without weights": (of_norms(lambda norm: replace(norm, weight=None)), TWIN),
    "no norm of values": (without("v_norm"), TWIN),
    "no sinks": (without("sinks"), TWIN),
    "no slopes": (without("slopes"), TWIN),
    "no gate of the attention": (of_shape(gate=lambda s: None), TWIN),
    "parts one after the other": (of_shape(is_parallel=lambda s: False), TWIN),
    "a result that is not scaled": (of_shape(out_scale=lambda s: 1.0), TWIN),
    "norms before the rotary": (of_shape(norms_after_rotary=lambda s: False), TWIN),
    "one weight for all heads": (
        of_shape(norm_extent=lambda s: "head" if s.norm_extent == "heads" else s.norm_extent),
        TWIN,
    ),
    "pairs by other angles": (
        of_shape(rotary=lambda s: "pairs" if s.rotary == "pairs_of_halves" and not s.rotary_size else s.rotary),
        TWIN,
    ),
    "halves": (of_shape(rotary=lambda s: "halves" if s.rotary == "pairs" else s.rotary), TWIN),
    "all columns turn": (of_shape(rotary=lambda s: "none" if s.rotary_size else s.rotary), TWIN),
    "values from elsewhere": (of_shape(v=lambda s: s.v and replace(s.v, start=0)), TWIN),
    "another activation": (
        of_shape(activation=lambda s: "relu" if s.activation == "relu2" else s.activation),
        TWIN,
    ),
    "keys that are written all the same": (
        of_shape(k=lambda s: s.k or replace(s.q, start=0), v=lambda s: s.v or replace(s.q, start=0)),
        TWIN,
    ),
    "results that depend on the batch": (
        another_result(lambda hidden, found: next(iter(parts.tensors(found))) + hidden.shape[0]),
        parts.test_tokens_together_equal_tokens_one_by_one,
    ),
    "rows of codes under another layer": (
        another_result(lambda hidden, found: next(iter(parts.tensors(found))) * torch.rand(())),
        parts.test_rows_of_codes_are_read_as_the_values_they_stand_for,
    ),
    "descriptions that nobody looks at": (unchecked, parts.test_what_is_no_layer_is_named),
    "angles that nobody counts": (without_checks_of_calls, parts.test_calls_whose_angles_do_not_fit_are_refused),
}


@pytest.mark.native
@pytest.mark.parametrize("title", PLANTED)
def test_a_planted_defect_is_seen(title: str, monkeypatch: Patch) -> None:
    defect, test = PLANTED[title]
    isa = native.status().isa
    with monkeypatch.context() as patch:
        defect(patch)
        assert is_red(test, threads=None)
    native.set_isa(isa)
