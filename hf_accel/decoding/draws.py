"""The random draws of sampling, by new-token index, so that verifying several tokens makes the draws of plain decoding.

`torch.multinomial(p, 1)` is an exponential race: it fills a tensor like p with exponentials and takes the argmax of p
over them. Stock draws one such block [B, V] per new token; here block t is made when first asked for, in order, and a
row at its t-th token uses its line of block t. So tokens are those of plain decoding with the same seed, and the
generator is left where plain decoding would leave it. Memory: the blocks in use, B V floats each, 64 MB at most;
beyond that a block is drawn again from the generator's state, of which 5 KB per block are kept.
"""

from __future__ import annotations

import torch

BLOCK_BYTES = 64 * 2**20


class Draws:
    """The blocks of exponentials [B, V] of one call, on one device."""

    def __init__(self, batch: int, vocabulary: int, device: torch.device) -> None:
        self._shape, self._device = (batch, vocabulary), device
        self._states = [self._state()]
        self._blocks: dict[int, torch.Tensor] = {}
        self._kept = max(4, BLOCK_BYTES // (4 * batch * vocabulary))

    def block(self, index: int) -> torch.Tensor:
        """Return block `index`, [B, V]."""
        self._reach(index)
        if index not in self._blocks:
            now = self._state()
            self._set_state(self._states[index])
            self._draw(index)
            self._set_state(now)
        return self._blocks[index]

    def rows(self, starts: list[int], tokens: int) -> torch.Tensor:
        """Return for each row b the lines of blocks starts[b].., [B, tokens, V]."""
        lines = [torch.stack([self.block(start + t)[row] for t in range(tokens)]) for row, start in enumerate(starts)]
        return torch.stack(lines)

    def finish(self, blocks: int) -> None:
        """Leave the generator as it is after the first `blocks` blocks."""
        self._reach(blocks)
        self._set_state(self._states[blocks])

    def _reach(self, index: int) -> None:
        """Draw blocks until the generator's state before block `index` is known."""
        while len(self._states) <= index:
            self._draw(len(self._states) - 1)

    def _draw(self, index: int) -> None:
        self._blocks[index] = torch.empty(self._shape, device=self._device).exponential_(1)
        if len(self._states) == index + 1:
            self._states.append(self._state())
        while len(self._blocks) > self._kept:
            del self._blocks[min(self._blocks)]

    def _state(self) -> torch.Tensor:
        if self._device.type == "cuda":
            return torch.cuda.get_rng_state(self._device)
        return torch.get_rng_state()

    def _set_state(self, state: torch.Tensor) -> None:
        if self._device.type == "cuda":
            torch.cuda.set_rng_state(state, self._device)
        else:
            torch.set_rng_state(state)
