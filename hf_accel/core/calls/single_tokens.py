"""The forward passes of plain decoding: one token for every row, with the inputs that stock would give."""

from __future__ import annotations

from typing import Any

import torch

from hf_accel.core.calls.cache_rows import cache_rows_stay, keep_rows
from hf_accel.core.calls.forward import runner_of
from hf_accel.core.calls.inputs import LeanInputs, StockInputs
from hf_accel.core.calls.present import Present


class SingleTokens:
    """One token per row and pass, with whatever inputs the model takes."""

    def __init__(
        self,
        model: Any,
        model_kwargs: dict[str, Any],
        outputs: Any,
        batch: int,
        is_first: bool = True,
    ) -> None:
        """Begin with the outputs of the prompt, from which the first tokens are chosen, or of a later pass."""
        self.present = Present(batch, model.device)
        is_lean = LeanInputs.fit(model, model_kwargs, outputs)
        self._inputs = LeanInputs(model_kwargs) if is_lean else StockInputs(model, model_kwargs)
        self._run, self._outputs, self._device = runner_of(model), outputs, model.device
        self._is_first, self._followed = is_first, 0
        self._follow = getattr(self._run, "follow", None) if is_lean else None

    def follow(self) -> torch.Tensor | None:
        """Return the tokens [B] that follow greedily on those chosen greedily in the latest pass, after another pass.

        None where whoever runs the passes cannot go on by itself.
        """
        if self._is_first or self._follow is None:
            return None
        choices: torch.Tensor | None = self._follow(self._inputs.cache)
        if choices is None:
            return None
        self._outputs = None
        self._followed += 1
        return choices[:, 0]

    def next(self, input_ids: torch.Tensor) -> Any:
        """Return the outputs that the next token of every row is chosen from; `input_ids` is all so far, [B, S].

        They have the rows of `present`, and no others.
        """
        if not self._is_first:
            self._catch_up()
            inputs = self._inputs.next(self._outputs, self.present.taken(input_ids))
            self.present.count_pass()
            self._outputs = None  # the logits of the prompt can be large
            self._outputs = self._run(**inputs, return_dict=True)
        self._is_first = False
        return self._outputs

    def close(self) -> Any:
        """Return the cache that stock would return after the last pass."""
        self._catch_up()
        self._inputs.absorb(self._outputs)
        return self._inputs.cache

    def rows_stay(self, rows: int) -> str | None:
        """Return why rows that have ended stay while `rows` go on, None if they can leave."""
        return self._inputs.rows_stay() or cache_rows_stay(self._inputs.cache, rows)

    def leave(self, slots: list[int], *, gives_back: bool) -> int:
        """Let those rows leave that no slot names, see `Present.slots_without`; return the bytes freed."""
        self._catch_up()
        self._inputs.keep_rows(torch.tensor(slots, device=self._device), len(self.present.order))
        cache = self._inputs.cache
        freed = 0 if cache is None else keep_rows(cache.layers, slots, self._device, gives_back=gives_back)
        self.present.leave(slots)
        return freed

    def _catch_up(self) -> None:
        """Let the inputs grow by the tokens that were taken in meanwhile."""
        if self._followed:
            self._inputs.absorb(None, self._followed)  # type: ignore[call-arg]
            self._followed = 0
