"""Forward passes over a cache whose rows may have different lengths.

A step feeds T tokens to every row, each at its own position, and `keep` says how many tokens of each row stay: one row
(or rows in step) by cropping, which every transformers cache understands; rows apart by `RaggedLayer`, with explicit
masks [B, 1, T, S]. Nothing is re-padded or moved. Cost beside the forward pass: the masks of rows apart, B T S bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import Cache
from transformers.cache_utils import DynamicLayer, QuantizedLayer

from hf_accel.core.calls.cache_layers import rows_apart_obstacle
from hf_accel.core.drift import CACHE

# attention back ends that take a mask [B, 1, T, S]: True is visible, or a summand
BOOLEAN_MASKS = frozenset({"sdpa", "hfaccel_grouped"})


def rollback_objection(cache: Any, is_batch: bool) -> str | None:
    """Return why steps over `cache` cannot be taken back, None if they can; the cache has seen the prompt."""
    if not isinstance(cache, Cache):
        return f"there is no cache to take steps back in ({type(cache).__name__})"
    if cache.offloading:
        return "the cache is offloaded by transformers"
    for layer in cache.layers:
        # quantized layers inherit `crop` and claim to be croppable, but drop only what is not quantized yet
        if not isinstance(layer, DynamicLayer) or isinstance(layer, QuantizedLayer) or not layer.is_croppable:
            return f"a {type(layer).__name__} of the cache cannot take steps back"
        if hasattr(layer, "update_indexer"):  # among equal scores, the best k are others in a matrix of another shape
            return f"keys of a {type(layer).__name__} are chosen otherwise in steps of several tokens"
        if is_batch and (reason := rows_apart_obstacle(layer)):
            return reason
    return None


@contextmanager
def recording(cache: Any) -> Iterator[None]:
    """Let the windows of `cache` keep their past for the block, so that steps can be taken back beyond them."""
    windows = [layer for layer in cache.layers if not getattr(layer, "record_past", True)]
    cache.activate_past_recording()
    try:
        yield
    finally:
        stop_recording(windows)


def stop_recording(layers: list[Any]) -> None:
    """Let windows forget again what they cannot see, as they do in a plain call."""
    for layer in layers:
        if getattr(layer, "record_past", False):
            if layer.is_initialized:
                layer.crop(0)
            layer.record_past = False


def apart_objection(model: Any) -> str | None:
    """Return why the masks of rows that are apart cannot be given to `model`, None if they can."""
    if any(buffer.dtype is torch.bool and buffer.dim() > 1 for buffer in model.buffers()):
        return "its attention has masks of its own"  # of the columns of the cache, whatever row they belong to
    config = model.config.get_text_config(decoder=True)
    if kinds := set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}:
        return f"it has layers of {', '.join(sorted(kinds))}"
    if model.config._attn_implementation not in BOOLEAN_MASKS | {"eager"}:
        return f"its attention is {model.config._attn_implementation}"
    return None


class Stepper:
    """One model over one cache, at known lengths of the rows.

    model: a causal language model. cache: it holds lengths[b] tokens of row b (padding included).
    mask: [B, T0] of the prompt, None where nothing is padded. positions: position of the next token of every row when
    it had `prompt_tokens` tokens, [B] on the model's device; None where the model is not told positions.
    layers: indices of the cache's layers that the model uses; None: all.
    """

    def __init__(
        self,
        model: Any,
        cache: Any,
        lengths: list[int],
        mask: torch.Tensor | None,
        positions: torch.Tensor | None,
        prompt_tokens: int,
        layers: list[int] | None = None,
    ) -> None:
        self.model, self.cache, self.lengths = model, cache, list(lengths)
        self.mask, self.positions, self.prompt_tokens = mask, positions, prompt_tokens
        self.layers = layers
        self.is_ragged = False
        self.has_windows = any(layer.is_sliding for layer in cache.layers)

    def beside(self, model: Any, layers: list[int] | None = None) -> Stepper:
        """Return a stepper of another model over the same cache, at the same lengths."""
        found = Stepper(model, self.cache, self.lengths, self.mask, self.positions, self.prompt_tokens, layers)
        found.is_ragged = self.is_ragged
        return found

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Return logits [B, T, V] for tokens [B, T] at the ends of the rows, which grow by T."""
        inputs: dict[str, Any] = {"input_ids": ids, "use_cache": True, "return_dict": True, CACHE: self.cache}
        tokens = ids.shape[1]
        if self.positions is not None:
            inputs["position_ids"] = self._positions(tokens)
        if self.is_ragged:
            inputs["attention_mask"] = self._ragged_masks(tokens)
        elif self.mask is not None:
            inputs["attention_mask"] = self._visible(self.lengths[0] + tokens)
        logits: torch.Tensor = self.model(**inputs).logits
        self.lengths = [length + tokens for length in self.lengths]
        return logits

    def _positions(self, tokens: int) -> torch.Tensor:
        """Return the positions [B, tokens] of the tokens at the ends of the rows."""
        starts: Any = self.positions
        if self.is_ragged:
            starts = starts + torch.tensor(self.lengths, device=starts.device) - self.prompt_tokens
        else:
            starts = starts + (self.lengths[0] - self.prompt_tokens)
        if tokens == 1:
            return starts[:, None]  # type: ignore[no-any-return]
        return starts[:, None] + torch.arange(tokens, device=starts.device)  # type: ignore[no-any-return]

    def keep(self, lengths: list[int]) -> None:
        """Let row b hold its first lengths[b] tokens only."""
        if lengths == self.lengths and not self.has_windows:
            return
        uniform = all(length == lengths[0] for length in lengths)
        if not uniform and not self.is_ragged:
            self.is_ragged = True
        self.lengths = list(lengths)
        for layer in self._layers():
            if self.is_ragged:
                layer.set_rows(self.lengths)
                continue
            surplus = layer.get_seq_length() - lengths[0]
            if surplus or layer.is_sliding:  # cropping nothing still ends the recording of a window's past
                layer.crop(-surplus)

    def _layers(self) -> list[Any]:
        found: list[Any] = self.cache.layers
        return found if self.layers is None else [found[index] for index in self.layers]

    def _visible(self, tokens: int) -> torch.Tensor:
        """Return the mask [B, tokens]: the prompt's, and every later token is visible."""
        mask: Any = self.mask
        if mask.shape[1] < tokens:  # grown in large steps, so that a step does not copy it
            ones = mask.new_ones((mask.shape[0], tokens + tokens // 2 + 64 - mask.shape[1]))
            self.mask = mask = torch.cat([mask, ones], dim=1)
        return mask[:, :tokens]  # type: ignore[no-any-return]

    def _ragged_masks(self, tokens: int) -> Any:
        """Return the mask of the only kind of layers, or of each kind as models with windows in some layers take it."""
        kinds = {bool(layer.is_sliding): layer for layer in self._layers()}
        masks = {
            "sliding_attention" if is_sliding else "full_attention": self._ragged_mask(layer, tokens)
            for is_sliding, layer in kinds.items()
        }
        return masks if len(masks) > 1 else next(iter(masks.values()))

    def _ragged_mask(self, layer: Any, tokens: int) -> torch.Tensor:
        device = self.model.device
        first, stop = layer.columns(tokens)
        columns = torch.arange(first, stop, device=device)
        lengths = torch.tensor(self.lengths, device=device)
        at = (lengths[:, None] + torch.arange(tokens, device=device))[:, :, None]  # [B, T, 1]
        mask = columns <= at
        if layer.is_sliding:
            mask &= columns > at - layer.sliding_window
        if self.mask is not None:
            mask &= self._visible(stop)[:, None, first:stop].bool()
        mask = mask[:, None]
        if self.model.config._attn_implementation in BOOLEAN_MASKS:
            return mask
        dtype = self.model.dtype
        return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min)
