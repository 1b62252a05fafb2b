"""What speculation cannot be set up for, and the keywords by which one call asks for it."""

from __future__ import annotations

from typing import Any

from transformers import DynamicCache

from hf_accel.core.calls.hosting import host_of
from hf_accel.core.calls.keywords import KEYWORDS
from hf_accel.core.calls.report import Applied
from hf_accel.core.calls.rollback import rollback_obstacle
from hf_accel.core.journal import Journal
from hf_accel.core.model.anatomy import Anatomy
from hf_accel.core.recent import Recent
from hf_accel.core.steps.patcher import Change, Fidelity, Patcher, Stage
from hf_accel.errors import ConfigError, UnsupportedModelError
from hf_accel.speculative.building import set_up
from hf_accel.speculative.config import SpeculativeConfig
from hf_accel.speculative.forms import few_bits_config, layer_list, shadow
from hf_accel.speculative.speculation import ModelSpeculation
from hf_accel.speculative.trials import CONTEXT_TOKENS

MOST_CONFIGS = 8  # so many configs of single calls stay set up, with the weights of their drafters
PER_CALL = "per call: "
# arguments of `generate` that ask for the assisted generation of transformers
ASSISTED = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp")


class SpeculativePatcher(Patcher[SpeculativeConfig], config=SpeculativeConfig):
    stage = Stage.SPECULATION
    fidelity = Fidelity.EXACT
    occupies = "speculation"
    needs = ("KVCacheConfig", "DecodingConfig")

    def obstacles(self, anatomy: Anatomy) -> list[str]:
        model = anatomy.model
        if getattr(model, "_is_stateful", False):
            return [f"{anatomy.architecture} has a recurrent state, which cannot take back rejected drafts."]
        if reason := _trial_obstacle(model):
            return [f"{reason}."]
        if self.config.drafter == "auto":
            return _draft_model_obstacles(anatomy) if anatomy.draft_model is not None else []
        found: list[str] = []
        for name in self.config.drafters(anatomy.draft_model is not None):
            found += _obstacles(name, anatomy, self.config)
        return found

    def patch(self, anatomy: Anatomy, journal: Journal) -> Change:
        host: Any = host_of(anatomy.model)
        speculation, change = set_up(anatomy, host, self.config)
        journal.set_attribute(host, "speculation", speculation)
        host.report.speculation = speculation.statistics
        return change


def _obstacles(name: str, anatomy: Anatomy, config: SpeculativeConfig) -> list[str]:
    if name == "self":
        # as the copy will be: without what speeds up its products
        copy = Anatomy.of(shadow(anatomy.model))
        found = Patcher.for_config(few_bits_config(config.bits, config.group_size)).obstacles(copy)
        return [f'the drafter "self" cannot be made: {obstacle}' for obstacle in found]
    if name == "layer_skip":
        try:
            _, layers = layer_list(anatomy.model)
        except LookupError as error:
            return [f"{error}."]
        return [] if len(layers) > 2 else [f"the model has only {len(layers)} layers."]
    if name == "model":
        return _draft_model_obstacles(anatomy)
    return []


def _draft_model_obstacles(anatomy: Anatomy) -> list[str]:
    if anatomy.draft_model is None:
        return ['the drafter "model" needs a draft model: optimize(model, ..., draft_model=...).']
    try:
        draft = Anatomy.of(anatomy.draft_model)
    except UnsupportedModelError as error:
        return [f"the draft model cannot be used: {error}"]
    found = []
    own, other = (a.model.get_input_embeddings().weight.shape[0] for a in (anatomy, draft))
    sizes = [a.model.config.get_text_config(decoder=True).vocab_size for a in (anatomy, draft)]
    if sizes[0] != sizes[1] or own != other:
        found.append(
            f"the draft model has a vocabulary of {sizes[1]} tokens, the model one of {sizes[0]}; with another "
            "tokenizer use generate(assistant_model=..., tokenizer=..., assistant_tokenizer=...)."
        )
    if draft.device != anatomy.device:
        found.append(f"the draft model is on {draft.device}, the model on {anatomy.device}; put both on one device.")
    if draft.model is anatomy.model:
        found.append('the draft model is the model itself; drafter="self" drafts with a cheaper copy of it.')
    if reason := _trial_obstacle(draft.model):
        found.append(f"the draft model cannot be used: {reason}.")
    return found


def _trial_obstacle(model: Any) -> str | None:
    """Return why drafts cannot be tried with `model`, None if they can."""
    config = model.config.get_text_config(decoder=True)
    context = getattr(config, "max_position_embeddings", None)
    if isinstance(context, int) and context < CONTEXT_TOKENS:
        return f"a context of {context} tokens is too short to try drafts in; it takes {CONTEXT_TOKENS}"
    reason = rollback_obstacle(DynamicCache(config=config), is_batch=False)
    return reason and f"{reason}, so drafts cannot be verified"


def _speculative(model: Any, value: Any, arguments: dict[str, Any]) -> ModelSpeculation | None:
    """Understand `generate(speculative=...)`: False, True, a drafter's name or names, or a config."""
    host: Any = host_of(model)
    if value is False or value is None:
        return None
    configs = (arguments.get("generation_config"), model.generation_config)
    for name in ASSISTED:
        given = [arguments[name]] if name in arguments else [getattr(config, name, None) for config in configs]
        if any(given):
            raise ConfigError(f"generate was given both speculative and {name}: two ways to draft. Leave one out.")
    if value is True and host.speculation is not None:
        return host.speculation  # type: ignore[no-any-return]
    wanted = SpeculativeConfig() if value is True else value
    if isinstance(wanted, (str, list, tuple)):
        wanted = SpeculativeConfig(drafter=wanted)  # type: ignore[arg-type]
    if not isinstance(wanted, SpeculativeConfig):
        raise ConfigError(
            f"speculative is False, True, the name of a drafter or a SpeculativeConfig; {value!r} was given."
        )
    return built_for(model, wanted)


def built_for(model: Any, config: SpeculativeConfig) -> ModelSpeculation:
    """Return the speculation of `config`, built at its first use and kept until the model is restored.

    Raises:
        UnsupportedModelError: the model cannot be speculated for, or not by this drafter.
    """
    host: Any = host_of(model)
    with host.lock:
        if host.speculation is not None and host.speculation.config == config:
            return host.speculation  # type: ignore[no-any-return]
        kept: Recent[SpeculativeConfig, ModelSpeculation] = host.built.setdefault("speculative", Recent(MOST_CONFIGS))
        if (found := kept.get(config)) is not None:
            return found
        anatomy = Anatomy.of(model)
        anatomy.draft_model = host.draft_model
        if obstacles := SpeculativePatcher(config).obstacles(anatomy):
            raise UnsupportedModelError("This model cannot be speculated for so: " + " ".join(obstacles))
        speculation, change = set_up(anatomy, host, config)
        kept.put(config, speculation)
        if host.report.speculation is None:
            host.report.speculation = speculation.statistics
        else:
            speculation.statistics = host.report.speculation
        # of the configs of calls the report tells those that are kept
        applied = host.report.applied
        applied[:] = [a for a in applied if not _is_of_a_call(a) or (a.config in kept and a.config != config)]
        applied.append(Applied(config, f"{PER_CALL}{change.summary}", change.extra_bytes, Fidelity.EXACT.value))
        return speculation


def _is_of_a_call(applied: Applied) -> bool:
    return isinstance(applied.config, SpeculativeConfig) and applied.summary.startswith(PER_CALL)


def _tenant(model: Any, value: Any, arguments: dict[str, Any]) -> str:
    """Understand `generate(tenant=...)`: whose text may be drawn on, and whose it becomes."""
    if not isinstance(value, str):
        raise ConfigError(f"tenant is a name, a text; {value!r} was given.")
    return value


KEYWORDS["speculative"] = _speculative
KEYWORDS["tenant"] = _tenant
