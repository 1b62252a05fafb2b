"""Every attention kernel against float64: a generated table of shapes, dtypes, masks and ragged rows."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from flash_standins import STANDINS, install

from hf_accel.attention import cases as making
from hf_accel.attention.cases import Case, Shape, case, cases
from hf_accel.attention.kernels import KERNELS
from hf_accel.attention.selftest import difference, verdict
from hf_accel.ops import tolerances

CPU = torch.device("cpu")
NATIVE = pytest.param("native", marks=pytest.mark.native)
HERE = ["sdpa", NATIVE, "tiled"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [(8, 8), (10, 10), (24, 16), (64, 64), (33, 47), (16, 40)]


@dataclass(frozen=True)
class Row:
    """One row of the table: what `case` is asked for."""

    title: str
    shape: Shape
    tokens: int
    groups: int
    options: tuple[tuple[str, Any], ...]

    def call(self) -> Case:
        return case(self.title, self.shape, self.tokens, groups=self.groups, **dict(self.options))


def table(count: int = 60) -> list[Row]:
    """Draw the rows, the same in every process."""
    draw, rows = random.Random(18), []
    for number in range(count):
        tokens, batch = draw.choice([1, 2, 17, 33, 65, 130]), draw.choice([1, 2, 3])
        past = draw.choice([0, 0, 5, 70])
        options: dict[str, Any] = {"past": past, "starts": (0,) * batch}
        kind = draw.choice(["causal", "padded", "padded", "window", "boolean", "per head", "additive", "full"])
        dtype = DTYPES[number % 3]
        if kind in ("padded", "window"):
            options["starts"] = tuple(draw.randrange(tokens + past) for _ in range(batch))
        if kind == "window":
            options["window"] = draw.choice([1, 3, 16, 64])
        if kind in ("boolean", "per head", "additive"):
            options |= {"mask": dtype if kind == "additive" else torch.bool, "is_per_head": kind == "per head"}
        options["softcap"] = draw.choice([None, None, 1.5])
        options["sinks"] = draw.random() < 0.3
        shape = Shape(CPU, dtype, draw.choice(SIZES), draw.choice([1, 2, 3, 7]))
        rows.append(Row(kind, shape, tokens, draw.choice([1, 2]), tuple(options.items())))
    return rows


ROWS = table()


def check(name: str, row: Row) -> bool:
    """Compare where the kernel has no obstacle; return whether it had none."""
    call = row.call()
    if KERNELS[name].obstacle(call.question) is not None:
        return False
    found = call.found(KERNELS[name])
    assert found.is_contiguous()
    assert found.dtype is row.shape.dtype
    bound = tolerances.of_attention(row.shape.dtype)
    assert difference(found, call.expected()) <= bound, (name, row)
    return True


@pytest.mark.parametrize("name", HERE)
def test_the_table(name: str) -> None:
    answered = sum(check(name, row) for row in ROWS)
    assert answered >= {"tiled": len(ROWS), "native": 40, "sdpa": 15}[name]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_on_rows_of_every_kind() -> None:
    """It is traced anew for each, so that there are few."""
    shape = Shape(CPU, torch.float32, (16, 8), 3)
    for title, options in {
        "padded": {"starts": (9, 0), "past": 4, "softcap": 1.5},
        "window": {"window": 5, "starts": (0, 3), "sinks": True},
        "causal": {"starts": (0,)},
    }.items():
        assert check("flex", Row(title, shape, 19, 2, tuple(options.items())))


@pytest.mark.parametrize("name", STANDINS)
def test_packages_are_called_as_their_signatures_ask(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, name)
    assert KERNELS[name].missing() is None
    assert sum(check(name, row) for row in ROWS) >= (16 if name == "flash4" else 12)


@pytest.mark.parametrize("name", ["flash2", "flash3"])
def test_releases_without_sinks_say_so(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, name)
    call = case("sinks", Shape(CPU, torch.bfloat16, (16, 16), 2), 20, sinks=True)
    assert KERNELS[name].obstacle(call.question) == "this release has no sinks"


def test_padding_costs_no_arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a padded batch the packages see the rows' own tokens and no others."""
    standin, seen = install(monkeypatch, "flash2"), []
    real = standin.flash_attn_varlen_func

    def counting(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale=None, causal=False):
        seen.append((len(q), len(k)))
        return real(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, 0.0, softmax_scale, causal)

    monkeypatch.setattr(__import__("flash_attn"), "flash_attn_varlen_func", counting)
    call = case("padded", Shape(CPU, torch.bfloat16, (16, 16), 2), 40, past=10, starts=(45, 5, 0))
    assert difference(call.found(KERNELS["flash2"]), call.expected()) < 4e-2
    assert seen == [(5 + 40 + 40, 5 + 45 + 50)]


@pytest.mark.parametrize("name", HERE)
def test_rows_are_as_alone(name: str) -> None:
    """What stands in another row, or in padding, changes nothing of a row."""
    shape = Shape(CPU, torch.float32, (16, 16), 2)
    call = case("padded", shape, 40, starts=(13, 0))
    found = call.found(KERNELS[name])
    call.key[0, :, :13], call.value[0, :, :13] = 1e4, -1e4
    call.key[1], call.value[1], call.query[1] = 0.0, 0.0, 0.0
    again = call.found(KERNELS[name])
    assert torch.equal(again[0, 13:], found[0, 13:])
    assert bool((again[0, :13] == 0).all())


def test_self_tests_name_the_mask_and_the_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = Shape(CPU, torch.float32, (12, 12), 2)
    assert verdict("sdpa", shape) is None
    right = type(KERNELS["sdpa"]).attend

    def wrong(self: Any, query: Any, key: Any, value: Any, visible: Any, *rest: Any) -> Any:
        output = right(self, query, key, value, visible, *rest)
        if visible.window is not None:
            output[-1, -1, 0] *= 1.01
        return output

    monkeypatch.setattr(type(KERNELS["sdpa"]), "attend", wrong)
    verdict.cache_clear()
    said = verdict("sdpa", shape)
    monkeypatch.undo()
    verdict.cache_clear()
    assert said is not None
    assert "(window)" in said
    assert "e-03 of a query; rounding explains 1e-04" in said


def test_self_tests_see_every_kind_that_models_ask_for() -> None:
    kinds = {each.name for each in cases(Shape(CPU, torch.float32, (8, 8), 2), 20)}
    assert kinds >= {"causal", "past", "padded", "padded past", "window", "soft cap", "sinks", "boolean", "additive"}
    assert making.TOKENS > 128  # the tiles of the kernels that are known have up to 128 queries


def test_torchs_own_flash_attention_is_called_as_its_operator_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a stand-in for the operator of CUDA: batches [B, T, H, D], rows one after the other, windows to the left."""
    from flash_standins import operator

    from hf_accel.attention import torch_flash

    monkeypatch.setattr(torch_flash, "_operator", operator)
    torch_flash._is_right.cache_clear()
    assert torch_flash._is_right(CPU, torch.bfloat16, 16)
    shape = Shape(CPU, torch.bfloat16, (16, 16), 3)
    for options in ({}, {"past": 9}, {"starts": (9, 20), "past": 9}, {"window": 7, "starts": (0, 12)}):
        call = case("padded", shape, 33, **options)
        found = torch_flash.flash_attention(call.query, call.key, call.value, call.visible, 0.25)
        assert difference(found, call.expected()) <= 4e-2
    monkeypatch.setattr(torch_flash, "_operator", lambda *args, **options: [operator(*args, **options)[0] * 1.1])
    torch_flash._is_right.cache_clear()
    assert not torch_flash._is_right(CPU, torch.bfloat16, 16)
    torch_flash._is_right.cache_clear()
