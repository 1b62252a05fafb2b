"""Attention in Triton over static caches against the same in float64: formats, windows, caps, sinks, ragged rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed (extra: test)")

from hf_accel.kernels.triton import attention
from hf_accel.ops import cached
from hf_accel.ops.static_attention import static_attention

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BOUNDS = {torch.float32: 5e-6, torch.float16: 2e-3, torch.bfloat16: 2.5e-2}
CASES: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    # B, H, G, T, D, C
    "gqa, one token": ((2, 4, 2, 1, 16, 90), {}),
    "window, three tokens": ((2, 4, 1, 3, 48, 70), {"window": 20}),
    "soft cap, sixteen tokens": ((1, 2, 2, 16, 16, 60), {"softcap": 5.0}),
    "sinks": ((2, 4, 2, 1, 64, 40), {"sinks": True}),
    "many heads of a group": ((1, 66, 1, 1, 16, 50), {"window": 9}),
}


def made(name: str, dtype: torch.dtype, bits: int | None, padding: int = 0) -> tuple[Any, ...]:
    (batch, heads, groups, tokens, size, capacity), options = CASES[name]
    query = torch.randn(batch, tokens, heads, size, device=DEVICE).to(dtype).transpose(1, 2)
    states = [torch.randn(batch, groups, capacity, size, device=DEVICE).to(dtype) for _ in "kv"]
    lengths = torch.randint(0, capacity - tokens + 1, (batch,), dtype=torch.int32).to(DEVICE)
    lengths[0] = capacity - tokens
    starts = torch.minimum(torch.randint(0, 12, (batch,), dtype=torch.int32).to(DEVICE), lengths)
    kept = states
    if bits is not None:
        kept = [cached.encode(state, bits, is_key=index == 0) for index, state in enumerate(states)]
        if padding:  # rows further apart than they are long
            kept = [torch.nn.functional.pad(rows, (0, padding))[..., : rows.shape[-1]] for rows in kept]
    options = {**options, "scale": 0.3, "bits": bits, "head_dims": (size, size)}
    if options.get("sinks"):
        options["sinks"] = torch.randn(heads, device=DEVICE)
    return query, *kept, lengths, starts, options


def expected(query: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, starts: Tensor, options: Any) -> Tensor:
    """Return the twin's attention in float64."""
    bits, size = options["bits"], query.shape[-1]
    if bits is not None:
        keys = cached.decode(keys, bits, size, torch.float64, is_key=True)
        values = cached.decode(values, bits, size, torch.float64, is_key=False)
    wide = [tensor.double() for tensor in (query, keys, values)]
    return static_attention(*wide, lengths, starts, **{**options, "bits": None})


def difference(found: Tensor, wanted: Tensor) -> float:
    assert found.shape == wanted.shape
    return ((found.double() - wanted.double()).norm() / wanted.double().norm()).item()


@pytest.mark.parametrize(
    ("name", "bits"),
    [(name, bits) for name in CASES for bits in (None, 8, 4) if name != "many heads of a group" or not bits],
)
def test_equals_its_twin(name: str, bits: int | None) -> None:
    dtype = {"gqa, one token": torch.bfloat16, "sinks": torch.float32}.get(name, torch.float16)
    *arguments, options = made(name, dtype, bits, padding=6 if name.startswith("window") else 0)
    one = {"BLOCK_N": 32, "SPLITS": 1, "num_warps": 4, "num_stages": 2}
    found = attention.decode_attention(*arguments, **options, config=one if name.startswith("many") else None)
    assert difference(found, expected(*arguments, options)) < BOUNDS[dtype]


@pytest.mark.parametrize("splits", [1, 5])
def test_splits_beyond_the_length_are_left_out(splits: int) -> None:
    """What lies behind a row's length, or before its start, is not read: it may be anything."""
    *arguments, options = made("gqa, one token", torch.float32, None)
    _, keys, values, lengths, starts = arguments
    lengths.copy_(torch.tensor([3, 89]))
    starts.copy_(torch.tensor([0, 60]))
    wanted = expected(*arguments, options)
    for kept in (keys, values):
        kept[0, :, 4:] = torch.nan
        kept[1, :, :60] = torch.nan
    config = {"BLOCK_N": 16, "SPLITS": splits, "num_warps": 4, "num_stages": 2}
    assert difference(attention.decode_attention(*arguments, **options, config=config), wanted) < 5e-6


def test_a_query_that_sees_nothing_gets_zeros() -> None:
    *arguments, options = made("gqa, one token", torch.float32, None)
    arguments[3].zero_()
    arguments[4].fill_(5)  # every column is padding
    assert not attention.decode_attention(*arguments, **options).any()


def test_not_a_number_is_not_lost() -> None:
    *arguments, options = made("gqa, one token", torch.float32, None)
    arguments[1][1, 0, arguments[4][1]] = torch.nan
    found = attention.decode_attention(*arguments, **options)
    assert found[1, :2].isnan().all()
    assert not found[0].isnan().any()


def test_the_grid_follows_from_the_size_of_buffers_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A captured graph has one grid for all lengths."""
    grids = []
    *arguments, options = made("gqa, one token", torch.float32, None)
    kernel = attention.split_keys

    class Seen:
        def __getitem__(self, grid: Any) -> Any:
            grids.append(grid)
            return kernel[grid]

    monkeypatch.setattr(attention, "split_keys", Seen())
    for length in (0, 89):
        arguments[3].fill_(length)
        arguments[4].zero_()
        attention.decode_attention(*arguments, **options)
    assert len(set(grids)) == 1
