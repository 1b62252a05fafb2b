"""The random draws of sampling, by new-token index, so that verifying several tokens makes the draws of plain decoding.

`torch.multinomial(p, 1)` is an exponential race: it fills a tensor like p with exponentials and takes the argmax of p
over them. Stock draws one such block [B, V] per new token; here block t is made when first asked for, in order, and a
row at its t-th token uses its line of block t. So tokens are those of plain decoding with the same seed, and the
generator is left where plain decoding would leave it. Memory: the blocks from the slowest row's token on, B V floats
each, 64 MB at most; beyond that a block is drawn again from the generator's state, of which 5 KB per block are kept.
"""

from __future__ import annotations

import torch

from hf_accel.core.calls.seeding import generator_on

BLOCK_BYTES = 64 * 2**20


class Draws:
    """The blocks of exponentials [B, V] of one call, on one device, from block `first` on."""

    def __init__(self, batch: int, vocabulary: int, device: torch.device, first: int = 0) -> None:
        self._shape, self._device = (batch, vocabulary), device
        self._states = {first: random_state(self._device)}  # before each block
        self._next = first
        self._blocks: dict[int, torch.Tensor] = {}
        self._kept = max(4, BLOCK_BYTES // (4 * batch * vocabulary))

    def block(self, index: int) -> torch.Tensor:
        """Return block `index`, [B, V]."""
        self._reach(index)
        block = self._blocks.get(index)
        if block is None:
            now = random_state(self._device)
            set_random_state(self._states[index], self._device)
            block = self._draw(index)
            set_random_state(now, self._device)
        return block

    def rows(self, starts: list[int], tokens: int) -> torch.Tensor:
        """Return for each row b the lines of blocks starts[b].., [B, tokens, V]."""
        if len(starts) == tokens == 1:
            return self.block(starts[0])[None]
        lines = [torch.stack([self.block(start + t)[row] for t in range(tokens)]) for row, start in enumerate(starts)]
        return torch.stack(lines)

    def finish(self, blocks: int) -> None:
        """Leave the generator as it is after all blocks before block `blocks`."""
        self._reach(blocks)
        set_random_state(self._states[blocks], self._device)

    def _reach(self, index: int) -> None:
        """Draw blocks until the generator's state before block `index` is known."""
        if self._next < index:
            set_random_state(self._states[self._next], self._device)
        while self._next < index:
            self._draw(self._next)

    def forget(self, before: int) -> None:
        """Give up all blocks below `before`: every row is beyond them."""
        for index in [index for index in self._states if index < before]:
            del self._states[index]
            self._blocks.pop(index, None)

    def _draw(self, index: int) -> torch.Tensor:
        """Draw block `index` and keep it, unless later ones fill the memory."""
        block = self._blocks[index] = torch.empty(self._shape, device=self._device).exponential_(
            1, generator=generator_on(self._device)
        )
        if self._next == index:
            self._next += 1
            self._states[self._next] = random_state(self._device)
        while len(self._blocks) > self._kept:
            del self._blocks[min(self._blocks)]
        return block


def random_state(device: torch.device) -> torch.Tensor:
    """Return the state of the generator that the call draws from on `device`; the device is not waited for."""
    if (own := generator_on(device)) is not None:
        return own.get_state()
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def set_random_state(state: torch.Tensor, device: torch.device) -> None:
    """Let the generator that the call draws from on `device` go on from a state."""
    if (own := generator_on(device)) is not None:
        own.set_state(state)
    elif device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)
