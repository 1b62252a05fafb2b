"""Which logits processors can be applied position by position.

At several positions at once, processors are applied to each position and the tokens that precede it. That is what stock
would do only for processors that look at nothing else, so those of transformers that do are listed; with any other a
call is decoded plainly.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers.generation import logits_process as stock

# look at the scores alone, so all positions go through them together
POINTWISE: frozenset[type] = frozenset(
    getattr(stock, name)
    for name in (
        "TemperatureLogitsWarper", "TopKLogitsWarper", "TopPLogitsWarper", "TopHLogitsWarper", "MinPLogitsWarper",
        "TypicalLogitsWarper", "EpsilonLogitsWarper", "EtaLogitsWarper", "SuppressTokensLogitsProcessor",
        "InfNanRemoveLogitsProcessor", "LogitNormalization",
    )
    if hasattr(stock, name)
)  # fmt: skip
# look at the row's own tokens, too
PREFIXWISE: frozenset[type] = frozenset(
    getattr(stock, name)
    for name in (
        "RepetitionPenaltyLogitsProcessor", "NoRepeatNGramLogitsProcessor", "NoBadWordsLogitsProcessor",
        "SequenceBiasLogitsProcessor", "MinLengthLogitsProcessor", "MinNewTokensLengthLogitsProcessor",
        "SuppressTokensAtBeginLogitsProcessor", "ForcedBOSTokenLogitsProcessor", "ForcedEOSTokenLogitsProcessor",
        "ExponentialDecayLengthPenalty", "WatermarkLogitsProcessor",
    )
    if hasattr(stock, name)
)  # fmt: skip


def processor_obstacle(processors: Any) -> str | None:
    """Return the processor that cannot be applied position by position, None if all can."""
    for processor in processors:
        if type(processor) not in POINTWISE | PREFIXWISE:
            return f"{type(processor).__name__} may look at more than the tokens of its row"
    return None


def are_pointwise(processors: Any) -> bool:
    """Return whether all positions can go through the processors together."""
    return all(type(processor) in POINTWISE for processor in processors)


def for_row(processors: Any, row: int) -> stock.LogitsProcessorList:
    """Return the processors as row `row` of the batch has them."""
    found = stock.LogitsProcessorList()
    for processor in processors:
        padding = getattr(processor, "prompt_ignore_length", None)
        if isinstance(padding, torch.Tensor):  # of every row; the repetition penalty is not for padding
            processor = copy.copy(processor)
            processor.prompt_ignore_length = padding[row : row + 1]
        found.append(processor)
    return found
