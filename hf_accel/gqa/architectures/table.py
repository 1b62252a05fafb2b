"""Which architectures can be expressed in which others, and the proof of each time that it was done."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from hf_accel.core.model.modes import evaluating
from hf_accel.core.model.support import check_supported
from hf_accel.errors import UnsupportedModelError, VerificationError
from hf_accel.gqa.architectures import bigcode, parallel, sequential
from hf_accel.ops import tolerances

WAYS: dict[tuple[str, str], Callable[[Any], Any]] = {
    ("gpt2", "gpt_bigcode"): bigcode.from_gpt2,
    ("opt", "gpt_bigcode"): bigcode.from_opt,
    ("gpt_neox", "phi"): parallel.from_gpt_neox,
    ("gptj", "phi"): parallel.from_gptj,
    ("codegen", "phi"): parallel.from_gptj,
    ("gpt_neox", "starcoder2"): sequential.to_starcoder2,
    ("gpt_neox", "nemotron"): sequential.to_nemotron,
}
_TARGETS = {source: [target for other, target in WAYS if other == source] for source, _ in WAYS}
# what there is no way for, and why: a reader who knows the architectures expects one
NO_WAY: dict[str, str] = {
    "bloom": "falcon, the only architecture with ALiBi that has fewer of them, divides the slopes by the root of the "
    "head size",
    "mpt": "falcon, the only architecture with ALiBi that has fewer of them, divides the slopes by the root of the "
    "head size",
    "gpt_neo": "no architecture that has fewer of them alternates learned positions with windows",
}


def architectures_for(model_type: str) -> list[str]:
    """Return the architectures in which models of this type may be expressed."""
    return list(_TARGETS.get(model_type, ()))


def in_architecture(model: Any, architecture: str) -> Any:
    """Return `model` in another architecture: the same function of tokens and positions, up to rounding.

    Tensors that are equal there are those of `model`, so that a change of one is a change of both; the rest is memory
    on top of the model's, at most a second model. Both models are run on a short text to prove it. The new one takes
    positions from `position_ids`, as `generate` gives them; OPT's forward also counts them by the attention mask.

    Raises:
        UnsupportedModelError: there is no such way, or not for this very model; the message says which there are.
        VerificationError: the two disagree.
    """
    check_supported(model)
    source = model.config.model_type
    way = WAYS.get((source, architecture))
    if way is None:
        targets = architectures_for(source)
        reason = f" ({NO_WAY[source]})" if source in NO_WAY else ""
        known = f"it can be expressed as {' or '.join(targets)}" if targets else f"there is no other for it{reason}"
        raise UnsupportedModelError(f"A {source} model cannot be expressed as {architecture}: {known}.")
    new = way(model)
    difference, limit = _difference(model, new), tolerances.of_step_logits(model.dtype, False)
    if not difference <= limit:
        raise VerificationError(
            f"The {source} model and what was built of it as {architecture} disagree: their logits differ by "
            f"{difference:.1e}, and rounding explains {limit:.0e}. The model itself is as it was."
        )
    return new


def _difference(model: Any, new: Any) -> float:
    """Return the relative difference of the logits of two models on random text, left-padded in its second row."""
    length = min(24, model.config.max_position_embeddings)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (2, length), generator=generator).to(model.device)
    mask = torch.ones_like(ids)
    mask[1, : length // 3] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with evaluating(model), torch.no_grad():
        a, b = (
            each(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits[mask.bool()]
            for each in (model, new)
        )
    return float((a.double() - b.double()).norm() / a.double().norm())
