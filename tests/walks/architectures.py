"""Tiny random models of every architecture that the installed transformers can generate text with."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from models import PAD, Tiny, randomize
from shrinking import small_configs
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto

AUTO = ("CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM", "SEQ_TO_SEQ_CAUSAL_LM")
LARGEST = 16_000_000  # parameters: a model that stays larger was not understood by `small_config`
# of embeddings and of matrices; the first pair that gives finite and varied text is taken
SCALES = ((1.0, 0.25), (0.2, 0.25), (1.0, 0.35), (0.1, 0.35), (0.3, 0.1), (0.1, 0.05), (3.0, 0.5))


class CannotBuild(Exception):
    """There is no tiny model of an architecture; the message says why."""


@functools.cache
def architectures() -> dict[str, type[PreTrainedModel]]:
    """Return model type -> class of every architecture that generates text."""
    found: dict[str, Any] = {}
    for name in AUTO:
        for model_type in getattr(modeling_auto, f"MODEL_FOR_{name}_MAPPING_NAMES", ()):
            found.setdefault(model_type, getattr(modeling_auto, f"MODEL_FOR_{name}_MAPPING"))
    return found


def _built(model_type: str, config: Any) -> PreTrainedModel:
    """Return a model of `config`. Raises: CannotBuild, or whatever transformers raises."""
    cls: Any = architectures()[model_type][type(config)]
    cls = cls[0] if isinstance(cls, tuple) else cls
    if not isinstance(config, cls.config_class):
        config = config.get_text_config(decoder=True)
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in cls._from_config(copy.deepcopy(config)).parameters())
    if count > LARGEST:
        raise CannotBuild(f"{count / 1e6:.0f} million parameters are left")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = cls._from_config(config).float().eval()
    if not model.can_generate():
        raise CannotBuild("it does not generate")
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = PAD
    if config.is_encoder_decoder and model.generation_config.decoder_start_token_id is None:
        model.generation_config.decoder_start_token_id = 2
    return model  # type: ignore[no-any-return]


def _text(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model.generate(torch.arange(20, 31)[None], max_new_tokens=16, do_sample=False)[0, -16:]


@functools.cache
def _prototype(model_type: str) -> PreTrainedModel:
    """Return the first model that generates. Raises: CannotBuild with the first reason."""
    reason: Exception | None = None
    try:
        for config in small_configs(model_type):
            try:
                model = _built(model_type, config())
                _text(model)
                return model
            except CannotBuild:
                raise
            except Exception as error:
                reason = reason or error
    except CannotBuild:
        raise
    except Exception as error:
        reason = error
    raise CannotBuild(" ".join(f"{type(reason).__name__}: {reason}".split())[:200]) from reason


def tiny(model_type: str) -> PreTrainedModel:
    """Return a fresh model whose text depends on its weights. Raises: CannotBuild."""
    prototype = _prototype(model_type)
    best, most = prototype, -1
    for embedding, scale in SCALES:
        model = copy.deepcopy(prototype)
        randomize(model, Tiny(model_type, {}, scale, embedding))
        kinds = _text(model).unique().numel()
        if kinds > most:
            best, most = model, kinds
        if kinds >= 6:
            break
    return best
