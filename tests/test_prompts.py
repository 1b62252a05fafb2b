"""Prompts through native layers: up to how many rows, what the audit sees, and results against fp64."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from models import build, padded, prompt
from planting import Patch

import hf_accel
from hf_accel import DecoderBlockConfig, KVCacheConfig, NativeLinearConfig
from hf_accel.errors import VerificationError
from hf_accel.kernels import native
from hf_accel.kernels.native import NativeBlock
from hf_accel.layers import block as blocks
from hf_accel.layers import trial
from hf_accel.layers.trial import BATCHES, BUDGET_S, LONG_S, ROUNDS, SIZES, Extent, rows_that_pay

pytestmark = pytest.mark.native
STEPS = [NativeLinearConfig(max_rows=16), DecoderBlockConfig(), KVCacheConfig()]


@pytest.fixture
def pays(monkeypatch: Patch) -> None:
    """Every trial says that 256 rows pay."""
    monkeypatch.setattr(blocks, "tried_rows", lambda few, key, pairs: 256)


def timed(most: int, seconds: float = 1e-6) -> Any:
    """Times as a trial finds them where up to `most` rows pay, and the sizes that were tried."""
    tried: list[int] = []

    def times(rows: int) -> tuple[float, float]:
        tried.append(rows)
        return seconds, seconds * (0.5 if rows <= most else 0.99)

    return times, tried


@pytest.mark.parametrize("most", [0, *SIZES])
def test_the_limit_is_the_last_size_that_paid(most: int) -> None:
    times, tried = timed(most)
    assert rows_that_pay(16, times) == max(16, most)
    lost = [rows for rows in SIZES if rows > most][:1]
    between = [rows * 3 // 4 for rows in lost]
    again = [most] if most else []
    assert tried == [*(rows for rows in SIZES if rows <= most), *lost, *lost, *between, *between, *again]


@pytest.mark.parametrize("most", [24, 48, 96, 192, 384])
def test_the_size_halfway_before_a_loss_is_tried_too(most: int) -> None:
    times, tried = timed(most)
    assert rows_that_pay(16, times) == most == tried[-1]


@pytest.mark.parametrize(("per_row_s", "most"), [(0.7e-3, 512), (4e-3, 128)])
def test_large_layers_are_tried_as_far_as_the_budget_goes(per_row_s: float, most: int) -> None:
    spent = []

    def times(rows: int) -> tuple[float, float]:
        both = rows * per_row_s
        spent.append((ROUNDS if both < LONG_S else 1) * len(BATCHES) * both)
        return 0.6 * both, 0.4 * both

    assert rows_that_pay(16, times) == most
    assert sum(spent[:-1]) <= BUDGET_S
    assert sum(spent) <= 1.5 * BUDGET_S


@pytest.mark.parametrize(("long_s", "rounds"), [(10.0, ROUNDS), (0.0, 1)])
def test_long_calls_are_made_once(monkeypatch: Patch, long_s: float, rounds: int) -> None:
    calls: list[int] = []
    recorded = SimpleNamespace(
        block=SimpleNamespace(form=SimpleNamespace(call=SimpleNamespace(cache="cache"))),
        prompts=lambda batch, tokens: (batch * tokens, {}),
        layer=lambda rows, **_: calls.append(rows),
        replaced=lambda *_: True,
    )
    monkeypatch.setattr(trial, "LONG_S", long_s)
    monkeypatch.setattr(trial, "SIZES", (32,))
    monkeypatch.setattr(trial, "MARGIN", float("inf"))
    key = f"layers whose calls are long from {long_s} s on"
    assert trial.tried_rows(16, key, [(lambda: cast(Any, recorded), cast(Any, None))]) == 32
    assert calls == [32] * rounds * len(BATCHES) * 2  # and once more, as a gain has to show twice


def test_a_loss_that_another_program_made_is_looked_at_again() -> None:
    times, tried = timed(SIZES[-1])

    def disturbed(rows: int) -> tuple[float, float]:
        own, ours = times(rows)
        return own, ours * (10 if rows == 64 and tried.count(rows) == 1 else 1)

    assert rows_that_pay(16, disturbed) == SIZES[-1]


@pytest.mark.parametrize(("falsely", "most"), [((64,), 32), ((32, 64), 16), ((48,), 32)])
def test_a_gain_that_another_program_made_is_looked_at_again(falsely: tuple[int, ...], most: int) -> None:
    times, tried = timed(most)

    def disturbed(rows: int) -> tuple[float, float]:
        own, ours = times(rows)
        return own * (10 if rows in falsely and tried.count(rows) == 1 else 1), ours

    assert rows_that_pay(16, disturbed) == most


def test_sizes_that_are_served_anyway_are_not_tried() -> None:
    times, tried = timed(64)
    assert rows_that_pay(32, times) == 64
    assert min(tried) == 64


def test_many_rows_run_natively_as_far_as_the_trial_went() -> None:
    extent = Extent(16, 64)
    assert extent.covers(16, 10**9)
    assert extent.covers(64, 64)
    assert extent.covers(32, 128)
    assert not extent.covers(32, 129)
    assert not extent.covers(65, 1)


def logits(model: Any, inputs: dict[str, torch.Tensor], tokens: list[int]) -> torch.Tensor:
    """Return logits [B, 1 + len(tokens), V] after a prompt and after each of these tokens."""

    def forced(scores_of: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        wanted = torch.full_like(scores, -torch.inf)
        wanted[:, [*tokens, 9][scores_of.shape[1] - inputs["input_ids"].shape[1]]] = 0
        return wanted

    found = model.generate(
        **inputs,
        max_new_tokens=1 + len(tokens),
        do_sample=False,
        logits_processor=[forced],
        output_logits=True,
        return_dict_in_generate=True,
    )
    return torch.stack(found.logits, 1).double()


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3", "gemma3", "phi3", "mixtral"])
def test_prompts_are_as_exact_as_stocks(name: str, dtype: torch.dtype, pays: None, monkeypatch: Patch) -> None:
    """Logits after the prompt and after two steps more, padded and not, over windows of 8 tokens; measured in fp64."""
    model = build(name, dtype)
    exact = copy.deepcopy(model).to(torch.float32 if name == "mixtral" else torch.float64)  # experts have no fp64
    served: list[int] = []
    call = NativeBlock.__call__

    def counted(self: Any, hidden: Any, *args: Any) -> Any:
        found = call(self, hidden, *args)
        served.append(0 if found is None else hidden.shape[0] * hidden.shape[1])
        return found

    for lengths in ([33], [150], [54, 65]):
        inputs = padded(lengths)
        expected = logits(exact, inputs, [11, 5])
        bound = distance(logits(model, inputs, [11, 5]), expected)
        with monkeypatch.context() as patch, hf_accel.optimized(model, STEPS):
            assert "up to 256 rows" in str(hf_accel.report(model))
            patch.setattr(NativeBlock, "__call__", counted)
            served.clear()
            found = logits(model, inputs, [11, 5])
        assert len(lengths) * max(lengths) in served
        assert 0 not in served
        assert distance(found, expected) < 1.5 * bound + 1e-5, (lengths, bound)


def test_rows_beyond_the_limit_run_the_layers_own_forward(monkeypatch: Patch) -> None:
    monkeypatch.setattr(blocks, "tried_rows", lambda few, key, pairs: 64)
    model = build("llama")
    served: list[int] = []
    call = NativeBlock.__call__

    def counted(self: Any, hidden: Any, *args: Any) -> Any:
        served.append(hidden.shape[0] * hidden.shape[1])
        return call(self, hidden, *args)

    with hf_accel.optimized(model, STEPS):
        monkeypatch.setattr(NativeBlock, "__call__", counted)
        for tokens in (64, 65):
            served.clear()
            model.generate(prompt(tokens=tokens), max_new_tokens=2, do_sample=False)
            assert (tokens in served) is (tokens == 64)
            assert 1 in served


def wrong_of_many(patch: Patch) -> None:
    """Native layers are wrong in the second pass of a prompt alone."""
    call = NativeBlock.__call__

    def wrong(self: Any, hidden: Any, *args: Any) -> Any:
        found = call(self, hidden, *args)
        if hidden.shape[0] * hidden.shape[1] > 128:
            found[:, -1] *= 1.2
        return found

    patch.setattr(NativeBlock, "__call__", wrong)


def test_the_audit_sees_prompts(pays: None, monkeypatch: Patch) -> None:
    model = build("llama")
    wrong_of_many(monkeypatch)
    with pytest.raises(VerificationError, match=r"Layer 0 .* differs from its own forward"):
        hf_accel.optimize(model, STEPS)
    hf_accel.optimize(model, [NativeLinearConfig(max_rows=16), DecoderBlockConfig(max_rows=16), KVCacheConfig()])


def test_layers_with_masks_of_another_form_serve_few_rows(pays: None) -> None:
    model = build("llama", attention="eager")
    with hf_accel.optimized(model, STEPS):
        assert "up to 16 rows" in str(hf_accel.report(model))


@pytest.mark.parametrize(("name", "rows"), [("gpt2", 16), ("llama", 32)])
def test_products_of_transposed_weights_are_tried_from_seventeen_rows(name: str, rows: int, monkeypatch: Patch) -> None:
    """Where those of other weights are made natively whatever their number, of theirs ATen's may be the faster ones."""
    monkeypatch.setattr(native, "best_rows", lambda dtype: None)
    asked: list[int] = []
    monkeypatch.setattr(blocks, "tried_rows", lambda few, key, pairs: asked.append(few) or few)
    model = build(name)
    with hf_accel.optimized(model, STEPS):
        assert f"up to {rows} rows" in str(hf_accel.report(model))
    assert asked == [rows]
    with hf_accel.optimized(model, [DecoderBlockConfig(max_rows=24)]):
        assert "up to 24 rows" in str(hf_accel.report(model))


def test_a_trial_times_both_ways_and_leaves_the_model_alone(monkeypatch: Patch) -> None:
    """The clock is not asked: of what is timed, the number of calls and of rows."""
    calls: dict[str, list[int]] = {"own": [], "native": []}
    model = build("llama")
    forward, call = type(model.model.layers[0]).forward, NativeBlock.__call__

    def own(self: Any, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
        calls["own"].append(hidden_states.shape[1])
        return forward(self, hidden_states, *args, **kwargs)

    def ours(self: Any, hidden: Any, *args: Any) -> Any:
        calls["native"].append(hidden.shape[1])
        return call(self, hidden, *args)

    monkeypatch.setattr(type(model.model.layers[0]), "forward", own)
    monkeypatch.setattr(NativeBlock, "__call__", ours)
    monkeypatch.setattr(trial, "_known", {})
    monkeypatch.setattr(trial, "SIZES", (24, 40))
    monkeypatch.setattr(trial, "MARGIN", 1e9)
    hf_accel.optimize(model, STEPS)
    assert "up to 40 rows" in str(hf_accel.report(model))
    for rows in (24, 40):
        for tokens in (rows, rows // 4):
            times = ROUNDS * (2 if rows == 40 else 1)  # the size that decides is looked at once more
            assert calls["own"].count(tokens) == calls["native"].count(tokens) == times
    assert len(trial._known) == 1
