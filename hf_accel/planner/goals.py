"""Turns a goal into a plan: offers every candidate that fits, checks each by applying it once, and times them.

All of it happens on a copy that shares the model's tensors: the model's hooks do not run, and it may be in use.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from hf_accel.attention import AttentionConfig
from hf_accel.cache import KVCacheConfig
from hf_accel.cache.probing import layer_shapes
from hf_accel.core.calls.report import Skip
from hf_accel.core.config import Config
from hf_accel.core.model.anatomy import Anatomy
from hf_accel.core.model.modes import evaluating
from hf_accel.core.model.shadow import twin
from hf_accel.core.steps.patcher import Patcher
from hf_accel.core.steps.plan import Plan, Step
from hf_accel.decoding import DecodingConfig
from hf_accel.errors import ConfigError, HfAccelError, described
from hf_accel.kernels import native
from hf_accel.layers import DecoderBlockConfig, NativeLinearConfig, SharedProjectionConfig
from hf_accel.measure.break_even import break_even
from hf_accel.measure.quality import CalibrationText, QualityReference
from hf_accel.measure.text import calibration_text
from hf_accel.planner.timing import VERIFIERS, keep_what_pays
from hf_accel.planner.trying import applied, name_of
from hf_accel.quantization import CompressedTensorsConfig, WeightOnlyConfig
from hf_accel.quantization.mixed import DEFAULT_MAX_KL, choose_bits, measured
from hf_accel.quantization.timing import slower_products
from hf_accel.speculative import SpeculativeConfig

# goal -> candidates, the preferred first where two claim one place
EXACT: tuple[type[Config], ...] = (
    CompressedTensorsConfig,
    NativeLinearConfig,
    SharedProjectionConfig,
    DecoderBlockConfig,
    AttentionConfig,
    KVCacheConfig,
    DecodingConfig,
)
# "fast" and "memory" put weights in few bits first, within a bound on what that costs
GOALS: dict[str, tuple[type[Config], ...]] = {"exact": EXACT, "fast": EXACT, "memory": EXACT}
# these take no time and gain none on random prompts, of which nothing can be foretold; they watch over themselves
GOVERNED = (SpeculativeConfig,)


def plan_goal(
    anatomy: Anatomy,
    goal: str,
    progress: Callable[[], None] | None = None,
    *,
    calibration: Any = None,
    tokenizer: Any = None,
    max_kl: float | None = None,
) -> Plan:
    """Return the plan for `goal`, having timed its candidates on `anatomy.model`, which is left as it was.

    Args:
        calibration, tokenizer: the text that lossy goals measure on, see `calibration_text`.
        max_kl: nats per token that lossy goals may cost; None: 0.05 for "fast", 0.2 for "memory".

    Raises:
        ConfigError: the goal or an argument does not exist or does not fit.
    """
    if goal not in GOALS:
        raise ConfigError(f"There is no goal called {goal!r}. Goals: {', '.join(GOALS)}. Or pass a list of configs.")
    if goal == "exact" and not (calibration is None and max_kl is None):
        raise ConfigError('calibration and max_kl belong to the goals "fast" and "memory"; the goal is "exact".')
    if max_kl is not None and not (isinstance(max_kl, (int, float)) and 0 < max_kl < math.inf):
        raise ConfigError(f"max_kl is a positive number of nats per token; {max_kl!r} was given.")
    plan = Plan(goal=goal, draft_model=anatomy.draft_model)
    anatomy.keep_prepared()
    trial = _trial(anatomy)
    configs: list[Config] = [candidate() for candidate in GOALS[goal]]
    # drafts that cost no memory; a draft model is there to be used
    configs.append(SpeculativeConfig(drafter="lookup" if anatomy.draft_model is None else ("lookup", "model")))
    with evaluating(trial.model):
        if goal != "exact":
            try:
                text = calibration_text(trial.model, calibration, tokenizer)
                configs = _few_bits(plan, trial, text, max_kl or DEFAULT_MAX_KL[goal], progress) + configs
                _cache_bits(plan, trial)
            except ConfigError:
                raise
            except Exception as error:  # memory may be short, or the model's own code may fail
                reason = f"what it costs could not be measured ({described(error)})"
                plan.skipped.append(Skip(WeightOnlyConfig.__name__, reason))
        offer(plan, trial, configs)
        governed = [step for step in plan.steps if isinstance(step.config, GOVERNED)]
        plan.steps = plan.without(*GOVERNED).steps
        _verify(plan, trial, progress)
        if plan.steps:
            keep_what_pays(plan, trial, progress)
        for step in governed:
            missing = set(Patcher.for_config(step.config).needs) - {name_of(other) for other in plan.steps}
            if missing:
                plan.skipped.append(Skip(name_of(step), f"it needs {min(missing)}, which is left out"))
            else:
                plan.steps.append(step)
        for step in plan.steps:
            plan.weight_bytes = Patcher.for_config(step.config).weight_bytes(trial) or plan.weight_bytes
    if plan.weight_bytes is None:
        plan.quality = None
    if goal != "exact":
        del trial
        gc.collect()  # nothing may hold originals that are to be given up
    return plan


def _trial(anatomy: Anatomy) -> Anatomy:
    """Return the anatomy of a copy to try steps on, with what is kept of weights shared; of the model if need be."""
    model = twin(anatomy.model)
    if model is anatomy.model:
        return anatomy
    trial = Anatomy.of(model)
    trial.prepared, trial.progress = anatomy.prepared, anatomy.progress
    trial.draft_model = model if anatomy.draft_model is anatomy.model else anatomy.draft_model
    return trial


def _cache_bits(plan: Plan, anatomy: Anatomy) -> None:
    """Say in the plan from how many tokens on a cache in 8 bits would pay; it is not applied unless it is named."""
    shapes = layer_shapes(anatomy.model)
    if isinstance(shapes, str) or anatomy.model.device.type != "cpu" or not native.is_available():
        return
    config, shape = anatomy.model.config.get_text_config(decoder=True), shapes[-1]
    if shape.dtypes[0] not in native.DTYPES or max(shape.sizes) > native.MAX_HEAD_DIM:
        return
    tokens = break_even(config.num_attention_heads, shape.kv_heads, shape.sizes, shape.dtypes[0], 8)
    reason = (
        "attention over codes is not faster up to 8,192 tokens here"
        if tokens is None
        else (f"attention over codes is faster from {tokens:,} tokens on here; contexts as long can name it")
    )
    plan.skipped.append(Skip("KVCacheConfig(bits=8)", reason))


def _few_bits(
    plan: Plan, anatomy: Anatomy, text: CalibrationText, max_kl: float, progress: Callable[[], None] | None
) -> list[Config]:
    """Choose the bits of the weights; an empty list, and the reason in the plan, where there is nothing to choose."""
    name = WeightOnlyConfig.__name__
    if obstacles := Patcher.for_config(WeightOnlyConfig()).obstacles(anatomy):
        plan.skipped.append(Skip(name, "; ".join(obstacle.rstrip(".") for obstacle in obstacles)))
        return []
    reference = QualityReference(anatomy.model, text)
    choice = choose_bits(anatomy, plan.goal, reference, max_kl, progress)
    if choice.config is None:
        plan.skipped.append(Skip(name, f"even 8 bits cost more than max_kl={max_kl:g}: {choice.quality}"))
        return []
    plan.quality = choice.quality
    if plan.goal == "memory" or anatomy.prepared is None:
        return [choice.config]
    slower = slower_products(anatomy, choice.config)
    if not slower:
        return [choice.config]
    reason = f"products that are not faster in few bits here stay as they are: {len(slower)}, {slower[0]} first"
    plan.skipped.append(Skip(name, reason))
    head = anatomy.model.get_output_embeddings()
    is_slow = {anatomy.model.get_submodule(path): True for path in slower}
    fewer = replace(
        choice.config,
        layers=(*((path, None) for path in slower), *choice.config.pairs),
        head=None if head in is_slow else choice.config.head,
    )
    if not Patcher.for_config(fewer).obstacles(anatomy):
        plan.quality = measured(anatomy, fewer, reference)
    return [fewer]


def offer(plan: Plan, anatomy: Anatomy, configs: list[Config]) -> None:
    """Put every candidate without obstacles into the plan; of two that claim one place the first."""
    claims: dict[str, str] = {}
    for config in configs:
        patcher, name = Patcher.for_config(config), type(config).__name__
        try:
            obstacles = patcher.obstacles(anatomy)
        except Exception as error:  # of a model that is made otherwise than any that was thought of
            obstacles = [f"it could not be found out whether it fits ({described(error)})"]
        if not obstacles and isinstance(config, VERIFIERS) and "decoder layers" in claims:
            obstacles = ["decoder layers run natively, their attention included"]
        if not obstacles and patcher.occupies in claims:
            obstacles = [f"{claims[patcher.occupies]} is preferred for the {patcher.occupies}"]
        if obstacles:
            plan.skipped.append(Skip(name, "; ".join(obstacle.rstrip(".") for obstacle in obstacles)))
        else:
            claims[patcher.occupies] = name
            plan.steps.append(Step(config))


def _verify(plan: Plan, anatomy: Anatomy, progress: Callable[[], None] | None) -> None:
    """Apply each candidate once; one that fails, by its own check or otherwise, is left out with the reason."""
    for step in list(plan.steps):
        try:
            applied(Plan(steps=[step]), anatomy).undo()
        except HfAccelError as error:
            plan.steps.remove(step)
            plan.skipped.append(Skip(name_of(step), str(error)))
        if progress is not None:
            progress()
