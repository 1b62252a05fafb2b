"""What speculation cannot be set up for, and the keywords by which one call asks for it."""

from __future__ import annotations

from typing import Any

from transformers import DynamicCache

from hf_accel.core.calls.doors import Door
from hf_accel.core.calls.hosting import Host, host_of
from hf_accel.core.calls.keywords import Keyword, register
from hf_accel.core.calls.recurrent import is_recurrent
from hf_accel.core.calls.report import SECTIONS, Applied
from hf_accel.core.calls.rollback import rollback_obstacle
from hf_accel.core.model.anatomy import Anatomy
from hf_accel.core.model.layer_list import layer_list
from hf_accel.core.model.shadow import shadow
from hf_accel.core.steps.goal import Gain, Goal, Offer
from hf_accel.core.steps.patcher import Change, Fidelity, Patcher, Stage
from hf_accel.core.steps.setting import Setting
from hf_accel.errors import ConfigError, UnsupportedModelError
from hf_accel.speculative.building import set_up
from hf_accel.speculative.config import SpeculativeConfig
from hf_accel.speculative.forms import few_bits_config
from hf_accel.speculative.speculation import ModelSpeculation
from hf_accel.speculative.trials import CONTEXT_TOKENS

MOST_CONFIGS = 8  # so many configs of single calls stay set up, with the weights of their drafters
PER_CALL = "per call: "
KEYWORD = "speculative"
SECTION = "speculation"
# arguments of `generate` that ask for the assisted generation of transformers
ASSISTED = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp")


class SpeculativePatcher(Patcher[SpeculativeConfig], config=SpeculativeConfig):
    stage = Stage.SPECULATION
    fidelity = Fidelity.EXACT
    occupies = "speculation"
    needs = ("KVCacheConfig", "DecodingConfig")
    gain = Gain.OWN_ACCOUNT

    @classmethod
    def candidates(cls, goal: Goal, setting: Setting) -> Offer:
        # drafts that cost no memory; a draft model is there to be used
        return Offer([SpeculativeConfig(drafter="lookup" if setting.draft_model is None else ("lookup", "model"))])

    def obstacles(self, setting: Setting) -> list[str]:
        anatomy = setting.anatomy
        model = anatomy.model
        if getattr(model, "_is_stateful", False) and not _has_states_in_cache(model):
            return [f"{anatomy.architecture} has a recurrent state, which cannot take back rejected drafts."]
        if reason := _trial_obstacle(model):
            return [f"{reason}."]
        if self.config.drafter == "auto":
            return _draft_model_obstacles(setting) if setting.draft_model is not None else []
        found: list[str] = []
        for name in self.config.drafters(setting.draft_model is not None):
            found += _obstacles(name, setting, self.config)
        return found

    def patch(self, setting: Setting, host: Host) -> Change:
        speculation, change = set_up(setting, host, self.config)
        host.stand(Door.DRAFTS, speculation)
        host.report.sections[SECTION] = speculation.statistics
        return change


def _obstacles(name: str, setting: Setting, config: SpeculativeConfig) -> list[str]:
    if name == "self":
        # as the copy will be: without what speeds up its products
        copy = setting.over(shadow(setting.model))
        found = Patcher.for_config(few_bits_config(config.bits, config.group_size)).obstacles(copy)
        return [f'the drafter "self" cannot be made: {obstacle}' for obstacle in found]
    if name == "layer_skip":
        try:
            _, layers = layer_list(setting.model)
        except LookupError as error:
            return [f"{error}."]
        return [] if len(layers) > 2 else [f"the model has only {len(layers)} layers."]
    if name == "model":
        return _draft_model_obstacles(setting)
    return []


def _draft_model_obstacles(setting: Setting) -> list[str]:
    anatomy = setting.anatomy
    if setting.draft_model is None:
        return ['the drafter "model" needs a draft model: optimize(model, ..., draft_model=...).']
    try:
        draft = Anatomy.of(setting.draft_model)
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


def _has_states_in_cache(model: Any) -> bool:
    cache: Any = DynamicCache(config=model.config.get_text_config(decoder=True))
    return any(map(is_recurrent, cache.layers))


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
    if value is True and (own := host.doors.get(Door.DRAFTS)) is not None:
        return own  # type: ignore[no-any-return]
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
    own = host.doors.get(Door.DRAFTS)
    if own is not None and own.config == config:
        return own  # type: ignore[no-any-return]
    applied = host.report.applied
    with host.lock:
        before = len(applied)
        found: ModelSpeculation = host.built_once(KEYWORD, config, MOST_CONFIGS, lambda: _built(model, host, config))
        if len(applied) > before:  # of the configs of calls the report tells those that are kept
            applied[:] = [step for step in applied if not _is_of_a_call(step) or step.config in host.built[KEYWORD]]
        return found


def _built(model: Any, host: Host, config: SpeculativeConfig) -> ModelSpeculation:
    setting = Setting.of(model, draft_model=host.draft_model)
    if obstacles := SpeculativePatcher(config).obstacles(setting):
        raise UnsupportedModelError("This model cannot be speculated for so: " + " ".join(obstacles))
    speculation, change = set_up(setting, host, config)
    statistics: Any = host.report.sections.setdefault(SECTION, speculation.statistics)
    speculation.statistics = statistics
    host.report.applied.append(Applied(config, f"{PER_CALL}{change.summary}", change.extra_bytes, Fidelity.EXACT.value))
    return speculation


def _is_of_a_call(applied: Applied) -> bool:
    return isinstance(applied.config, SpeculativeConfig) and applied.summary.startswith(PER_CALL)


register(Keyword(KEYWORD, _speculative, (Door.DRAFTS,)))
SECTIONS[SECTION] = "speculation"
