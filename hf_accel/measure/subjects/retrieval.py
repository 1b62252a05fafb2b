"""How much of a model's retrieval survives a change: a needle in a haystack, asked for at the end, by depth.

Needle in a haystack: Kamradt 2023 (github.com/gkamradt/LLMTest_NeedleInAHaystack). Several needles of which one is
asked for: RULER, Hsieh et al. 2024 (arXiv:2404.06654), the multi-key task. Answers are decoded greedily and must match
exactly. Cost: one `generate` of a few tokens for each batch of tasks.

`retrieval_model` is a trained model small enough for tests. Its language has no text: a needle is a key and four
values, a question is `ASK` and a key, everything else is filler. No value occurs twice in a prompt.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_accel.assets import retrieval_path
from hf_accel.errors import ConfigError

PAD, START, ASK = 0, 1, 2
KEYS, VALUES, FILLER = range(4, 36), range(36, 100), range(100, 128)
VOCABULARY, VALUES_PER_KEY, MAX_NEEDLES, MAX_TOKENS = 128, 4, 16, 1024
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Task:
    """Token ids in, token ids expected; `depth` is the needle's place, 0 (the start) to 1 (before the question)."""

    prompt: tuple[int, ...]
    expected: tuple[int, ...]
    depth: float


@dataclass(frozen=True)
class Retrieval:
    """How many answers were right, and of how many, at each depth."""

    right: dict[float, int]
    asked: dict[float, int]

    @property
    def accuracy(self) -> float:
        return sum(self.right.values()) / sum(self.asked.values())

    def at(self, depth: float) -> float:
        """Return the share of right answers at a depth."""
        return self.right[depth] / self.asked[depth]

    def to_dict(self) -> dict[str, Any]:
        depths = [{"depth": depth, "right": self.right[depth], "asked": self.asked[depth]} for depth in self.asked]
        return {"accuracy": self.accuracy, "depths": depths}

    def __str__(self) -> str:
        places = ", ".join(f"{100 * self.at(depth):.0f} % at depth {depth:.2f}" for depth in self.asked)
        return f"{100 * self.accuracy:.1f} % of {sum(self.asked.values())} needles retrieved: {places}"


def measure_retrieval(model: Any, tasks: Sequence[Task], batch_size: int = 8, **kwargs: Any) -> Retrieval:
    """Return how many tasks the model answers exactly, decoding greedily with `model.generate`.

    Tasks of different lengths in one batch are padded on the left. What the model writes after an answer is ignored.

    Args:
        model: anything with `generate`, as a transformers model, stock or changed.
        tasks: at least one.
        batch_size: prompts in one call.
        kwargs: further arguments of `generate`, the same for every call.

    Raises:
        ConfigError: no tasks, an empty prompt or answer, or a batch size below 1.
    """
    if not tasks or batch_size < 1:
        raise ConfigError(f"retrieval needs tasks and a batch size of at least 1: {len(tasks)} tasks, {batch_size}")
    if any(not task.prompt or not task.expected for task in tasks):
        raise ConfigError("a retrieval task has an empty prompt or an empty answer")
    depths = sorted({task.depth for task in tasks})
    right, asked = dict.fromkeys(depths, 0), dict.fromkeys(depths, 0)
    for first in range(0, len(tasks), batch_size):
        batch = tasks[first : first + batch_size]
        for task, answer in zip(batch, _answers(model, batch, kwargs), strict=True):
            asked[task.depth] += 1
            right[task.depth] += tuple(answer[: len(task.expected)]) == task.expected
    return Retrieval(right, asked)


def _answers(model: Any, batch: Sequence[Task], kwargs: dict[str, Any]) -> list[list[int]]:
    length = max(len(task.prompt) for task in batch)
    pads = [length - len(task.prompt) for task in batch]
    device = getattr(model, "device", "cpu")
    ids = torch.tensor([[PAD] * pad + list(task.prompt) for pad, task in zip(pads, batch)], device=device)  # [B, T]
    mask = torch.tensor([[0] * pad + [1] * (length - pad) for pad in pads], device=device)
    arguments: dict[str, Any] = {"do_sample": False, "num_beams": 1, "pad_token_id": PAD}
    arguments["max_new_tokens"] = max(len(task.expected) for task in batch)
    with torch.no_grad():
        found = model.generate(input_ids=ids, attention_mask=mask, **{**arguments, **kwargs})
    sequences: Tensor = found if isinstance(found, Tensor) else found.sequences
    return sequences[:, length:].tolist()


def insert_needle(
    haystack: Sequence[int],
    needle: Sequence[int],
    question: Sequence[int],
    expected: Sequence[int],
    depth: float,
    start: Sequence[int] = (),
) -> Task:
    """Return the task `start`, haystack with the needle in it, question: token ids of any tokenizer.

    Args:
        haystack: as long as it should be; the needle is put in, nothing is cut.
        needle: the statement that has the answer.
        question: what the answer continues.
        expected: the answer.
        depth: 0 (before the haystack) to 1 (after it).
        start: as the token that begins a text.

    Raises:
        ConfigError: a depth outside of 0 to 1.
    """
    if not 0 <= depth <= 1:
        raise ConfigError(f"a depth is 0 to 1, not {depth}")
    place = round(depth * len(haystack))
    prompt = (*start, *haystack[:place], *needle, *haystack[place:], *question)
    return Task(tuple(prompt), tuple(expected), depth)


def text_task(
    tokenizer: Any, haystack: str, needle: str, question: str, answer: str, tokens: int, depth: float
) -> Task:
    """Return a task of text, of `tokens` prompt tokens; the haystack is repeated or cut to fit.

    The needle should contain question and answer as they stand, as "\\nThe code is 4821.\\n", "\\nThe code is" and
    " 4821": the question's tokens must be the first of those of question and answer together.

    Raises:
        ConfigError: too few tokens for needle and question, an empty haystack, a question whose last token would join
            the answer, or a depth outside of 0 to 1.
    """

    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    whole, asked, stated, hay = ids(question + answer), ids(question), ids(needle), ids(haystack)
    if whole[: len(asked)] != asked or len(whole) == len(asked):
        raise ConfigError(f"{question!r} and {answer!r} share a token; begin the answer with the space before it")
    with_special = list(tokenizer(needle)["input_ids"])
    start = with_special[:1] if with_special[:1] == [tokenizer.bos_token_id] and stated[:1] != with_special[:1] else []
    room = tokens - len(start) - len(stated) - len(asked)
    if room < 0 or not hay:
        raise ConfigError(f"{tokens} tokens do not hold needle and question, or the haystack is empty")
    hay = (hay * (room // len(hay) + 1))[:room]
    return insert_needle(hay, stated, asked, whole[len(asked) :], depth, start)


def retrieval_tasks(
    tokens: int = 512, depths: Sequence[float] = DEPTHS, repeats: int = 8, needles: int = 8, seed: int = 0
) -> list[Task]:
    """Return tasks in the language of `retrieval_model`, `repeats` for each depth; one of the needles is asked for.

    Args:
        tokens: of each prompt, to 1,024, for which the model was trained.
        depths: 0 to 1; the needle is put there up to 4 tokens, not to split another.
        repeats: at each depth.
        needles: 1 to 16, the others at random.
        seed: of everything random.

    Raises:
        ConfigError: a value out of these bounds, or too few tokens for the needles.
    """
    size = 1 + VALUES_PER_KEY
    shortest = 3 + needles * size
    if not 1 <= needles <= MAX_NEEDLES:
        raise ConfigError(f"needles must be 1 to {MAX_NEEDLES}, not {needles}")
    if not shortest <= tokens <= MAX_TOKENS:
        raise ConfigError(f"{needles} needles need {shortest} to {MAX_TOKENS} tokens, not {tokens}")
    if any(not 0 <= depth <= 1 for depth in depths):
        raise ConfigError(f"depths are 0 to 1, not {list(depths)}")
    dice = random.Random(seed)
    return [_needle_task(dice, tokens - shortest, depth, needles) for depth in depths for _ in range(repeats)]


def _needle_task(dice: random.Random, filler: int, depth: float, needles: int) -> Task:
    values = dice.sample(VALUES, needles * VALUES_PER_KEY)
    found = [
        (key, *values[i * VALUES_PER_KEY : (i + 1) * VALUES_PER_KEY])
        for i, key in enumerate(dice.sample(KEYS, needles))
    ]
    asked, others = found[0], found[1:]
    pieces: list[tuple[int, ...]] = [(dice.choice(FILLER),) for _ in range(filler)] + others
    dice.shuffle(pieces)
    target, place, count = depth * sum(map(len, pieces)), 0, 0
    while place < len(pieces) and count + len(pieces[place]) / 2 <= target:
        count += len(pieces[place])
        place += 1
    body = [token for piece in (*pieces[:place], asked, *pieces[place:]) for token in piece]
    return Task((START, *body, ASK, asked[0]), asked[1:], depth)


def retrieval_model(dtype: torch.dtype = torch.float32) -> Any:
    """Return the embedded model that retrieves: a Llama of two layers, trained by examples/train_retrieval_model.py."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(retrieval_path(), dtype=dtype, local_files_only=True).eval()
