"""Sets up speculation for a model: builds its drafters, tries them on the model's own text, and takes our keywords."""

from __future__ import annotations

import math
from typing import Any

from transformers import DynamicCache

from hf_accel.core.anatomy import Anatomy, unwrap
from hf_accel.core.config import Config
from hf_accel.core.hosting import KEYWORDS, Host, host_of
from hf_accel.core.journal import Journal
from hf_accel.core.patcher import Change, Fidelity, Patcher, Stage
from hf_accel.core.report import Applied
from hf_accel.core.stepping import apart_objection, rollback_objection
from hf_accel.errors import ConfigError, UnsupportedModelError
from hf_accel.speculative.arms import Source
from hf_accel.speculative.config import SpeculativeConfig
from hf_accel.speculative.copies import Form, few_bits, few_bits_config, layer_list, shadow, sped_up
from hf_accel.speculative.costs import RowCosts
from hf_accel.speculative.speculation import SMALL_ROWS, ModelSpeculation
from hf_accel.speculative.trials import PROMPT_TOKENS, TEXT_TOKENS, Trials

# a drafter whose token costs more than this share of a plain step never pays
HIGHEST_COST = 0.7
# how much further than in the trials logits may be apart elsewhere
MARGIN = 8
# what the trials feed at most
CONTEXT_TOKENS = PROMPT_TOKENS + TEXT_TOKENS + 2 * SMALL_ROWS
# arguments by which a caller asks stock for its own assisted generation
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


def set_up(anatomy: Anatomy, host: Host, config: SpeculativeConfig) -> tuple[ModelSpeculation, Change]:
    """Build the drafters of `config` and try them on the model, to which the other steps of the plan are applied.

    Raises:
        UnsupportedModelError: a drafter that was asked for by name cannot be built.
    """
    model = anatomy.model
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        trials = Trials.of(model, host.prepare_cache, config.drafters(anatomy.draft_model is not None) != ("lookup",))
        highest = 2 * SMALL_ROWS if config.adaptive else 1
        rows = trials.row_costs(highest)
        rounding = _rounding(trials, rows, config)
        apart_difference = trials.apart_difference()
        sources, left_out = _sources(anatomy, host, config, trials, rows)
    finally:
        for module in training:
            module.training = True
    speculation = ModelSpeculation(config, sources, rows, rounding, apart_difference, host.prepare_cache)
    if apart_difference == math.inf:
        reason = apart_objection(model) or "rows of different lengths get other results than alone"
        left_out.append(f"batches are decoded plainly: {reason}")
    forms = [source.form for source in sources if source.form is not None]
    costs = ", ".join(f"{count} rows {rows.ratio(count, 1):.2f} x" for count in (2, 4, 8) if config.adaptive)
    summary = "; ".join(
        [f"drafts by {', '.join(source.name for source in sources) or 'nobody'}"]
        + [form.summary for form in forms]
        + ([f"a step of {costs} a single one"] if costs else [])
    )
    return speculation, Change(summary, sum(form.extra_bytes for form in forms), tuple(left_out))


def _rounding(trials: Trials, rows: RowCosts, config: SpeculativeConfig) -> tuple[float, float]:
    """Return how far logits of a step may lie from those of steps of one token: of few rows, and of more."""
    if trials.model.dtype.itemsize == 4 and not config.strict:
        return 0.0, 0.0  # fp32 rounds too finely for text to show it
    widest = min(config.max_draft_tokens + 1, SMALL_ROWS)
    if config.strict:  # every width that may come
        return MARGIN * trials.rounding(range(2, widest + 1)), 0.0
    few = MARGIN * trials.rounding([widest])
    many = SMALL_ROWS + 4
    is_tried = not config.adaptive or rows.ratio(many, 1) < many / 2
    return few, MARGIN * trials.rounding([many], many) if is_tried else few


def _sources(
    anatomy: Anatomy, host: Host, config: SpeculativeConfig, trials: Trials, rows: RowCosts
) -> tuple[list[Source], list[str]]:
    """Return the drafters in the order in which they are asked, and sentences on those left out."""
    found: list[Source] = []
    left_out: list[str] = []
    for name in config.drafters(anatomy.draft_model is not None):
        if name == "lookup":
            found.append(Source.lookup())
            continue
        try:
            form, agreement = _form(name, anatomy, host, config, trials)
        except UnsupportedModelError as error:
            if config.drafter != "auto":
                raise
            left_out.append(f"drafter {name}: {error}")
            continue
        draft_s = trials.draft_seconds(form)
        share = draft_s / rows.seconds[1]
        if config.adaptive and share > HIGHEST_COST:
            left_out.append(f"drafter {name}: drafting a token takes {share:.2f} of a plain step here")
            continue
        form.summary += f" ({100 * agreement:.0f} % agreement on own text, {share:.2f} of a step per token)"
        can_be_apart = True
        if form.has_own_cache and Trials(form.model, host.prepare_cache, trials.text).apart_difference() == math.inf:
            can_be_apart = False
            left_out.append(f"drafter {name} in batches: rows of the draft model cannot have different lengths")
        found.append(Source.model(form, agreement, draft_s, can_be_apart))
    return found, left_out


def _form(name: str, anatomy: Anatomy, host: Host, config: SpeculativeConfig, trials: Trials) -> tuple[Form, float]:
    applied: list[Config] = [step.config for step in host.report.applied]
    if name == "layer_skip":
        return trials.best_skip(anatomy.progress)
    if name == "self":
        form = few_bits(anatomy, config.bits, config.group_size, applied)
    else:
        form = sped_up(unwrap(anatomy.draft_model), applied)
    return form, trials.agreement(form)


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
    reason = rollback_objection(DynamicCache(config=config), is_batch=False)
    return reason and f"{reason}, so rejected drafts cannot be taken back"


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
        ConfigError: the model was optimised without our token loop.
        UnsupportedModelError: the model cannot be speculated for, or not by this drafter.
    """
    host: Any = host_of(model)
    with host.lock:
        if host.speculation is not None and host.speculation.config == config:
            return host.speculation  # type: ignore[no-any-return]
        if config in host.built:
            return host.built[config]  # type: ignore[no-any-return]
        if host.decoder is None:
            raise ConfigError(
                "speculative needs our token loop, which this model is optimised without. "
                "Add DecodingConfig (or SpeculativeConfig) to the configs of optimize."
            )
        anatomy = Anatomy.of(model)
        anatomy.draft_model = host.draft_model
        if obstacles := SpeculativePatcher(config).obstacles(anatomy):
            raise UnsupportedModelError("This model cannot be speculated for so: " + " ".join(obstacles))
        speculation, change = set_up(anatomy, host, config)
        host.built[config] = speculation
        if host.report.speculation is None:
            host.report.speculation = speculation.statistics
        else:
            speculation.statistics = host.report.speculation
        host.report.applied.append(
            Applied(config, f"per call: {change.summary}", change.extra_bytes, Fidelity.EXACT.value)
        )
        return speculation


def _tenant(model: Any, value: Any, arguments: dict[str, Any]) -> str:
    """Understand `generate(tenant=...)`: whose text may be drawn on, and whose it becomes."""
    if not isinstance(value, str):
        raise ConfigError(f"tenant is a name, a text; {value!r} was given.")
    return value


KEYWORDS["speculative"] = _speculative
KEYWORDS["tenant"] = _tenant
