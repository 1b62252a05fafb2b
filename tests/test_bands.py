"""Masks said in a few numbers are the masks that transformers makes; what is no band is never taken for one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from comparison import assert_equal_calls
from models import build, padded
from transformers import masking_utils
from transformers.masking_utils import (
    causal_mask_function,
    chunked_causal_mask_function,
    sdpa_mask,
    sliding_window_causal_mask_function,
)

import hf_accel
from hf_accel import AttentionConfig
from hf_accel.core.calls.bands import Band, band_of, described, starts_of


def request(tokens: int, positions: int, first: int = 0, starts: tuple[int, ...] | None = None, **more: Any) -> Any:
    """The keywords that transformers hands to a mask function, for T tokens over S columns from `first` on."""
    padding = None
    if starts is not None:
        padding = torch.arange(first + positions)[None] >= torch.tensor(starts)[:, None]
    return {
        "batch_size": len(starts or (0, 0)), "q_length": tokens, "kv_length": positions,
        "q_offset": first + positions - tokens, "kv_offset": first, "mask_function": causal_mask_function,
        "attention_mask": padding, "allow_is_causal_skip": True, "dtype": torch.float32, "config": None,
        "use_vmap": False, "device": torch.device("cpu"), **more,
    }  # fmt: skip


def windowed(window: int) -> dict[str, Any]:
    return {"mask_function": sliding_window_causal_mask_function(window), "local_size": window}


BANDS = {
    "causal": request(9, 9),
    "past": request(5, 12),
    "padded": request(9, 9, starts=(3, 0)),
    "padded past": request(4, 11, starts=(8, 2)),
    "all padding": request(9, 9, starts=(9, 1)),
    "window": request(9, 9, **windowed(4)),
    "window, padded": request(9, 9, starts=(2, 5), **windowed(4)),
    "window of a cache that slides": request(5, 8, 6, starts=(9, 1), **windowed(4)),
    "window longer than the text": request(9, 9, starts=(2, 0), **windowed(30)),
    "chunks longer than the text": request(
        5, 5, mask_function=chunked_causal_mask_function(7, torch.zeros(2, dtype=torch.long)), local_size=7
    ),
}


@pytest.mark.parametrize("title", BANDS)
def test_a_band_is_the_mask_it_stands_for(title: str) -> None:
    asked = BANDS[title]
    band = described(asked)
    assert band is not None
    expected = sdpa_mask(**asked)
    if expected is None:
        assert not band.has_effect
        expected = sdpa_mask(**asked | {"allow_is_causal_skip": False})
    mask = band.mask()
    assert (mask.shape, mask.dtype) == (expected.shape, torch.bool)
    assert torch.equal(mask & True, expected)
    assert torch.equal(mask[:, :, -2:, 1:], expected[:, :, -2:, 1:])
    assert mask.data_ptr() == band.dense.data_ptr()
    assert mask.stride() == band.dense.stride()


def holes() -> torch.Tensor:
    padding = torch.ones(2, 9, dtype=torch.bool)
    padding[0, 4] = False
    return padding


OTHERS = {
    "holes": request(9, 9, attention_mask=holes()),
    "padding on the right": request(9, 9, attention_mask=holes().flip(1).cummin(1).values),
    "chunks": request(
        9, 9, mask_function=chunked_causal_mask_function(4, torch.zeros(2, dtype=torch.long)), local_size=4
    ),
    "chunks of padded rows": request(
        9, 9, starts=(0, 1), mask_function=chunked_causal_mask_function(4, torch.tensor([0, 1])), local_size=4
    ),
    "both ways": request(9, 9, mask_function=lambda b, h, q, k: q >= 0, local_size=None),
    "functions of the user's": request(9, 9, use_vmap=True),
    "packed": request(9, 9, allow_is_causal_skip=False),
    "a static cache": request(9, 16, q_offset=0),
    "offsets on the device": request(9, 9, q_offset=torch.tensor(0)),
}


@pytest.mark.parametrize("title", OTHERS)
def test_what_is_no_band_is_left_alone(title: str) -> None:
    assert described(OTHERS[title]) is None


def test_starts() -> None:
    assert starts_of(torch.tensor([[False, False, True], [True, True, True]])) == (2, 0)
    assert starts_of(torch.tensor([[True, False, True], [True, True, True]])) is None
    assert starts_of(torch.zeros(1, 4, dtype=torch.bool)) == (4,)
    assert starts_of(torch.tensor([[True]])) == (0,)


def test_what_is_found_out_is_kept_for_a_pass() -> None:
    band = Band(3, 3, (1, 0), None, torch.device("cpu"))
    assert band.starts_tensor is band.starts_tensor
    assert band.dense is band.dense
    assert band_of(band.mask()) is band
    assert band_of(torch.ones(1, 1, 3, 3)) is None
    assert "starts=(1, 0)" in repr(band.mask())


def with_holes() -> dict[str, torch.Tensor]:
    batch = padded([44, 51])
    batch["attention_mask"][1, 20:23] = 0
    return batch


def packed() -> dict[str, torch.Tensor]:
    ids = padded([48])["input_ids"]
    positions = torch.cat([torch.arange(20), torch.arange(28)])[None]
    return {"input_ids": ids, "position_ids": positions, "use_cache": False}


def four_dimensions() -> dict[str, torch.Tensor]:
    shown = torch.ones(40, 40, dtype=torch.bool).tril() & (torch.rand(40, 40, generator=torch.Generator()) > 0.3)
    return {
        "input_ids": padded([40])["input_ids"],
        "attention_mask": (shown | torch.eye(40, dtype=torch.bool))[None, None],
    }


@pytest.mark.parametrize("backend", ["tiled", "sdpa", "auto"])
@pytest.mark.parametrize("make", [with_holes, packed, four_dimensions], ids=lambda make: make.__name__)
def test_other_masks_of_models_stay_right(make: Any, backend: str) -> None:
    stock = build("llama")
    model = hf_accel.optimize(build("llama"), [AttentionConfig(backend=backend)])
    batch = make()
    kept = batch.get("attention_mask")
    kept = kept.bool() if kept is not None and kept.dim() == 2 else torch.ones(batch["input_ids"].shape).bool()
    with torch.no_grad():
        logits = [m(**batch).logits[kept] for m in (stock, model)]
    torch.testing.assert_close(logits[1], logits[0], atol=2e-4, rtol=2e-4)


def test_chunked_prompts_and_continued_caches() -> None:
    stock = build("mistral")
    model = hf_accel.optimize(build("mistral"), [AttentionConfig(backend="tiled"), hf_accel.KVCacheConfig()])
    call = lambda m: m.generate(**padded([90, 120]), max_new_tokens=4, prefill_chunk_size=40)  # noqa: E731
    assert_equal_calls(stock, model, call)


def test_masks_of_the_users_own_making(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where another function stands as sdpa's mask it is asked."""
    model = hf_accel.optimize(build("llama"), [AttentionConfig(backend="tiled")])
    asked: list[int] = []

    def own(*args: Any, **kwargs: Any) -> Any:
        asked.append(kwargs["q_length"])
        return sdpa_mask(*args, **kwargs)

    monkeypatch.setitem(masking_utils.ALL_MASK_ATTENTION_FUNCTIONS._local_mapping, "sdpa", own)
    with torch.no_grad():
        model(**padded([40, 50]))
    assert asked == [50]
