"""Forward passes after the prompt: the only place that calls a model there, be it to decode, to verify or to draft.

Plain decoding feeds one token to every row, see `single_tokens`. `Stepper` feeds T tokens to every row of a cache, each
at its own position, and `keep` says how many tokens of each row stay: one row (or rows in step) by cropping, which
every transformers cache understands; rows apart by `RaggedLayer`, with explicit masks [B, 1, T, S]; recurrent states by
a copy, which then read again what stays. Nothing is re-padded, and moved only where rows that have ended leave, see
`present`. Cost beside the forward pass: the masks of rows apart, B T S bytes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import DynamicLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

from hf_accel.core.calls.cache_rows import cache_rows_stay, keep_rows
from hf_accel.core.calls.doors import Door
from hf_accel.core.calls.hosting import host_of
from hf_accel.core.calls.present import Present
from hf_accel.core.calls.recurrent import EMPTY, Recall, RecurrentStates, crop_attention
from hf_accel.core.drift import CACHE
from hf_accel.core.model.back_ends import masks_of


@dataclass
class StepOutputs(CausalLMOutputWithPast):
    """Outputs of a pass that lie where those of the next one will: who keeps them copies them.

    choices: int64 [B, T], the argmax of the logits in fp32.
    """

    choices: torch.Tensor | None = None


def runner_of(model: Any) -> Callable[..., Any]:
    """Return what runs `model` after the prompt, with the arguments of its forward: who stands there, or the model."""
    host = host_of(model)
    who: Callable[..., Any] = model if host is None else host.doors.get(Door.FORWARD, model)
    return who


class Stepper:
    """One model over one cache, at known lengths of the rows.

    model: a causal language model. cache: it holds lengths[b] tokens of row b (padding included).
    mask: [B, T0] of the prompt, None where nothing is padded. positions: position of the next token of every row when
    it had `prompt_tokens` tokens, [B] or [A, B] on the model's device; None where the model is not told positions.
    layers: indices of the cache's layers that the model uses; None: all.
    others: what else the model is given with so many tokens, see `Following`; None: nothing.
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
        others: Callable[[int], dict[str, Any]] | None = None,
    ) -> None:
        self._run = runner_of(model)
        self.model, self.cache, self.lengths = model, cache, list(lengths)
        self.mask, self.positions, self.prompt_tokens = mask, positions, prompt_tokens
        self.layers, self.others = layers, others
        self.is_ragged = False
        self.present = Present(len(self.lengths), model.device)  # lengths, mask, positions and tokens are of all rows
        self.has_windows = any(getattr(layer, "is_sliding", False) for layer in cache.layers)
        states = RecurrentStates.of(self._layers())
        self.recall = None if states is None else Recall(states)

    def beside(self, model: Any, layers: list[int] | None = None) -> Stepper:
        """Return a stepper of another model over the same cache, at the same lengths."""
        found = Stepper(
            model, self.cache, self.lengths, self.mask, self.positions, self.prompt_tokens, layers, self.others
        )
        found.is_ragged, found.present = self.is_ragged, self.present
        if self.recall is not None:  # it reads again what was forgotten, whatever layers it has
            found.recall = Recall(RecurrentStates.of(found._layers()) or RecurrentStates([]), self.recall.unread)
            found.recall.is_tentative = True
        return found

    @property
    def unread(self) -> int:
        """How many tokens of each row the next pass reads again, as drafts were refused behind them."""
        return 0 if self.recall is None or self.recall.unread is None else self.recall.unread.shape[1]

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Return logits [B, T, V] for tokens [B, T] at the ends of the rows, which grow by T."""
        return self.outputs(ids).logits  # type: ignore[no-any-return]

    def outputs(self, ids: torch.Tensor) -> Any:
        """Return all outputs of the model for tokens [B, T] at the ends of the rows, which grow by T."""
        if self.recall is None:
            return self._pass(ids)
        self.lengths = [length - self.unread for length in self.lengths]
        found = self._pass(self.recall.read(ids, self.lengths[0]))
        if self.recall.reread:
            found.logits = found.logits[:, self.recall.reread :]
        return found

    def _pass(self, ids: torch.Tensor) -> Any:
        tokens = ids.shape[1]
        present, others = self.present, {} if self.others is None else self.others(tokens)
        inputs: dict[str, Any] = {**others, "input_ids": present.taken(ids), "use_cache": True, CACHE: self.cache}
        if self.positions is not None:
            inputs["position_ids"] = self._positions(tokens)
        if self.is_ragged:
            inputs["attention_mask"] = self._ragged_masks(tokens)
        elif self.mask is not None:
            inputs["attention_mask"] = present.taken(self._visible(self._present_lengths()[0] + tokens))
        found = self._run(**inputs, return_dict=True)
        self.lengths = [length + tokens for length in self.lengths]
        if not present.is_whole:
            present.count_pass()
            found.logits = present.spread(found.logits)
            if isinstance(found, StepOutputs) and found.choices is not None:
                found.choices = present.spread(found.choices)
        return found

    def _positions(self, tokens: int) -> torch.Tensor:
        """Return the positions [B, tokens] or [A, B, tokens] of the tokens at the ends of the rows."""
        starts: Any = self.positions
        lengths = self._present_lengths()
        starts = self.present.taken(starts, axis=starts.dim() - 1)
        if self.is_ragged:
            starts = starts + torch.tensor(lengths, device=starts.device) - self.prompt_tokens
        else:
            starts = starts + (lengths[0] - self.prompt_tokens)
        if tokens == 1:
            return starts[..., None]  # type: ignore[no-any-return]
        return starts[..., None] + torch.arange(tokens, device=starts.device)  # type: ignore[no-any-return]

    def keep(self, lengths: list[int]) -> None:
        """Let row b hold its first lengths[b] tokens only."""
        if self.recall is not None:
            self._keep_recalled(self.recall, lengths)
            return
        if lengths == self.lengths and not self.has_windows:
            return
        self.lengths = list(lengths)
        lengths = self._present_lengths()
        self.is_ragged |= len(set(lengths)) > 1
        for layer in self._layers():
            if self.is_ragged:
                layer.set_rows(lengths)
                continue
            surplus = layer.get_seq_length() - lengths[0]
            if surplus or layer.is_sliding:  # cropping nothing still ends the recording of a window's past
                layer.crop(-surplus)

    def _keep_recalled(self, recall: Recall, lengths: list[int]) -> None:
        """Do so where layers have recurrent states: keys and values end where the states do.

        Raises:
            ValueError: rows would be apart.
        """
        if len(set(lengths)) > 1:
            raise ValueError(f"Rows with recurrent states cannot have different lengths: {lengths}.")
        stop = recall.keep(self.lengths[0], lengths[0])
        self.lengths = list(lengths)
        for layer in self._layers():
            surplus = layer.get_seq_length() - stop if isinstance(layer, DynamicLayer) else 0
            if surplus or getattr(layer, "is_sliding", False):
                crop_attention(layer, surplus)

    def rows_stay(self, rows: int) -> str | None:
        """Return why rows that have ended stay while `rows` go on, None if they can leave."""
        if self.others is not None and any(isinstance(value, torch.Tensor) for value in self.others(1).values()):
            return "the model is given more than tokens, positions and a mask"
        return "steps are read again" if self.recall is not None else cache_rows_stay(self.cache, rows)

    def leave(self, slots: list[int], *, gives_back: bool) -> int:
        """Let those rows leave that no slot names, see `Present.slots_without`; return the bytes freed."""
        freed = keep_rows(self.cache.layers, slots, self.model.device, gives_back=gives_back)
        self.present.leave(slots)
        lengths, was_ragged = self._present_lengths(), self.is_ragged
        # windows of rows that were apart reach further back than those of rows in step
        self.is_ragged = len(set(lengths)) > 1 or (was_ragged and self.has_windows)
        for layer in self._layers() if was_ragged else ():
            if self.is_ragged:
                layer.set_rows(lengths)
            else:  # those that were apart have left
                layer.crop(lengths[0] - layer.get_seq_length())
        return freed

    def _present_lengths(self) -> list[int]:
        return [self.lengths[row] for row in self.present.order]

    def settle(self) -> None:
        """Read what recurrent states have forgotten, so that the cache is that of all tokens."""
        tokens = None if self.recall is None else self.recall.take()
        if tokens is not None:
            self.lengths = [length - tokens.shape[1] for length in self.lengths]
            self._pass(tokens)

    def _layers(self) -> list[Any]:
        found: list[Any] = self.cache.layers
        chosen = found if self.layers is None else [found[index] for index in self.layers]
        return [layer for layer in chosen if not isinstance(layer, EMPTY)]

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
        lengths = torch.tensor(self._present_lengths(), device=device)
        at = (lengths[:, None] + torch.arange(tokens, device=device))[:, :, None]  # [B, T, 1]
        mask = columns <= at
        if layer.is_sliding:
            mask &= columns > at - layer.sliding_window
        if self.mask is not None:
            mask &= self.present.taken(self._visible(stop))[:, None, first:stop].bool()
        mask = mask[:, None]
        if masks_of(self.model.config._attn_implementation) == "boolean":
            return mask
        dtype = self.model.dtype
        return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min)


def understood_inputs(model: Any) -> frozenset[str]:
    """Return the inputs of a step that whoever runs it in the model's place knows; others leave it to the model.

    `generate` hands the tokenizer that it is given for stop strings on to every forward pass: it is among them where
    the model's forward has no use for one.
    """
    names = {"input_ids", "position_ids", "attention_mask", "use_cache", CACHE, "return_dict", "logits_to_keep"}
    reads_it = "tokenizer" in inspect.signature(type(model).forward).parameters
    return frozenset(names if reads_it else names | {"tokenizer"})
