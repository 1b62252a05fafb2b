"""Mistakes in reading and writing GGUF files turn their tests red: a further table, see `test_planted.py`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import test_gguf_damage
import test_gguf_experts
import test_gguf_reading
import test_gguf_tokenizers
import test_gguf_writing
import torch
from gguf_files import build, of_kind, write
from planting import Defect, Patch, Test, instead, is_red

from hf_accel.ops.affine import Affine, Scheme
from hf_accel.quantization.gguf import experts, loading, reader, ropes, saving, splitting, types, vocabulary
from hf_accel.quantization.modules import embedding


def neighbours(patch: Patch) -> None:
    """The two halves of a byte are taken for neighbours."""
    patch.setattr(types, "_nibbles", lambda codes: torch.stack((codes & 15, codes >> 4), dim=-1).flatten(-2))


def offsets_of_codes(patch: Patch) -> None:
    patch.setattr(
        types, "_lowered",
        lambda codes, half, scales, offsets: (types._joined(codes.view(torch.int8) - half), scales, offsets),
    )  # fmt: skip


def truncated_scales(patch: Patch) -> None:
    right = types._halves
    patch.setattr(types, "_halves", lambda blocks, start: right(blocks, start).bfloat16().float())


def unscaled_rows(patch: Patch) -> None:
    patch.setattr(embedding, "factor_of", lambda table: None)


def lumped(part: Affine) -> Affine:
    return replace(part, scales=part.scales[:, :1], scheme=Scheme(8)) if part.scheme == Scheme(8, 32) else part


def without_check(owner: Any, name: str) -> Defect:
    return instead(owner, name, lambda *given, **options: None)


def forgiving(patch: Patch) -> None:
    """Sizes of tensors are not compared with the file."""
    right = reader.GgufFile._entry

    def entry(self: Any, *given: Any) -> Any:
        kept, self._bytes = self._bytes, range(1 << 60)
        try:
            return right(self, *given)
        finally:
            self._bytes = kept

    patch.setattr(reader.GgufFile, "_entry", entry)


def interleaved(patch: Patch) -> None:
    right = experts.layout_of
    patch.setattr(experts, "layout_of", lambda module: replace(right(module), interleaved=True))


WEIGHTS = test_gguf_reading.test_weights_are_the_package_s_dequantization_to_the_bit
PLANTED: dict[str, tuple[Defect, Test]] = {
    "halves of a byte side by side": (
        neighbours,
        WEIGHTS,
    ),
    "codes lowered, offsets not": (
        offsets_of_codes,
        WEIGHTS,
    ),
    "scales through bfloat16": (
        truncated_scales,
        WEIGHTS,
    ),
    "rows of heads as they lie": (
        instead(loading, "row_order", lambda *given: None),
        test_gguf_reading.test_text_is_that_of_the_model_with_the_file_s_values,
    ),
    "norms as they lie": (
        instead(loading, "is_norm", lambda name: False),
        test_gguf_reading.test_text_is_that_of_the_model_with_the_file_s_values,
    ),
    "rows of a table that are not multiplied": (
        unscaled_rows,
        test_gguf_reading.test_text_is_that_of_the_model_with_the_file_s_values,
    ),
    "one scale for a row of several": (
        instead(types, "_merged", lambda parts: [lumped(part) for part in parts]),
        WEIGHTS,
    ),
    "factors of frequencies left out": (
        instead(ropes, "_of_factors", lambda *given: {}),
        test_gguf_reading.test_rotary_scalings_of_a_file_are_computed,
    ),
    "rows of heads written as they lie": (
        instead(saving, "row_order", lambda *given: None),
        test_gguf_writing.test_the_package_dequantizes_our_weights_with_rows_of_heads_where_llama_cpp_has_them,
    ),
    "norms written as they lie": (
        instead(saving, "is_norm", lambda name: False),
        test_gguf_writing.test_norms_of_gemma_are_stored_one_higher,
    ),
    "scales that fp16 rounds": (
        instead(types, "_fits_half", lambda values: True),
        test_gguf_writing.test_scales_that_fp16_does_not_hold_have_none,
    ),
    "a config that is not compared": (
        instead(saving, "differences", lambda *given: ""),
        test_gguf_writing.test_what_a_file_cannot_say_is_refused_and_nothing_is_written,
    ),
    "ids that are not compared": (
        without_check(vocabulary, "_check"),
        test_gguf_tokenizers.test_other_ids_are_seen_though_the_name_is_known,
    ),
    "line ends that are always left out": (
        instead(splitting, "_crosses_lines", lambda vocabulary: False),
        test_gguf_tokenizers.test_a_tokenizer_that_a_file_cannot_say_is_refused_before_a_byte_is_written,
    ),
    "gate and up by turns": (
        interleaved,
        test_gguf_experts.test_experts_that_are_values_stay_so,
    ),
    "up above gate": (
        instead(experts, "PARTS", {"gate_up": ("up", "gate"), "down": ("down",)}),
        test_gguf_experts.test_experts_are_packed_as_they_lie,
    ),
    "a file cut short": (forgiving, test_gguf_damage.test_a_file_cut_short_anywhere_is_an_error),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_mistake_turns_its_test_red(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    plant, test = PLANTED[name]
    path = tmp_path_factory.mktemp("gguf") / "x.gguf"
    write(path, "llama", build("llama"), of_kind("Q4_0", table="F16"))
    with pytest.MonkeyPatch.context() as patch:
        plant(patch)
        assert is_red(test, tmp_path=lambda: tmp_path_factory.mktemp("planted"), content=path.read_bytes())
