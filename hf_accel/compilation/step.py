"""One step of T tokens over fixed buffers: a forward pass of which nothing depends on what only the host knows.

Inputs and results have fixed addresses, positions and tokens come in as tensors, masks are made on the device from its
own lengths, and the last thing a step does is to advance them. So what was captured once is right at every length.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from transformers import DynamicCache

from hf_accel.compilation.slots import Slot
from hf_accel.core.drift import CACHE
from hf_accel.core.model.back_ends import BACK_ENDS


class StepResults(NamedTuple):
    """logits: [B, T, V], as the model gives them. choices: int64 [B, T], their argmax in fp32."""

    logits: torch.Tensor
    choices: torch.Tensor


class StaticStep:
    """A model's step of `tokens` tokens over a slot.

    ids, positions: int64 [B, T], to be written before the step runs. layers: how many layers the cache has.
    """

    def __init__(self, model: Any, slot: Slot, tokens: int) -> None:
        self.model, self.slot, self.tokens = model, slot, tokens
        with torch.inference_mode(False):
            self.ids = torch.zeros((slot.rows, tokens), dtype=torch.int64, device=slot.device)
            self.positions = torch.zeros_like(self.ids)
            self.ahead = torch.arange(tokens, device=slot.device)
        self.follows: Any = None  # the layers of the cache that its latest replay has written to
        back_end = BACK_ENDS.get(model.config._attn_implementation)
        self._gives_handles = back_end is not None and back_end.reads_held
        self.cache: Any = DynamicCache()
        self.cache.layer_class_to_replicate = None
        self.cache.layers = [slot.layers[index] for index in sorted(slot.layers)]

    def run(self) -> StepResults:
        """Run the model on `ids`; the device's lengths are not advanced yet."""
        fill = self.slot.fill
        fill.begin(self.ahead)
        for layer in self.cache.layers:
            layer.gives_handles = self._gives_handles
        inputs = {"input_ids": self.ids, "position_ids": self.positions, "attention_mask": self._masks()}
        logits = self.model(**inputs, use_cache=True, return_dict=True, **{CACHE: self.cache}).logits
        return StepResults(logits, logits.float().argmax(dim=-1))

    def run_and_advance(self) -> StepResults:
        """Run the model, and let the device know of T more tokens; of one token, be ready for the one it chose."""
        results = self.run()
        self.slot.fill.lengths.add_(self.tokens)
        if self.tokens == 1:
            self.ids.copy_(results.choices)
            self.positions.add_(1)
        return results

    def _masks(self) -> Any:
        """Return the mask of the only kind of layers, or of each kind as models with windows in some layers take it."""
        kinds = {layer.is_sliding: layer for layer in self.cache.layers}
        names = {True: "sliding_attention", False: "full_attention"}
        masks = {names[is_sliding]: layer.visible(self.tokens) for is_sliding, layer in kinds.items()}
        return masks if len(masks) > 1 else next(iter(masks.values()))
