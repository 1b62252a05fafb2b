"""Trials of a model on itself, before speculation is used: the text to try steps on, and what drafts are worth.

A dozen forward passes of one row; where a model drafts, TEXT_TOKENS more, as drafts are only worth something on text
that the model would write.
"""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache

from hf_accel.core.calls.forward import Stepper
from hf_accel.core.calls.rollback import record
from hf_accel.core.drift import CACHE
from hf_accel.core.model.layer_list import layer_list
from hf_accel.speculative.costs import RowCosts
from hf_accel.speculative.forms import DraftForm, without_layers

TEXT_TOKENS = 16
PROMPT_TOKENS = 8
WIDEST = 32
CONTEXT_TOKENS = PROMPT_TOKENS + TEXT_TOKENS + WIDEST  # what the trials feed at most
SINGLES = 6  # tokens taken in one by one, where the model need not write


@dataclass
class Trials:
    """The model, how its caches are made, and the text [1, PROMPT_TOKENS + TEXT_TOKENS] that it wrote.

    expected: logits [1, n, V] of the text: of the prompt, and of tokens taken in one by one as plain decoding does;
    single_s: the least time that took. first_position: of the text. layers, cache_config: of the caches, those layers
    that the model uses, and the config they are made for, where the model is a copy without some layers.
    """

    model: Any
    prepare_cache: Callable[[Any, int], None] | None
    text: torch.Tensor
    first_position: int = 0
    layers: list[int] | None = None
    cache_config: Any = None
    single_s: float = math.inf

    def __post_init__(self) -> None:
        self.expected = self.text.new_zeros((1, 0, 0), dtype=torch.float32)
        self.has_states = False
        self.takes_positions = "position_ids" in inspect.signature(self.model.forward).parameters

    @classmethod
    @torch.no_grad()
    def of(
        cls,
        model: Any,
        prepare_cache: Callable[[Any, int], None] | None,
        writes: bool,
        first_position: int = 0,
        layers: list[int] | None = None,
        cache_config: Any = None,
    ) -> Trials:
        """Let the model write its text; where that does not matter (`writes` False), take any tokens."""
        vocabulary = model.get_input_embeddings().weight.shape[0]
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(vocabulary, (1, PROMPT_TOKENS + TEXT_TOKENS), generator=generator).to(model.device)
        trials = cls(model, prepare_cache, ids, first_position, layers, cache_config)
        stepper = trials.stepper(1, records=False)
        trials.has_states = stepper.recall is not None
        logits = stepper.forward(ids[:, :PROMPT_TOKENS])
        expected = [logits.float()]
        for at in range(PROMPT_TOKENS, PROMPT_TOKENS + (TEXT_TOKENS if writes else SINGLES)):
            if writes:
                ids[:, at] = logits[:, -1].argmax(dim=-1)
            start = time.perf_counter()
            logits = stepper.forward(ids[:, at : at + 1])
            logits[0, -1, 0].item()  # waits for a device
            trials.single_s = min(trials.single_s, time.perf_counter() - start)
            expected.append(logits.float())
        trials.expected = torch.cat(expected, dim=1)
        return trials

    def tokens(self, start: int, count: int) -> torch.Tensor:
        """Return tokens [1, count] of the text from `start` on, which begins anew where it ends."""
        return torch.cat([self.text] * 3, dim=1)[:, start : start + count]

    def stepper(self, batch: int, records: bool = True) -> Stepper:
        """Return a stepper over a new, empty cache. records: whether steps can be taken back beyond windows."""
        positions = torch.full((batch,), self.first_position, device=self.model.device)
        told = positions if self.takes_positions else None
        return Stepper(self.model, self._cache(records), [0] * batch, None, told, 0, self.layers)

    def padded(self, columns: int) -> Stepper:
        """Return a stepper of two rows that hold the text's beginning, the second one with a column of padding."""
        model, device = self.model, self.model.device
        ids = torch.cat([self.text[:, :columns], self.text[:, :columns].roll(1, dims=1)])
        mask = torch.ones_like(ids)
        mask[1, 0] = 0
        positions = self.first_position + torch.arange(columns, device=device).expand(2, columns) - 1 + mask[:, :1]
        cache = self._cache(records=True)
        given = {"attention_mask": mask, "position_ids": positions.clamp(min=0), CACHE: cache}
        model(ids, use_cache=True, return_dict=True, **given)
        return Stepper(model, cache, [columns] * 2, mask, positions[:, -1] + 1, columns, self.layers)

    def _cache(self, records: bool) -> Any:
        config = self.cache_config or self.model.config
        cache: Any = DynamicCache(config=config.get_text_config(decoder=True))
        if self.prepare_cache is not None:
            self.prepare_cache(cache, 128)
        if records:
            record(cache)
        return cache

    @torch.no_grad()
    def rounding(self, widths: Sequence[int], tokens: int = TEXT_TOKENS) -> float:
        """Return the largest difference of logits between steps of one token and of `widths`, over `tokens` tokens."""
        start = PROMPT_TOKENS + TEXT_TOKENS - tokens

        def logits(width: int) -> torch.Tensor:
            stepper = self.stepper(1)
            stepper.forward(self.text[:, :start])
            stepper.keep(stepper.lengths)
            return torch.cat([stepper.forward(piece) for piece in self.text[:, start:].split(width, 1)], 1).float()

        single = logits(1)
        return max(float((logits(width) - single).abs().max()) for width in widths)

    @torch.no_grad()
    def agreement(self, form: DraftForm) -> float:
        """Return the share of tokens of the model's text that a draft would have chosen."""
        cache: Any = DynamicCache(config=form.model.config.get_text_config(decoder=True))
        if form.layers is not None:  # the layers keep the places they have in the model's cache
            cache = DynamicCache(config=self.model.config.get_text_config(decoder=True))
        logits = form.model(self.text, use_cache=True, **{CACHE: cache}).logits[:, PROMPT_TOKENS - 1 : -1]
        return float((logits.argmax(dim=-1) == self.text[:, PROMPT_TOKENS:]).float().mean())

    @torch.no_grad()
    def draft_seconds(self, form: DraftForm) -> float:
        """Return what drafting a token takes, the least of a few."""
        trial = Trials(form.model, self.prepare_cache, self.text) if form.has_own_cache else self
        stepper = trial.stepper(1)
        stepper.forward(self.text[:, :PROMPT_TOKENS])
        stepper.keep([PROMPT_TOKENS])
        stepper = stepper.beside(form.model, form.layers)

        def forward(rows: int) -> None:
            stepper.forward(self.text[:, :1])
            stepper.keep([PROMPT_TOKENS])

        return RowCosts.measure(forward, 1, rounds=4).seconds[1]

    @torch.no_grad()
    def dispensable(self) -> list[int]:
        """Return the layers that may be skipped, those first that change their input least.

        The influence of a layer is 1 minus the cosine of what goes in and out (Men et al. 2024, arXiv:2403.03853,
        equation 1). The first layer of each kind stays: the lengths of the cache are read there.
        """
        _, layers = layer_list(self.model)
        influence: dict[int, float] = {}
        hooks = []
        for index, layer in enumerate(layers):

            def note(module: Any, args: Any, kwargs: Any, output: Any, index: int = index) -> None:
                before = args[0] if args else kwargs["hidden_states"]
                after = output[0] if isinstance(output, tuple) else output
                cosine = torch.nn.functional.cosine_similarity(before.double(), after.double(), dim=-1)
                influence[index] = 1 - float(cosine.mean())

            hooks.append(layer.register_forward_hook(note, with_kwargs=True))
        try:
            self.stepper(1).forward(self.text)
        finally:
            for hook in hooks:
                hook.remove()
        kinds = getattr(self.model.config.get_text_config(decoder=True), "layer_types", None) or [""] * len(layers)
        firsts = {kinds.index(kind) for kind in set(kinds)} | {0}
        return sorted((index for index in influence if index not in firsts), key=influence.__getitem__)

    def best_skip(self, progress: Callable[[], None] | None = None) -> tuple[DraftForm, float]:
        """Return the model without the number of layers that promises most, and its agreement.

        Raises:
            LookupError: there is no list of layers, or none can be skipped.
        """
        order = self.dispensable()
        if not order:
            raise LookupError("every layer is needed")
        total = len(layer_list(self.model)[1])
        best: tuple[float, DraftForm, float] | None = None
        for count in sorted({max(1, len(order) * part // 8) for part in (1, 2, 3, 4, 5, 6)}):
            form = without_layers(self.model, sorted(order[:count]))
            agreement = self.agreement(form)
            cost = 1 - count / total
            promise = max(
                sum(agreement**i for i in range(drafts + 1)) / (1 + drafts * cost) for drafts in (1, 2, 3, 4, 6, 8)
            )
            if best is None or promise > best[0]:
                best = (promise, form, agreement)
            if progress is not None:
                progress()
        return best[1], best[2]  # type: ignore[index]
