"""Near-ties under `strict`, draws of its own under "residual", and mistakes planted to prove that all of it is seen."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from catalogue import exact
from models import build, padded
from speculating import ENDS, FEW_TOKENS, always, ask, assert_stock, counts, noisy, shared, speculating, stock, total

import hf_accel
from hf_accel import DecodingConfig, KVCacheConfig
from hf_accel.cache.layers.growing import GrowingLayer
from hf_accel.cache.layers.sliding import GrowingSlidingLayer
from hf_accel.core.calls.doors import Door
from hf_accel.core.calls.drafting import Draft
from hf_accel.core.calls.forward import Stepper
from hf_accel.core.calls.hosting import host_of
from hf_accel.decoding.choosing import Chooser
from hf_accel.decoding.draws import Draws
from hf_accel.decoding.verification import VerifiedSteps
from hf_accel.speculative.session import SpeculativeSession

PLAIN = [DecodingConfig(), KVCacheConfig()]
Patch = pytest.MonkeyPatch


@pytest.mark.native
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_strict_text_is_that_of_plain_decoding_where_rows_round_alike(name: str) -> None:
    """The native layers round up to 16 rows as they round one, so nothing is left to settle."""
    model = build(name, torch.bfloat16)
    hf_accel.optimize(model, [*exact(model), always(("lookup", "self"), strict=True)])
    assert host_of(model).doors[Door.DRAFTS].rounding[0] == 0.0  # type: ignore[union-attr]
    for seed in range(4):
        given = {"suppress_tokens": FEW_TOKENS} if seed % 2 else {}
        plain = ask(model, 1, seed, speculative=False, max_new_tokens=24, **given)
        assert torch.equal(ask(model, 1, seed, max_new_tokens=24, **given), plain)
    assert counts(model)["calls"] == 4
    assert counts(model)["near_ties"] == 0
    assert total(counts(model), "accepted") > 0


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_text_leaves_that_of_plain_decoding_at_near_ties_only(name: str) -> None:
    model = build(name, torch.bfloat16)
    hf_accel.optimize(model, [*PLAIN, always(("lookup", "self"))])
    bound = max(host_of(model).doors[Door.DRAFTS].rounding)  # type: ignore[union-attr]
    assert bound > 0
    for seed in range(8):
        given = {"max_new_tokens": 24} | ({"suppress_tokens": FEW_TOKENS} if seed % 2 else {})
        plain = ask(model, 1, seed, speculative=False, return_dict_in_generate=True, output_scores=True, **given)
        text = ask(model, 1, seed, **given)
        apart = (text != plain.sequences)[0].nonzero().flatten().tolist()
        if apart:
            best = plain.scores[apart[0] - 6].topk(2).values[0]
            assert best[0] - best[1] < bound
    assert counts(model)["near_ties"] > 0
    assert total(counts(model), "accepted") > 0


@pytest.mark.parametrize(
    "name, dtype", [("llama", torch.bfloat16), ("gpt2", torch.bfloat16), ("gemma3", torch.float32)]
)
def test_strict_text_is_that_of_plain_decoding_where_rows_round_differently(name: str, dtype: torch.dtype) -> None:
    """Whatever the batch, the draws and how near the ties: nothing is drafted, and the report says why."""
    model = build(name, dtype)
    hf_accel.optimize(model, [*PLAIN, always(("lookup", "self"), strict=True)])
    assert host_of(model).doors[Door.DRAFTS].rounding[0] > 0  # type: ignore[union-attr]
    calls = 0
    for seed in range(4):
        for rows in (1, 4):
            for given in ({}, ENDS, {"do_sample": True}, {"suppress_tokens": FEW_TOKENS}):
                texts = []
                for value in (False, True):
                    torch.manual_seed(1)
                    texts.append(ask(model, rows, seed, speculative=value, max_new_tokens=20, **given))
                assert torch.equal(*texts)
                calls += 1
    assert counts(model)["plain_calls"] == {"strict, and steps of several tokens round differently here": calls}
    assert counts(model)["calls"] == 0


@pytest.mark.native
def test_strict_steps_are_no_wider_than_rows_round_alike() -> None:
    model = build("llama", torch.bfloat16)
    hf_accel.optimize(model, [*exact(model), always("self", strict=True, max_draft_tokens=8)])
    lengths = [9, 3, 5, 7, 4, 8, 6, 2, 9]

    def texts(rows: int) -> list[torch.Tensor]:
        given = padded(lengths[:rows]) | {"max_new_tokens": 20, "do_sample": False}
        return [model.generate(**given, speculative=value) for value in (False, True)]

    for rows in (4, 8):  # 3 drafts, and 1: steps of 16 rows
        assert torch.equal(*texts(rows))
    found = counts(model)
    assert found["calls"] == 2
    assert total(found, "accepted") > 0
    assert total(found, "proposed") <= found["steps"] * 12  # 4 rows x 3 drafts
    assert torch.equal(*texts(9))
    assert counts(model)["plain_calls"] == {"strict, and only steps of up to 16 rows round alike": 1}


def test_near_ties_are_counted_and_decide_nothing_without_strict() -> None:
    model = speculating("llama", "self")
    assert host_of(model).doors[Door.DRAFTS].rounding == (0.0, 0.0)  # type: ignore[union-attr]
    host_of(model).doors[Door.DRAFTS].rounding = (1e9, 1e9)  # type: ignore[union-attr]
    assert_stock(model, "llama", 4)
    found = counts(model)
    assert found["near_ties"] >= total(found, "accepted") > 0
    assert "closer than rounding" in str(hf_accel.report(model))


def test_a_draft_drawn_from_one_distribution_gives_tokens_of_another() -> None:
    """The first token of 5,000 rows verified at once, by acceptance and residual, is distributed as the target."""
    generator = torch.Generator().manual_seed(3)
    scores = 1.5 * torch.randn(1, 2, 8, generator=generator)
    proposal = (1.5 * torch.randn(1, 1, 8, generator=generator)).softmax(-1)
    rows = 5_000
    steps: Any = VerifiedSteps.__new__(VerifiedSteps)
    steps.rows = type("All", (), {"ended": [False] * rows})()
    drafts = torch.multinomial(proposal[0, 0].expand(rows, 8), 1)
    for given in (proposal.expand(rows, 1, 8), None):
        made = steps._accept(Draft(drafts, [1] * rows, given), scores.expand(rows, 2, 8))
        share = torch.bincount(torch.tensor([row[0] for row in made]), minlength=8) / rows
        target = scores[0, 0].softmax(-1)
        assert 0.5 * (share - target).abs().sum() < 0.03
        accepted = torch.tensor([len(row) == 2 for row in made]).float().mean()
        overlap = torch.minimum(target, proposal[0, 0]).sum() if given is not None else (target * proposal[0, 0]).sum()
        assert accepted == pytest.approx(float(overlap), abs=0.03)
        second = torch.bincount(torch.tensor([row[1] for row in made if len(row) == 2]), minlength=8).float()
        assert 0.5 * (second / second.sum() - scores[0, 1].softmax(-1)).abs().sum() < 0.06


@pytest.mark.parametrize("drafter", ["model", "lookup"])
def test_residual_sampling_draws_from_the_same_distribution(drafter: str) -> None:
    """Pairs of new tokens out of four, in 16 batches of 128 equal prompts, against as many of stock's."""
    model = speculating("gpt2", drafter, PLAIN, sampling="residual", max_draft_tokens=3)
    inputs = {"input_ids": torch.tensor([[9, 20, 0, 1, 2, 3, 0, 1]]).expand(128, -1)}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    given = {"max_new_tokens": 3, "do_sample": True, "suppress_tokens": list(range(4, 128)), "temperature": 2.0}

    def share(one: Any, seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        new = torch.cat([one.generate(**inputs, **given)[:, -2:] for _ in range(16)])
        return torch.bincount(4 * new[:, 0] + new[:, 1], minlength=16) / len(new)

    expected, again, found = share(stock("gpt2"), 1), share(stock("gpt2"), 2), share(model, 3)
    noise = 0.5 * (expected - again).abs().sum()
    assert 0.5 * (expected - found).abs().sum() < max(2.5 * noise, 0.05)
    made = counts(model)
    assert 0 < total(made, "accepted") < total(made, "proposed")
    assert made["tokens"] == 16 * 128 * 2


def test_residual_sampling_is_greedy_decoding_where_nothing_is_drawn() -> None:
    model = speculating("llama", "model", sampling="residual")
    for rows in (1, 4):
        assert_stock(model, "llama", rows)
        torch.manual_seed(0)
        assert torch.equal(ask(model, rows, do_sample=True, top_k=1), ask(stock("llama"), rows))
        ids = ask(model, rows, do_sample=True, **ENDS)
        assert ids.shape[1] > 6


def one_draft_too_many(patch: Patch) -> None:
    matches = VerifiedSteps._matches

    def wrong(self: Any, draft: Any, chosen: torch.Tensor) -> list[int]:
        found = matches(self, draft, chosen)
        return found if draft is None else [count + (0 <= count < draft.tokens.shape[1]) for count in found]

    patch.setattr(VerifiedSteps, "_matches", wrong)


def rejected_tokens_kept(patch: Patch) -> None:
    patch.setattr(Stepper, "keep", lambda self, lengths: setattr(self, "lengths", list(lengths)))


def draws_of_the_next_token(patch: Patch) -> None:
    rows = Draws.rows
    patch.setattr(Draws, "rows", lambda self, starts, tokens: rows(self, [start + 1 for start in starts], tokens))


def generator_left_anywhere(patch: Patch) -> None:
    patch.setattr(Chooser, "finish", lambda self, tokens: None)


def plain_runs_that_draw_again(patch: Patch) -> None:
    dice = random.Random(1)
    patch.setattr(SpeculativeSession, "plain_steps", lambda self, limit: max(0, min(dice.randrange(3), limit - 1)))
    patch.setattr(Chooser, "pause", lambda self: setattr(self, "draws", None))


def rows_one_too_short(patch: Patch) -> None:
    set_rows = GrowingLayer.set_rows
    patch.setattr(GrowingLayer, "set_rows", lambda self, lengths: set_rows(self, [n - 1 for n in lengths]))


def windows_one_too_long(patch: Patch) -> None:
    mask = Stepper._ragged_mask

    def wrong(self: Any, layer: Any, tokens: int) -> torch.Tensor:
        window = layer.sliding_window if layer.is_sliding else 0
        try:
            layer.sliding_window = window + 1
            return mask(self, layer, tokens)
        finally:
            layer.sliding_window = window

    patch.setattr(Stepper, "_ragged_mask", wrong)


def window_columns_off_by_one(patch: Patch) -> None:
    columns = GrowingSlidingLayer.columns
    patch.setattr(GrowingSlidingLayer, "columns", lambda self, tokens: tuple(end + 1 for end in columns(self, tokens)))


def positions_of_the_longest_row(patch: Patch) -> None:
    positions = Stepper._positions

    def wrong(self: Any, tokens: int) -> torch.Tensor:
        lengths, self.lengths = self.lengths, [max(self.lengths)] * len(self.lengths)
        try:
            return positions(self, tokens)
        finally:
            self.lengths = lengths

    patch.setattr(Stepper, "_positions", wrong)


def padding_seen(patch: Patch) -> None:
    visible = Stepper._visible
    patch.setattr(Stepper, "_visible", lambda self, tokens: torch.ones_like(visible(self, tokens)))


def processors_that_see_no_drafts(patch: Patch) -> None:
    score = Chooser.score

    def wrong(self: Any, logits: torch.Tensor, ahead: Any = None) -> torch.Tensor:
        return score(self, logits, None if ahead is None else torch.full_like(ahead, 9))

    patch.setattr(Chooser, "score", wrong)


def scores_of_another_step(patch: Patch) -> None:
    append = VerifiedSteps._append

    def wrong(self: Any, chosen: Any, counts: Any, scores: Any = None, logits: Any = None) -> None:
        append(self, chosen, counts, None if scores is None else scores.roll(1, dims=1), logits)

    patch.setattr(VerifiedSteps, "_append", wrong)


def cache_not_taken_back(patch: Patch) -> None:
    """At the end of a call that stops in the middle of what was verified."""
    close = VerifiedSteps.close

    def wrong(self: Any, input_ids: torch.Tensor) -> None:
        filler = torch.cat([input_ids, input_ids[:, -1:]], dim=1)
        close(self, filler)

    patch.setattr(VerifiedSteps, "close", wrong)


SAMPLED = {"do_sample": True}
PENALTY = {"repetition_penalty": 1.5, "suppress_tokens": FEW_TOKENS}
RETURNED = {"return_dict_in_generate": True, "output_scores": True}
DEFECTS: list[tuple[Callable[[Patch], None], str, int, dict[str, Any]]] = [
    (one_draft_too_many, "llama", 1, {}),
    (rejected_tokens_kept, "llama", 1, {}),
    (rejected_tokens_kept, "gemma3", 4, {}),
    (draws_of_the_next_token, "llama", 1, SAMPLED),
    (generator_left_anywhere, "llama", 1, SAMPLED),
    (plain_runs_that_draw_again, "llama", 1, SAMPLED),
    (rows_one_too_short, "llama", 4, {}),
    (windows_one_too_long, "mistral", 4, {}),
    (window_columns_off_by_one, "gemma3", 4, {}),
    (positions_of_the_longest_row, "gpt2", 4, {}),
    (padding_seen, "llama", 4, {}),
    (processors_that_see_no_drafts, "llama", 4, PENALTY),
    (scores_of_another_step, "llama", 1, RETURNED),
    (cache_not_taken_back, "llama", 1, RETURNED),
    (cache_not_taken_back, "gemma3", 1, RETURNED),
]


@pytest.mark.parametrize("defect, name, rows, given", DEFECTS, ids=lambda value: getattr(value, "__name__", None))
def test_a_planted_defect_is_seen(
    defect: Callable[[Patch], None], name: str, rows: int, given: dict[str, Any], monkeypatch: Patch
) -> None:
    model = shared(name, "model")
    given = {"max_new_tokens": 24} | given
    with monkeypatch.context() as patch:
        defect(patch)
        with pytest.raises(AssertionError):
            assert_stock(model, name, rows, **given)
    assert_stock(model, name, rows, **given)


def test_the_draft_model_alone_writes_another_text() -> None:
    """Otherwise text made of drafts would be right by chance."""
    assert not torch.equal(ask(noisy("llama")), ask(stock("llama")))
    assert not torch.equal(ask(noisy("gpt2"), 4), ask(stock("gpt2"), 4))
