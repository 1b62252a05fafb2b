"""The audit of mixers: stock writes a few tokens on a copy of the model, and every reading must give what it gives.

A prompt of two rows, the first padded, then single tokens. At each of these a reading is given the hidden states and
copies of the states, and its output and the states that it leaves are compared with the mixer's own. Cost: a short
prefill and STEPS tokens, and for the readings as many tokens of the mixers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from hf_accel.core.model.shadow import twin
from hf_accel.errors import VerificationError
from hf_accel.ops import tolerances
from hf_accel.recurrent.forms import Form, Sizes, Step
from hf_accel.recurrent.mixers import mixers_of, readings
from hf_accel.recurrent.step import States, cache_keyword, held_states

PROMPT_TOKENS = 9  # more than a convolution has taps
STEPS = 3


@dataclass
class Audited:
    """One mixer of the copy. alive: readings that agreed so far, with the step of each and the largest difference seen.

    seen: hidden states [2, 1, E] and the states before the last token, None where no single token came by.
    """

    module: Any
    alive: dict[Form, Step] = field(default_factory=dict)
    differences: dict[Form, float] = field(default_factory=dict)
    seen: tuple[Tensor, States] | None = None
    reason: str = "no token came by over states in a cache"

    @property
    def form(self) -> Form | None:
        """The only reading that agreed; of several that cannot be told apart none is taken."""
        return next(iter(self.alive)) if len(self.alive) == 1 else None

    def look(self, hidden: Tensor, before: States, output: Tensor, after: States, tried: list[Form] | None) -> None:
        """Compare the readings, at first those of `tried`, or all, with one token of the mixer's own forward."""
        if self.seen is None:
            self._begin(before, tried)
        self.seen = hidden, before
        bound = tolerances.of_layer_output(output.dtype, False)
        for form, step in list(self.alive.items()):
            states = _copied(before)
            found = step(self.module, hidden, *states)
            pairs = [(found, output), (states.conv, after.conv), (states.recurrent, after.recurrent)]
            difference = max(_difference(one, other) for one, other in pairs if other is not None)
            self.differences[form] = max(difference, self.differences.get(form, 0.0))
            if not difference <= bound:
                del self.alive[form]
        if len(self.alive) > 1:
            self.reason = "readings of it cannot be told apart"
        elif self.differences and not self.alive:
            least = min(self.differences.values())
            self.reason = f"it differs from what it holds by {least:.1e}; rounding explains {bound:.0e}"

    def _begin(self, states: States, tried: list[Form] | None) -> None:
        recurrent = None if states.recurrent is None else tuple(states.recurrent.shape[1:])
        found = readings(self.module, Sizes(tuple(states.conv.shape[1:]), recurrent))
        self.reason = f"a {type(self.module).__name__} holds what no mixer known here does"
        for form in found if tried is None else [form for form in found if form in tried]:
            try:
                self.alive[form] = form.built(self.module)
            except ValueError as error:
                self.reason = str(error)


def _copied(states: States) -> States:
    return States(*(None if state is None else state.clone() for state in states))  # type: ignore[arg-type]


def _difference(found: Tensor | None, expected: Tensor) -> float:
    if found is None or found.shape != expected.shape or found.dtype is not expected.dtype:
        return float("inf")
    norm = expected.double().norm().clamp_min(1e-30)
    return float((found.double() - expected.double()).norm() / norm)


def audited(model: Any) -> dict[str, Audited]:
    """Return path -> audited mixer, which lies on a copy of `model` that shares its tensors.

    Raises:
        VerificationError: the model cannot be copied.
    """
    copy = twin(model)
    if copy is model:
        raise VerificationError(
            f"A {type(model).__name__} cannot be copied, so that its recurrent mixers cannot be checked. "
            "Leave RecurrentStepConfig out for this model."
        )
    found = {path: Audited(module) for path, module in mixers_of(copy).items()}
    vocabulary = copy.get_input_embeddings().weight.shape[0]
    tokens = torch.randint(vocabulary, (2, PROMPT_TOKENS), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(tokens)
    mask[0, 0] = 0
    config = GenerationConfig(
        max_new_tokens=STEPS + 1, min_new_tokens=STEPS + 1, do_sample=False, pad_token_id=0, use_cache=True
    )
    copy.generation_config = config  # what the user's asks for beside it stays out
    with torch.no_grad(), _watching(found):
        copy.generate(tokens, attention_mask=mask)
    return found


@contextmanager
def _watching(found: dict[str, Audited]) -> Iterator[None]:
    survivors: dict[Any, list[Form]] = {}  # of mixers of one class and size, what agreed for the first one

    def hook(mixer: Audited) -> list[Any]:
        held: list[States] = []
        keyword = cache_keyword(mixer.module)

        def before(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            hidden = args[0] if args else kwargs.get("hidden_states")
            states = held_states(module, kwargs.get(keyword))
            held.clear()
            if hidden is not None and hidden.shape[1] == 1 and states is not None and len(args) < 2:
                held.append(_copied(states))

        def after(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            states = held_states(module, kwargs.get(keyword))
            if not held or states is None or not isinstance(output, Tensor):
                return
            kind = (type(module), *(None if state is None else state.shape for state in states))
            hidden = args[0] if args else kwargs["hidden_states"]
            mixer.look(hidden.clone(), held[0], output, states, survivors.get(kind))
            if mixer.alive:
                survivors[kind] = list(mixer.alive)

        module = mixer.module
        return [
            module.register_forward_pre_hook(before, with_kwargs=True),
            module.register_forward_hook(after, with_kwargs=True),
        ]

    hooks = [handle for mixer in found.values() for handle in hook(mixer)]
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()
