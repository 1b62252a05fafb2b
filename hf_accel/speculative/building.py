"""Sets up speculation for a model: tries steps of several tokens on it, then builds and tries its drafters."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from hf_accel.core.calls.doors import Door
from hf_accel.core.calls.hosting import Host
from hf_accel.core.calls.rows import apart_obstacle
from hf_accel.core.config import Config
from hf_accel.core.failures import converting
from hf_accel.core.model.modes import evaluating
from hf_accel.core.model.rope import moving_rope
from hf_accel.core.model.support import unwrap
from hf_accel.core.model.undisturbed import undisturbed
from hf_accel.core.steps.patcher import Change
from hf_accel.core.steps.setting import Setting
from hf_accel.errors import HfAccelError, UnsupportedModelError
from hf_accel.speculative.config import SpeculativeConfig
from hf_accel.speculative.costs import RowCosts
from hf_accel.speculative.forms import DraftForm, few_bits, hosted, sped_up, to_try, without_layers
from hf_accel.speculative.proof import OTHER, SMALL_ROWS, Proof, Tolerance, apart_difference, compare, prove
from hf_accel.speculative.sources import Source
from hf_accel.speculative.speculation import ModelSpeculation
from hf_accel.speculative.trials import CONTEXT_TOKENS, Trials

# a drafter whose token costs more than this share of a plain step never pays
HIGHEST_COST = 0.7
# on other text, logits of a step may differ from those of single tokens by this many times what the trials showed
MARGIN = 8


def set_up(setting: Setting, host: Host, config: SpeculativeConfig) -> tuple[ModelSpeculation, Change]:
    """Build the drafters of `config` and try them on the model, to which the other steps of the plan are applied.

    Raises:
        UnsupportedModelError: steps of several tokens, or a drafter that was asked for by name, fail on this model.
    """
    with evaluating(setting.model), converting(UnsupportedModelError, "Steps of several tokens fail on this model"):
        model = to_try(setting, [step.config for step in host.report.applied])
        with undisturbed(model):
            return _tried(model, setting, host, config)


def _tried(model: Any, setting: Setting, host: Host, config: SpeculativeConfig) -> tuple[ModelSpeculation, Change]:
    """model: what to try steps on, in place of `setting.model`."""
    rope = moving_rope(model)
    # of a switch that a short text would pass, beyond it
    first = 0 if rope is None or rope.is_steady(0, CONTEXT_TOKENS) else max(rope.switches, default=0)
    writes = config.drafters(setting.draft_model is not None) != ("lookup",)
    trials = Trials.of(model, host.doors.get(Door.DRAFT_CACHE), writes, first)
    proof = prove(trials)
    if proof.obstacle is not None and trials.has_states:
        raise UnsupportedModelError(f"Rejected drafts cannot be taken back from its recurrent state: {proof.obstacle}.")
    sources: list[Source] = []
    skipped: list[str] = []
    if proof.obstacle is not None:
        skipped.append(f"every call is decoded plainly: {proof.obstacle}")
    else:
        sources, skipped = _sources(setting, host, config, trials, proof.rows)
        if proof.apart is not None:
            skipped.append(f"batches are decoded plainly: {proof.apart}")
        if rope is not None:
            lengths = " and ".join(map(str, [*rope.switches, *([] if rope.beyond is None else [rope.beyond])]))
            skipped.append(f"no drafts across {lengths} tokens, where batches are decoded plainly: {rope}")
    speculation = ModelSpeculation(
        config, sources, proof, _rounding(trials, proof, config), host.doors.get(Door.DRAFT_CACHE)
    )
    forms = [source.form for source in sources if source.form is not None]
    costs = ", ".join(f"{count} rows {proof.rows.ratio(count, 1):.2f} x" for count in (2, 4, 8) if config.adaptive)
    summary = "; ".join(
        [f"drafts by {', '.join(source.name for source in sources) or 'nobody'}"]
        + [form.summary for form in forms]
        + ([f"a step of {costs} a single one"] if costs else [])
    )
    return speculation, Change(summary, sum(form.extra_bytes for form in forms), tuple(skipped))


def _rounding(trials: Trials, proof: Proof, config: SpeculativeConfig) -> tuple[float, float]:
    """Return how far logits of a step may lie from those of steps of one token: of few rows, and of more."""
    if config.strict and proof.obstacle is None:  # every width that may come
        widest = min(config.max_draft_tokens + 1, SMALL_ROWS)
        return MARGIN * trials.rounding(range(2, widest + 1)), 0.0
    return MARGIN * proof.rounding[0], MARGIN * proof.rounding[1]


def _sources(
    setting: Setting, host: Host, config: SpeculativeConfig, trials: Trials, rows: RowCosts
) -> tuple[list[Source], list[str]]:
    """Return the drafters in the order in which they are asked, and sentences on those left out."""
    found: list[Source] = []
    skipped: list[str] = []
    for name in config.drafters(setting.draft_model is not None):
        if name == "lookup":
            found.append(Source.lookup())
            continue
        try:
            with converting(UnsupportedModelError, f'The drafter "{name}" fails on this model'):
                found += _model_source(name, setting, host, config, trials, rows, skipped)
        except HfAccelError as error:
            if config.drafter != "auto":
                raise
            skipped.append(f"drafter {name}: {error}")
    return found, skipped


def _model_source(
    name: str,
    setting: Setting,
    host: Host,
    config: SpeculativeConfig,
    trials: Trials,
    rows: RowCosts,
    skipped: list[str],
) -> list[Source]:
    """Return the drafter that runs a model; none where it never pays, with a sentence on it in `skipped`."""
    form, agreement = _form(name, setting, host, config, trials)
    with undisturbed(form.model):
        if form.has_own_cache and (reason := _states_obstacle(form, host)):
            raise UnsupportedModelError(f"The draft model cannot be used: {reason}.")
        draft_s = trials.draft_seconds(form)
        can_be_apart = not form.has_own_cache or _can_be_apart(form, host)
    share = draft_s / rows.seconds[1]
    if config.adaptive and share > HIGHEST_COST:
        skipped.append(f"drafter {name}: drafting a token takes {share:.2f} of a plain step here")
        return []
    form.summary += f" ({100 * agreement:.0f} % agreement on own text, {share:.2f} of a step per token)"
    if not can_be_apart:
        skipped.append(f"drafter {name} in batches: rows of the draft model cannot have different lengths")
    if form.layers is not None:  # those of the model itself, so that what becomes of them is followed
        form = replace(form, model=hosted(without_layers(setting.model, form.skipped).model, setting))
    return [Source.model(form, agreement, draft_s, can_be_apart)]


def _states_obstacle(form: DraftForm, host: Host) -> str | None:
    """Return why a draft model with a recurrent state cannot go on behind drafts that were rejected."""
    trials = Trials.of(form.model, host.doors.get(Door.DRAFT_CACHE), writes=False)
    if not trials.has_states or compare(trials, tolerance := Tolerance.of(form.model), False).is_equal(tolerance):
        return None
    return f"rejected drafts cannot be taken back from its recurrent state: {OTHER}"


def _can_be_apart(form: DraftForm, host: Host) -> bool:
    if apart_obstacle(form.model):
        return False
    trials = Trials.of(form.model, host.doors.get(Door.DRAFT_CACHE), writes=False)
    return apart_difference(trials, Tolerance.of(form.model)) < math.inf


def _form(
    name: str, setting: Setting, host: Host, config: SpeculativeConfig, trials: Trials
) -> tuple[DraftForm, float]:
    applied: list[Config] = [step.config for step in host.report.applied]
    if name == "layer_skip":
        return trials.best_skip(setting.progress)
    if name == "self":
        form = few_bits(setting, config.bits, config.group_size, applied)
    else:
        form = sped_up(unwrap(setting.draft_model), applied)
    return form, trials.agreement(form)
