"""Trials of a model on itself, before speculation is used: what steps cost, how they round, what drafts are worth.

Some thirty forward passes of up to 32 rows; where a model drafts, TEXT_TOKENS more of one row, as drafts are only
worth something on text that the model would write.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache

from hf_accel.core.drift import CACHE
from hf_accel.core.stepping import Stepper, apart_objection
from hf_accel.speculative.copies import Form, layer_list, without_layers
from hf_accel.speculative.costs import RowCosts

TEXT_TOKENS = 16
PROMPT_TOKENS = 8
# relative difference (Frobenius) that other summation orders explain, with the roundings to the dtype in between
TOLERANCES = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 8e-2}


@dataclass
class Trials:
    """The model, how its caches are made, and the text [1, PROMPT_TOKENS + TEXT_TOKENS] that it wrote."""

    model: Any
    prepare_cache: Callable[[Any, int], None] | None
    text: torch.Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, model: Any, prepare_cache: Callable[[Any, int], None] | None, writes: bool) -> Trials:
        """Let the model write its text; where that does not matter (`writes` False), take any tokens."""
        vocabulary = model.get_input_embeddings().weight.shape[0]
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(vocabulary, (1, PROMPT_TOKENS + TEXT_TOKENS), generator=generator).to(model.device)
        if not writes:
            return cls(model, prepare_cache, ids)
        ids = ids[:, :PROMPT_TOKENS]
        trials = cls(model, prepare_cache, ids)
        stepper = trials.stepper(1)
        fed = ids
        for _ in range(TEXT_TOKENS):
            fed = stepper.forward(fed)[:, -1:].argmax(dim=-1)
            ids = torch.cat([ids, fed], dim=1)
        trials.text = ids
        return trials

    def stepper(self, batch: int) -> Stepper:
        """Return a stepper over a new, empty cache."""
        cache: Any = DynamicCache(config=self.model.config.get_text_config(decoder=True))
        if self.prepare_cache is not None:
            self.prepare_cache(cache, 128)
        cache.activate_past_recording()
        positions = torch.zeros(batch, dtype=torch.long, device=self.model.device)
        return Stepper(self.model, cache, [0] * batch, None, positions, 0)

    @torch.no_grad()
    def row_costs(self, highest: int) -> RowCosts:
        """Time steps of 1 to `highest` rows."""
        stepper = self.stepper(1)
        stepper.forward(self.text)
        start = stepper.lengths
        stepper.keep(start)
        filler = self.text[:, :1].expand(1, highest)

        def forward(rows: int) -> None:
            stepper.forward(filler[:, :rows])
            stepper.keep(start)

        return RowCosts.measure(forward, highest)

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
    def apart_difference(self) -> float:
        """Return how far (relative, Frobenius) a row beside a longer one is from itself alone; inf: it cannot be."""
        if apart_objection(self.model):
            return math.inf
        alone = self.stepper(1)
        alone.forward(self.text[:, :4])
        alone.keep([4])
        expected = alone.forward(self.text[:, 4:6])[0].double()
        both = self.stepper(2)
        both.forward(self.text[:, :6].expand(2, 6).contiguous())
        both.keep([6, 4])
        fed = torch.cat([self.text[:, 6:8], self.text[:, 4:6]])
        try:
            found = both.forward(fed)[1].double()
        except (RuntimeError, ValueError, TypeError, AttributeError, KeyError):
            return math.inf  # the model does not take masks of its attention's kind
        difference = float((found - expected).norm() / expected.norm())
        return difference if difference <= TOLERANCES.get(self.model.dtype, 1e-3) else math.inf

    @torch.no_grad()
    def agreement(self, form: Form) -> float:
        """Return the share of tokens of the model's text that a draft would have chosen."""
        cache: Any = DynamicCache(config=form.model.config.get_text_config(decoder=True))
        if form.layers is not None:  # the layers keep the places they have in the model's cache
            cache = DynamicCache(config=self.model.config.get_text_config(decoder=True))
        logits = form.model(self.text, use_cache=True, **{CACHE: cache}).logits[:, PROMPT_TOKENS - 1 : -1]
        return float((logits.argmax(dim=-1) == self.text[:, PROMPT_TOKENS:]).float().mean())

    @torch.no_grad()
    def draft_seconds(self, form: Form) -> float:
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

    def best_skip(self, progress: Callable[[], None] | None = None) -> tuple[Form, float]:
        """Return the model without the number of layers that promises most, and its agreement.

        Raises:
            LookupError: there is no list of layers, or none can be skipped.
        """
        order = self.dispensable()
        if not order:
            raise LookupError("every layer is needed")
        total = len(layer_list(self.model)[1])
        best: tuple[float, Form, float] | None = None
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
