"""Where the rows of a call end, and where the steps of several tokens have to."""

from __future__ import annotations

from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

from hf_accel.core.calls.call import Call
from hf_accel.core.calls.following import following_positions
from hf_accel.core.calls.rows import Rows


class Ends:
    """Where rows end for certain: after an end-of-text token, and at the maximal length; and where steps have to."""

    def __init__(self, call: Call) -> None:
        self.maximum = int(call.generation_config.max_length)
        self.eos: set[int] = set()
        for criterion in call.stopping_criteria:
            if type(criterion) is MaxLengthCriteria:
                self.maximum = min(self.maximum, criterion.max_length)
            elif type(criterion) is EosTokenCriteria:
                self.eos |= set(criterion.eos_token_id.flatten().tolist())
        config = call.model.config.get_text_config(decoder=True)
        self.positions = int(getattr(config, "max_position_embeddings", None) or self.maximum)
        following = following_positions(call.model_kwargs, len(call.input_ids))
        prompt_tokens = call.input_ids.shape[1]
        # of the last token of a row, which its next step begins with, beyond the row's length
        offsets = None if following is None else following.view(-1, len(call.input_ids)).amax(dim=0) - prompt_tokens
        self._offsets = [0] * len(call.input_ids) if offsets is None else offsets.tolist()
        self._rope = call.rope

    def room(self, rows: Rows, row: int) -> int:
        """Return how many tokens a step may feed to the row without looking beyond the maximal length or context.

        Nor does it pass where rotary frequencies change: all of its tokens would have those of the last.
        """
        length = rows.lengths[row]
        room = min(self.maximum, self.positions) - length
        steady = self._rope.room(length - 1 + self._offsets[row]) if self._rope is not None else None
        return room if steady is None else min(room, steady)

    def cut(self, rows: Rows, row: int, tokens: list[int]) -> list[int]:
        """Return the tokens up to where the row ends, and note that it does."""
        tokens = tokens[: max(1, self.maximum - rows.lengths[row])]
        end = next((t for t, token in enumerate(tokens) if token in self.eos), None)
        if end is not None:
            tokens = tokens[: end + 1]
        rows.ended[row] = end is not None or rows.lengths[row] + len(tokens) >= self.maximum
        return tokens
