"""The trained demo model writes the same text: in fp32 token for token, in bf16 up to near-ties that are shown."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from catalogue import exact
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_accel
from hf_accel.assets import demo_path

PROMPTS = [
    "def fibonacci(n):\n",
    "class Stack:\n    def __init__(self):\n",
    "import os\nimport sys\n\n\ndef main(argv):\n",
    "for line in file:\n    if not line.strip():\n",
    '"""Return the',
    "    def __repr__(self):\n        return",
]
NEW_TOKENS = 200
# bf16 keeps 8 significant bits: logits of size up to 32 have steps of 2^-3, and two roundings can meet at a tie
NEAR_TIE = 0.25


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(demo_path(), local_files_only=True)


def load(dtype: torch.dtype) -> Any:
    return AutoModelForCausalLM.from_pretrained(demo_path(), dtype=dtype, local_files_only=True).eval()


def write(model: Any, tokenizer: Any, text: str) -> torch.Tensor:
    inputs = tokenizer(text, return_tensors="pt")
    ids = inputs["input_ids"]
    return model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0
    )


@pytest.mark.parametrize("text", PROMPTS)
def test_same_text_in_single_precision(text: str, tokenizer: Any) -> None:
    model = load(torch.float32)
    expected = write(model, tokenizer, text)
    assert expected.shape[1] > 60, "the model stopped at once, so little is compared"
    assert expected.unique().numel() > 15
    hf_accel.optimize(model, exact(model))
    assert torch.equal(write(model, tokenizer, text), expected)
    assert hf_accel.report(model).to_dict()["calls"]["served"] == 1
    hf_accel.restore(model)
    assert torch.equal(write(model, tokenizer, text), expected)


def test_padded_batch_in_single_precision(tokenizer: Any) -> None:
    model = load(torch.float32)
    tokenizer.padding_side = "left"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    batch = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    batch = {name: batch[name] for name in ("input_ids", "attention_mask")}
    expected = model.generate(**batch, max_new_tokens=60, do_sample=False, pad_token_id=0)
    hf_accel.optimize(model, exact(model))
    assert torch.equal(model.generate(**batch, max_new_tokens=60, do_sample=False, pad_token_id=0), expected)


@pytest.mark.parametrize("text", PROMPTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_differences_in_half_precision_are_near_ties(text: str, dtype: torch.dtype, tokenizer: Any) -> None:
    model = load(dtype)
    expected = write(model, tokenizer, text)
    hf_accel.optimize(model, exact(model))
    found = write(model, tokenizer, text)
    hf_accel.restore(model)
    if torch.equal(found, expected):
        return
    common = min(found.shape[1], expected.shape[1])
    first = int((found[0, :common] != expected[0, :common]).nonzero()[0])
    with torch.no_grad():
        logits = model(expected[:, :first]).logits[0, -1].float()
    chosen, other = logits[expected[0, first]], logits[found[0, first]]
    top = logits.topk(2).values
    margin = float(top[0] - top[1])
    message = f"token {first}: stock {float(chosen):.3f}, ours {float(other):.3f}, stock's margin {margin:.3f}"
    assert float(top[0] - other) <= NEAR_TIE, message


def test_the_goal_exact_keeps_the_text(tokenizer: Any) -> None:
    """The whole way: planned by timing, verified on text, the same words."""
    model = load(torch.float32)
    expected = write(model, tokenizer, PROMPTS[0])
    hf_accel.optimize(model, verify_on=tokenizer(PROMPTS[1], return_tensors="pt")["input_ids"])
    assert torch.equal(write(model, tokenizer, PROMPTS[0]), expected)
