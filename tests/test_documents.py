"""What users hold as calibration text, in every form, comes out as the same rows; padding is in none of them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy
import pytest
import torch
from models import VOCABULARY, build, prompt
from texts import tokenizer
from torch import Tensor
from transformers import BatchEncoding

import hf_accel
from hf_accel import ConfigError, WeightOnlyConfig
from hf_accel.core.model.anatomy import Anatomy
from hf_accel.measure import text
from hf_accel.measure.text import calibration_text
from hf_accel.quantization.observing import observe
from hf_accel.quantization.targets import targets

TEXTS = ["abacadae" * 30, "bcbdbebf" * 7, "cdcecf" * 21]
LENGTHS = (12, 5, 30, 1)
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


class Table:
    """What `datasets.Dataset` offers of itself to those who only read it: rows by index, no more."""

    def __init__(self, **columns: list[Any]) -> None:
        self.columns = columns

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {name: column[index] for name, column in self.columns.items()}


class Stream:
    """A data set that can be read one row after the other only."""

    def __init__(self, **columns: list[Any]) -> None:
        self.table = Table(**columns)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self.table[index] for index in range(len(self.table)))


def rows() -> list[Tensor]:
    return [prompt(1, length, seed=length)[0] for length in LENGTHS]


def padded(side: str) -> dict[str, Tensor]:
    """Return rows as a tokenizer pads them, with ids in the padding that are real tokens elsewhere."""
    ids, mask = torch.full((len(LENGTHS), max(LENGTHS)), 9), torch.zeros(len(LENGTHS), max(LENGTHS), dtype=torch.long)
    for index, row in enumerate(rows()):
        place = slice(-len(row), None) if side == "left" else slice(0, len(row))
        ids[index, place], mask[index, place] = row, 1
    return {"input_ids": ids, "attention_mask": mask}


FORMS: dict[str, Callable[[], Any]] = {
    "a list of lists": lambda: [row.tolist() for row in rows()],
    "a list of tensors": rows,
    "a list of arrays": lambda: [row.numpy() for row in rows()],
    "numbers of numpy": lambda: [list(row.numpy()) for row in rows()],
    "a generator": lambda: (row for row in rows()),
    "padded on the left": lambda: padded("left"),
    "padded on the right": lambda: padded("right"),
    "a tokenizer's output": lambda: BatchEncoding(padded("left")),
    "lists with a mask": lambda: {name: value.tolist() for name, value in padded("left").items()},
    "a mask of truth values": lambda: padded("right") | {"attention_mask": padded("right")["attention_mask"].bool()},
    "lists of several lengths": lambda: {"input_ids": [row.tolist() for row in rows()]},
    "one output for each": lambda: [{"input_ids": row[None]} for row in rows()],
    "a table": lambda: Table(input_ids=[row.tolist() for row in rows()]),
    "a padded table": lambda: Table(**{name: value.tolist() for name, value in padded("left").items()}),
    "a stream with other columns": lambda: Stream(input_ids=rows(), label=[None] * len(LENGTHS)),
}


@pytest.mark.parametrize("form", FORMS)
def test_rows_of_several_lengths_in_any_form(form: str) -> None:
    found = calibration_text(build("llama"), FORMS[form](), row_tokens=11)
    joined = torch.cat(rows())
    assert found.ids.dtype == torch.int64
    assert torch.equal(found.ids, joined[: len(joined) // 11 * 11].view(-1, 11))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_in_no_moment(side: str) -> None:
    model = build("llama")
    products = targets(Anatomy.of(model), WeightOnlyConfig())[0]
    found = observe(model, calibration_text(model, padded(side)), products).moments
    plain = observe(model, calibration_text(model, torch.cat(rows())), products).moments
    for path, moment in plain.items():
        assert found[path].count == moment.count == sum(LENGTHS)
        assert torch.equal(found[path].total, moment.total), path


def messages(words: str) -> list[dict[str, str]]:
    half = len(words) // 4 * 2
    return [{"role": "user", "content": words[:half]}, {"role": "assistant", "content": words[half:]}]


WORDS: dict[str, Callable[[], Any]] = {
    "texts": lambda: TEXTS,
    "a generator": lambda: iter(TEXTS),
    "columns": lambda: {"text": TEXTS},
    "an array's list": lambda: numpy.array(TEXTS).tolist(),
    "a table": lambda: Table(text=TEXTS, id=[1, 2, 3]),
    "a stream": lambda: Stream(text=TEXTS),
    "conversations": lambda: [messages(words) for words in TEXTS],
    "a table of conversations": lambda: Table(messages=[messages(words) for words in TEXTS]),
    "columns of conversations": lambda: {"messages": [messages(words) for words in TEXTS]},
}


@pytest.mark.parametrize("form", WORDS)
def test_texts_in_any_form(form: str) -> None:
    words = tokenizer()
    words.chat_template = TEMPLATE
    try:
        found = calibration_text(build("llama"), WORDS[form](), words, row_tokens=20)
    finally:
        words.chat_template = None
    joined = torch.tensor(words("".join(TEXTS))["input_ids"])
    assert torch.equal(found.ids, joined[: len(joined) // 20 * 20].view(-1, 20))


def test_rows_longer_than_the_model_can_read_are_cut_and_not_lost() -> None:
    ids = prompt(2, 1100)
    assert torch.equal(calibration_text(build("llama"), ids).ids, ids[:, :1024].reshape(4, 512))


def test_a_text_without_an_end_is_read_up_to_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "MOST_TOKENS", 100)
    found = calibration_text(build("llama"), itertools.repeat([3, 4, 5]), row_tokens=10)
    assert found.ids.shape == (10, 10)
    assert found.source == "the first 100 tokens of the text given"
    assert calibration_text(build("llama"), [[3] * 50] * 2).source == "the text given"


def test_messages_without_a_template() -> None:
    with pytest.raises(ConfigError, match=r"could not be made a text.*chat template, or texts"):
        calibration_text(build("llama"), messages(TEXTS[0]), tokenizer())


def test_a_tokenizer_of_another_model() -> None:
    model, words = build("llama"), tokenizer()
    model.config.vocab_size = 100
    with pytest.raises(ConfigError, match="128 tokens, and the model's vocabulary has 100: it is another model's"):
        calibration_text(model, TEXTS, words)
    model.config.vocab_size = VOCABULARY
    words.add_special_tokens({"additional_special_tokens": ["<extra>"]})  # as users do who need one for padding
    try:
        assert len(words) > VOCABULARY
        assert calibration_text(model, TEXTS, words).ids.numel()
        with pytest.raises(ConfigError, match="outside the model's vocabulary of 128: 128"):
            calibration_text(model, "ab<extra>ac", words)
    finally:
        tokenizer.cache_clear()


def test_a_text_that_the_model_predicts_worse_than_chance_is_told() -> None:
    model = build("llama")  # its weights are random and large
    config = WeightOnlyConfig(bits=8)
    hf_accel.optimize(model, config, calibration=prompt(2, 40))
    quality = hf_accel.report(model).quality
    assert quality.perplexity_before > VOCABULARY
    assert "worse than chance" in quality.note
    assert quality.note in str(hf_accel.report(model))
    hf_accel.restore(model)
    likely = model.generate(prompt(2, 2), do_sample=False, max_new_tokens=40)
    hf_accel.optimize(model, config, calibration=likely)
    quality = hf_accel.report(model).quality
    assert quality.perplexity_before < VOCABULARY
    assert not quality.note
