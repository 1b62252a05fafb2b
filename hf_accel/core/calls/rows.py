"""The tokens of a batch whose rows advance at different speeds."""

from __future__ import annotations

from typing import Any

import torch

from hf_accel.core.model.back_ends import masks_of


class Rows:
    """Prompt and new tokens of every row, as a tensor for models and as lists for everything that looks back.

    ids: [B, capacity], what is valid of row b is ids[b, : lengths[b]].
    texts: per row the token ids that are not padding.
    ended: whether a row is known to take no further tokens.
    """

    def __init__(self, prompt: torch.Tensor, mask: torch.Tensor | None, capacity: int) -> None:
        batch, self.prompt_tokens = prompt.shape
        self.ids = prompt.new_zeros((batch, max(capacity, self.prompt_tokens + 1)))
        self.ids[:, : self.prompt_tokens] = prompt
        self.lengths = [self.prompt_tokens] * batch
        self.ended = [False] * batch
        listed: list[list[int]] = prompt.tolist()
        if mask is not None:
            kept: list[list[int]] = mask.tolist()
            listed = [[t for t, k in zip(row, keep, strict=True) if k] for row, keep in zip(listed, kept, strict=True)]
        self.texts = listed

    def __len__(self) -> int:
        return len(self.lengths)

    def add(self, row: int, tokens: list[int]) -> None:
        """Append `tokens` to a row."""
        if not tokens:
            return
        length = self.lengths[row]
        stop = length + len(tokens)
        if stop > self.ids.shape[1]:
            self.ids = torch.cat([self.ids, torch.zeros_like(self.ids)], dim=1)
        if len(tokens) == 1:  # no tensor needs to be made for one
            self.ids[row, length] = tokens[0]
        else:
            self.ids[row, length:stop] = torch.tensor(tokens, dtype=self.ids.dtype)
        self.lengths[row] = stop
        self.texts[row].extend(tokens)

    def new_tokens(self, row: int) -> int:
        """Return how many tokens the row has beyond the prompt."""
        return self.lengths[row] - self.prompt_tokens

    def last(self) -> torch.Tensor:
        """Return the last token of every row, [B, 1]."""
        if len(self.lengths) == 1:
            return self.ids[:, self.lengths[0] - 1 : self.lengths[0]]
        ends: Any = torch.tensor(self.lengths, device=self.ids.device) - 1
        return self.ids.gather(1, ends[:, None])

    def align_ended(self, lengths: list[int]) -> list[int]:
        """Return lengths in a cache of all rows, with rows that have ended at the least length of the others.

        Such rows take part in further steps, but their tokens are not used: so they need not be apart from the others.
        """
        live = [lengths[row] for row in self.live()]
        if not live:
            return lengths
        least = min(live)
        return [least if ended else length for length, ended in zip(lengths, self.ended, strict=True)]

    def live(self) -> list[int]:
        """Return the rows that have not ended."""
        return [row for row, ended in enumerate(self.ended) if not ended]


def apart_obstacle(model: Any) -> str | None:
    """Return why the masks of rows that are apart cannot be given to `model`, None if they can."""
    if any(buffer.dtype is torch.bool and buffer.dim() > 1 for buffer in model.buffers()):
        return "its attention has masks of its own"  # of the columns of the cache, whatever row they belong to
    config = model.config.get_text_config(decoder=True)
    if kinds := set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}:
        return f"it has layers of {', '.join(sorted(kinds))}"
    if masks_of(model.config._attn_implementation) is None:
        return f"its attention is {model.config._attn_implementation}"
    return None
