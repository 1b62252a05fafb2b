"""`convert_gqa`: a new model with fewer key and value heads, an ordinary model of transformers."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch

from hf_accel.core.calls.hosting import host_of
from hf_accel.core.model.shadow import twin
from hf_accel.core.model.support import unwrap
from hf_accel.core.progress import shown
from hf_accel.errors import ConflictError
from hf_accel.gqa.architectures import in_architecture
from hf_accel.gqa.config import GQAConfig
from hf_accel.gqa.conversion import reshaped_model, share_equal
from hf_accel.gqa.converting import convert_into
from hf_accel.gqa.patcher import check_heads
from hf_accel.gqa.text import text_for
from hf_accel.measure.text import FITTED_ROW_TOKENS, calibration_text


@torch.inference_mode(False)  # what is made under it can neither be fitted nor trained
def convert_gqa(
    model: Any,
    num_kv_heads: int,
    *,
    method: str = "aligned",
    calibration: Any = None,
    tokenizer: Any = None,
    repair_steps: int = 200,
    architecture: str | None = None,
    shares: bool = True,
    progress: Callable[[], None] | None = None,
) -> Any:
    """Return a new model like `model` with `num_kv_heads` key and value heads; `model` is left as it is.

    What is returned is an ordinary model: it saves and loads without hf_accel, may be trained, optimised and quantized,
    and may draft for its original. Heal it by training with `hf_accel.recipes.uptrain`.

    Args:
        model: a causal language model of transformers with its original weights, neither optimised nor quantized and
            without adapters.
        num_kv_heads, method: see `GQAConfig`.
        calibration: token ids [B, T], a tokenizer's output, or texts with `tokenizer`. None: the model writes some.
            "aligned" reads it; the other methods need none.
        repair_steps: gradient steps of the repair of each layer, which is a part of "aligned".
        architecture: the architecture to express the model in, where its own cannot have fewer heads, as "phi" for a
            gpt_neox model.
        shares: tensors that are equal in both models are the same ones, so that the new model takes the memory of its
            projections alone; a change of such a tensor changes both. False: all are copies.
        progress: called after each part of a layer. None: a bar on standard error, if that is a terminal.

    Raises:
        ConfigError: heads do not divide or are not fewer, calibration is too short or too uniform.
        UnsupportedModelError: the architecture cannot have so many heads (the message names those that can), or the
            model's weights are not plain.
        ConflictError: the model is optimised.
    """
    config = GQAConfig(num_kv_heads=num_kv_heads, method=method, repair_steps=repair_steps)
    model = unwrap(model)
    if host_of(model) is not None:
        raise ConflictError(
            f"This {type(model).__name__} is optimised. Call hf_accel.restore(model), convert, and optimise the result."
        )
    with shown(f"converting {type(model).__name__}") if progress is None else nullcontext(progress) as step:
        original = twin(model) if architecture is None else in_architecture(model, architecture)
        check_heads(original, num_kv_heads)
        text = (
            None
            if calibration is None
            else calibration_text(original, calibration, tokenizer, row_tokens=FITTED_ROW_TOKENS)
        )
        new = reshaped_model(original, num_kv_heads, shares=shares)
        ids = text_for(original, config, text).ids if method == "aligned" else None
        convert_into(new, original, config, ids, step)
        if shares:
            share_equal(new, original)
    return new
