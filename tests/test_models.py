"""The tests can see: on every tiny model a changed token, a dropped mask and shifted positions change the text."""

from __future__ import annotations

import pytest
import torch
from models import NAMES, TINY, build, padded, prompt


def text(model, ids: torch.Tensor, **arguments: object) -> torch.Tensor:
    """Return the 16 new tokens of greedy decoding, [B, 16]."""
    arguments.setdefault("attention_mask", torch.ones_like(ids))
    return model.generate(ids, max_new_tokens=16, do_sample=False, **arguments)[:, ids.shape[1] :]


@pytest.mark.parametrize("name", NAMES)
def test_text_depends_on_its_context(name: str) -> None:
    model, ids = build(name), prompt(tokens=7)
    before = text(model, ids)
    assert before.unique().numel() > 4, "the text repeats a few tokens, so it can hide mistakes"
    changed = 0
    for token in range(7):
        other = ids.clone()
        other[0, token] = 100 if ids[0, token] != 100 else 50
        changed += not torch.equal(text(model, other), before)
    assert changed >= 6, f"only {changed} of 7 prompt tokens matter"


@pytest.mark.parametrize("name", NAMES)
def test_text_depends_on_the_mask(name: str) -> None:
    model, batch = build(name), padded([3, 9])
    masked = text(model, batch["input_ids"], attention_mask=batch["attention_mask"])
    assert not torch.equal(masked, text(model, batch["input_ids"]))


@pytest.mark.parametrize("name", NAMES)
def test_logits_depend_on_positions(name: str) -> None:
    model, ids = build(name), prompt()
    positions = torch.arange(ids.shape[1])[None]
    spread = positions * 3
    with torch.no_grad():
        difference = model(ids, position_ids=spread).logits - model(ids, position_ids=positions).logits
    assert difference[:, -1].abs().max() > 0.05


@pytest.mark.parametrize("name", [name for name in NAMES if TINY[name].keyword])
def test_text_depends_on_further_keywords(name: str) -> None:
    model, ids = build(name), prompt()
    assert not torch.equal(text(model, ids, **{str(TINY[name].keyword): torch.full_like(ids, 9)}), text(model, ids))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes_are_the_same_model(name: str, dtype: torch.dtype) -> None:
    ids = prompt()
    with torch.no_grad():
        exact, rounded = build(name)(ids).logits, build(name, dtype)(ids).logits.float()
    assert exact.isfinite().all()
    assert rounded.isfinite().all()
    # experts chosen differently after rounding change a token's logits altogether
    share = 0.3 if "mo" in name or name in ("mixtral", "deepseek_v3") else 0.15
    assert (rounded - exact).norm(dim=-1).median() < share * exact.norm(dim=-1).median()


def test_two_builds_share_nothing() -> None:
    one, two = build("llama"), build("llama")
    pointers = {p.data_ptr() for p in one.parameters()}
    assert not pointers & {p.data_ptr() for p in two.parameters()}
    assert one.config is not two.config
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
