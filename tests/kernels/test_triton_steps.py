"""Norms, rotary positions with the write into a cache, and the choice of a token, in Triton against their twins."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed (extra: test)")

from hf_accel.kernels.triton import attention, choose, linear, norm, on_its_device, packed, rotary
from hf_accel.ops import cached, choice, norms
from hf_accel.ops import rotary as rotary_twin

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def difference(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.mark.parametrize("style", ["llama", "gemma"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_norms_round_where_eager_code_does(dtype: torch.dtype, style: str) -> None:
    hidden, added = (torch.randn(2, 3, 72, device=DEVICE).to(dtype) for _ in range(2))
    weight, inner = (torch.randn(72, device=DEVICE).to(dtype) for _ in range(2))
    for more in (
        {"added": None, "weight": weight},
        {"added": added, "weight": weight},
        {"added": added, "weight": weight, "inner_weight": inner, "residual_scale": 0.3},
        {"added": added, "weight": None, "inner_weight": inner},
    ):
        found = norm.add_norm(hidden, eps=1e-5, style=style, **more)
        expected = norms.add_norm(hidden, eps=1e-5, style=style, **more)
        for mine, twins in zip(found, expected, strict=True):
            assert difference(mine, twins) < (5e-7 if dtype is torch.float32 else 1e-4)


@pytest.mark.parametrize("bits", [None, 8, 4])
@pytest.mark.parametrize("size,turning", [(32, 32), (48, 24)])
def test_rotary_and_the_rows_that_are_written(size: int, turning: int, bits: int | None) -> None:
    batch, tokens, heads, groups, capacity = 2, 2, 2, 1, 20
    qkv = torch.randn(batch, tokens, (heads + 2 * groups) * size, device=DEVICE).half()
    angles = torch.rand(batch, tokens, turning // 2, device=DEVICE).mul(6).repeat(1, 1, 2)
    row, kind = (size, torch.float16) if bits is None else (cached.row_bytes(bits, size), torch.uint8)
    mine, twins = ([torch.zeros(batch, groups, capacity, row, dtype=kind, device=DEVICE) for _ in "kv"] for _ in "mt")
    lengths = torch.tensor([3, 11], dtype=torch.int32, device=DEVICE)
    weight = torch.randn(size, device=DEVICE).half()
    options = {"kv_heads": groups, "head_dim": size, "bits": bits, "eps": 1e-6, "q_norm": weight, "k_norm": weight,
               "style": "gemma" if turning < size else "llama"}  # fmt: skip
    cos, sin = angles.cos().half(), angles.sin().half()
    found = rotary.rotary_write(qkv, cos, sin, *mine, lengths, **options)
    expected = rotary_twin.rotary_write(qkv, cos, sin, *twins, lengths, **options)
    assert difference(found, expected) < 1e-4
    for written, wanted in zip(mine, twins, strict=True):
        assert (written != wanted).float().mean() < 2e-3  # a value between two codes may go to either
        assert written[0, :, 3:5].any(-1).all()


def test_rows_that_are_not_finite_read_so() -> None:
    for bits in (8, 4):
        qkv = torch.randn(1, 1, 3 * 32, device=DEVICE)
        qkv[0, 0, 40], qkv[0, 0, 70] = torch.inf, torch.nan
        row = cached.row_bytes(bits, 32)
        keys, values = (torch.zeros(1, 1, 4, row, dtype=torch.uint8, device=DEVICE) for _ in "kv")
        one = torch.ones(1, 1, 32, device=DEVICE)
        lengths = torch.zeros(1, dtype=torch.int32, device=DEVICE)
        rotary.rotary_write(qkv, one, one * 0, keys, values, lengths, kv_heads=1, head_dim=32, bits=bits)
        for rows, is_key in ((keys, True), (values, False)):
            assert cached.decode(rows[0, 0, :1], bits, 32, torch.float32, is_key=is_key).isnan().all()


def test_the_chosen_token_is_torchs() -> None:
    logits = torch.randn(6, 9000, device=DEVICE)
    logits[0, 7] = logits[0, 5000] = 9.0  # of what is equal the first
    logits[1, 8999] = torch.inf
    logits[2, 77] = logits[2, 8000] = torch.nan
    logits[2, 3] = torch.inf
    logits[3] = -0.0
    logits[3, 5] = 0.0
    logits[4] = -torch.inf
    logits[5, 8500] = -torch.nan
    ids = torch.zeros(6, 10, dtype=torch.int64, device=DEVICE)
    twins = ids.clone()
    positions = torch.arange(6, dtype=torch.int32, device=DEVICE)
    expected = choice.choose(logits, twins, positions)
    assert torch.equal(expected, logits.argmax(-1))
    assert torch.equal(choose.choose(logits, ids, positions), expected)
    assert torch.equal(ids, twins)
    assert torch.equal(choose.choose(logits[:, ::1][:, :50].half()), logits[:, :50].half().argmax(-1))


@pytest.mark.parametrize("current", [0, 1])
def test_kernels_are_launched_where_their_tensors_lie(current: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The current device may be another one than the model's."""
    entered: list[torch.device | None] = []

    @contextmanager
    def device(found: torch.device) -> Iterator[None]:
        entered.append(found)
        yield
        entered.append(None)

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current)
    monkeypatch.setattr(torch.cuda, "device", device)
    there: Any = SimpleNamespace(is_cuda=True, device=torch.device("cuda:1"))
    assert on_its_device(lambda x, n, more: (len(entered), n, more))(there, 2, more=3) == (1 - current, 2, 3)
    assert entered == ([] if current == 1 else [there.device, None])
    for run in (attention.decode_attention, choose.choose, linear._launched, norm.add_norm, packed._launched,
                rotary.rotary_write):  # fmt: skip
        assert run.__code__ is there_code(), f"{run.__module__} launches on whatever device is current"


def there_code() -> Any:
    return on_its_device(lambda x: None).__code__
