"""Where two generations of the same call part, and how close the decision was there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import PreTrainedModel


@dataclass(frozen=True)
class Difference:
    """The first token, by time, in which the patched model's text differs from the stock model's.

    `margin` is the distance of the two highest stock logits there; `rounding` is the spacing of the model's dtype at
    the highest of them. A margin of a few roundings is a tie that either order of summation may decide.
    """

    row: int
    new_token: int  # 0: the first generated token
    stock_id: int  # -1: the stock text ended here
    patched_id: int
    margin: float
    rounding: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"row {self.row}, new token {self.new_token + 1}: stock {self.stock_id}, patched {self.patched_id}; "
            f"the two best stock logits are {self.margin:.3g} apart, one rounding step there is {self.rounding:.3g}"
        )


def first_difference(stock: torch.Tensor, patched: torch.Tensor, prompt_tokens: int) -> tuple[int, int] | None:
    """Return (row, new token) of the earliest difference between ids [B, S], None if they are equal."""
    if torch.equal(stock, patched):
        return None
    shared = min(stock.shape[1], patched.shape[1])
    unequal = (stock[:, :shared] != patched[:, :shared]).any(dim=0).nonzero()
    if not len(unequal):  # one is the beginning of the other
        return 0, shared - prompt_tokens
    column = int(unequal[0])
    row = int((stock[:, column] != patched[:, column]).nonzero()[0])
    return row, column - prompt_tokens


def explain(
    model: PreTrainedModel, inputs: Mapping[str, Any], stock: torch.Tensor, patched: torch.Tensor, **arguments: Any
) -> Difference | None:
    """Return the first difference of two generations of `model`, with the stock logits there; None if equal.

    Args:
        model: in its original state; it generates up to the difference once more to have the logits of that step.
        inputs: the model inputs of both calls; `input_ids` [B, T].
        stock, patched: the ids [B, S] that were generated.
        arguments: the other arguments of both calls.
    """
    prompt_tokens = inputs["input_ids"].shape[1]
    place = first_difference(stock, patched, prompt_tokens)
    if place is None:
        return None
    row, token = place
    output: Any = model.generate(  # type: ignore[operator]
        **inputs, **(arguments | {"max_new_tokens": token + 1, "min_new_tokens": token + 1}),
        output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    best = output.logits[token][row].float().topk(2).values
    column = prompt_tokens + token
    stock_id, patched_id = (int(ids[row, column]) if column < ids.shape[1] else -1 for ids in (stock, patched))
    rounding = torch.finfo(model.dtype).eps * float(best[0].abs())
    return Difference(row, token, stock_id, patched_id, float(best[0] - best[1]), rounding)
