"""Turns a goal into a plan: every candidate is timed on this machine, on this model; losers are reported, not applied.

All candidates together against stock, and each left out in turn, alternating in the same rounds: what a candidate is
worth is what a token costs without it. A second or two for a model of a billion parameters.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from transformers import DynamicCache, PreTrainedModel

from hf_accel.attention import AttentionConfig
from hf_accel.cache import KVCacheConfig
from hf_accel.cache.shapes import layer_shapes
from hf_accel.calibration import DEFAULT_MAX_KL, calibration_text, choose_bits, losers, measured
from hf_accel.core.anatomy import Anatomy
from hf_accel.core.config import Config
from hf_accel.core.drift import CACHE
from hf_accel.core.hosting import Host
from hf_accel.core.journal import Journal
from hf_accel.core.patcher import Patcher, Stage
from hf_accel.core.plan import Plan, Step, new_report
from hf_accel.core.report import Skip, Speed
from hf_accel.decoding import DecodingConfig
from hf_accel.errors import ConfigError, VerificationError
from hf_accel.kernels import native
from hf_accel.layers import DecoderBlockConfig, NativeLinearConfig, SharedProjectionConfig
from hf_accel.layers.audit import evaluating
from hf_accel.measure import alternate, random_prompt, read_bandwidth, timed_generate
from hf_accel.measure.break_even import break_even
from hf_accel.measure.quality import CalibrationText, QualityReference
from hf_accel.quantization import CompressedTensorsConfig, WeightOnlyConfig
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
BUDGET_S = 1.5
PROMPT_TOKENS = 8
VERIFY_TOKENS = 64
# these take no time and gain none on random prompts, of which nothing can be foretold; they watch over themselves
GOVERNED = (SpeculativeConfig,)
# what these change only shows in steps of several query tokens, as speculation and chunked prompts make them
VERIFIERS = (AttentionConfig,)
# a candidate may cost a token this much time before it counts as a loss: less cannot be told from noise
NOISE = 0.02


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
    anatomy.prepared = WeakKeyDictionary()
    configs: list[Config] = [candidate() for candidate in GOALS[goal]]
    # drafts that cost no memory; a draft model is there to be used
    configs.append(SpeculativeConfig(drafter="lookup" if anatomy.draft_model is None else ("lookup", "model")))
    with evaluating(anatomy.model):
        if goal != "exact":
            text = calibration_text(anatomy.model, calibration, tokenizer)
            configs = _few_bits(plan, anatomy, text, max_kl or DEFAULT_MAX_KL[goal], progress) + configs
            _cache_bits(plan, anatomy)
        offer(plan, anatomy, configs)
        governed = [step for step in plan.steps if isinstance(step.config, GOVERNED)]
        plan.steps = plan.without(*GOVERNED).steps
        _verify(plan, anatomy)
        if plan.steps:
            _time(plan, anatomy, progress)
        if any(isinstance(step.config, DecodingConfig) for step in plan.steps):
            plan.steps += governed
        else:
            plan.skipped += [Skip(_name(step), "it needs the token loop, which is left out") for step in governed]
    for step in plan.steps:
        plan.weight_bytes = Patcher.for_config(step.config).weight_bytes(anatomy) or plan.weight_bytes
    if plan.weight_bytes is None:
        plan.quality = None
    return plan


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
    slower = losers(anatomy, choice.config)
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
        obstacles = patcher.obstacles(anatomy)
        if not obstacles and isinstance(config, VERIFIERS) and "decoder layers" in claims:
            obstacles = ["decoder layers run natively, their attention included"]
        if not obstacles and patcher.occupies in claims:
            obstacles = [f"{claims[patcher.occupies]} is preferred for the {patcher.occupies}"]
        if obstacles:
            plan.skipped.append(Skip(name, "; ".join(obstacle.rstrip(".") for obstacle in obstacles)))
        else:
            claims[patcher.occupies] = name
            plan.steps.append(Step(config))


def _verify(plan: Plan, anatomy: Anatomy) -> None:
    """Apply each candidate once; one that fails its own check is left out with what the check found."""
    for step in list(plan.steps):
        try:
            _applied(Plan(steps=[step]), anatomy).undo()
        except VerificationError as error:
            plan.steps.remove(step)
            plan.skipped.append(Skip(_name(step), str(error)))


def _applied(plan: Plan, anatomy: Anatomy) -> Journal:
    journal = Journal()
    plan.apply(anatomy, Host(journal, new_report(anatomy, plan)))
    return journal


@dataclass(frozen=True)
class _Way:
    """One set of steps to time."""

    anatomy: Anatomy
    plan: Plan
    new_tokens: int

    def decode(self) -> float:
        """Return the mean seconds per token at batch 1 with these steps applied."""
        with self._applied() as model:
            prompt = random_prompt(model, PROMPT_TOKENS)
            inputs = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt), "pad_token_id": 0}
            return timed_generate(model, inputs, self.new_tokens).token_s

    @torch.no_grad()
    def verify(self) -> float:
        """Return the median seconds of a step of several query tokens over a left-padded batch and its cache."""
        with self._applied() as model:
            ids = random_prompt(model, VERIFY_TOKENS, batch=2)
            mask = torch.ones_like(ids)
            mask[0, :8] = 0
            cache, seconds = DynamicCache(config=model.config.get_text_config(decoder=True)), []
            for start, stop in ((0, 32), (32, 40), (40, 48), (48, 56), (56, 64)):
                begin = time.perf_counter()
                model(ids[:, start:stop], attention_mask=mask[:, :stop], use_cache=True, **{CACHE: cache})
                seconds.append(time.perf_counter() - begin)
            return statistics.median(seconds[1:])

    @contextmanager
    def _applied(self) -> Iterator[PreTrainedModel]:
        journal = _applied(self.plan, self.anatomy) if self.plan.steps else Journal()
        try:
            yield self.anatomy.model
        finally:
            journal.undo()


def _time(plan: Plan, anatomy: Anatomy, progress: Callable[[], None] | None) -> None:
    """Measure the plan, drop what does not pay, and note each step's gain and the speed of the whole."""
    config = anatomy.model.config.get_text_config(decoder=True)
    first = _Way(anatomy, plan, 4).decode()
    plans = {"stock": Plan(), "all": plan}
    timed_steps = [step for step in plan.steps if not isinstance(step.config, VERIFIERS)]
    if plan.goal == "memory":  # few bits are there to save memory, whatever they do to speed
        timed_steps = [step for step in timed_steps if not isinstance(step.config, WeightOnlyConfig)]
    plans |= {_name(step): plan.without(type(step.config)) for step in timed_steps}
    room_tokens = (getattr(config, "max_position_embeddings", None) or 4096) - PROMPT_TOKENS
    new_tokens = max(3, min(33, room_tokens, round(BUDGET_S / 2 / len(plans) / first)))
    ways = {name: _Way(anatomy, way, new_tokens).decode for name, way in plans.items()}
    rounds = max(2, min(7, round(BUDGET_S / (len(plans) * (new_tokens + 1) * first))))
    timed = alternate(ways, rounds, progress, budget_s=BUDGET_S)
    # the least disturbed run of each way: other programs only ever add time
    least = {name: min(seconds) for name, seconds in timed.items()}
    suspects = [_name(step) for step in timed_steps if least[_name(step)] < least["all"] * (1 - NOISE)]
    if suspects:  # one disturbed run must not cost a step that pays
        again = alternate({name: ways[name] for name in ("all", *suspects)}, 3, progress, budget_s=BUDGET_S)
        least |= {name: min(least[name], *seconds) for name, seconds in again.items()}
    slowest = min(timed_steps, key=lambda step: least[_name(step)], default=None)
    worst = max(least["stock"], least[_name(slowest)] / (1 - NOISE)) if slowest is not None else 0.0
    if slowest is not None and plan.steps[1:] and least["all"] > worst:
        # one step that costs more than all others gain: leave it out and look again
        gain = least[_name(slowest)] / least["all"]
        plan.skipped.append(Skip(_name(slowest), _loss(gain)))
        plan.steps.remove(slowest)
        _time(plan, anatomy, progress)
        return
    if least["all"] > least["stock"] and plan.goal != "memory":
        slower = f"all steps took {1e3 * least['all']:.2f} ms per token, stock {1e3 * least['stock']:.2f} ms"
        plan.skipped += [Skip(_name(step), slower) for step in plan.steps]
        plan.steps = []
        return
    kept = []
    for step in plan.steps:
        if step not in timed_steps and not isinstance(step.config, VERIFIERS):
            kept.append(step)
            continue
        if isinstance(step.config, VERIFIERS):
            if room_tokens < VERIFY_TOKENS:
                plan.skipped.append(Skip(_name(step), "the model's context is too short to measure what it gains"))
                continue
            without = plan.without(type(step.config))
            pair = {"with": _Way(anatomy, plan, 0).verify, "without": _Way(anatomy, without, 0).verify}
            times = {name: min(values) for name, values in alternate(pair, 3, progress).items()}
            gain, needed = times["without"] / times["with"], 1 + NOISE
        else:
            gain, needed = least[_name(step)] / least["all"], 1 - NOISE
        if gain < needed:
            plan.skipped.append(Skip(_name(step), _loss(gain)))
        else:
            kept.append(Step(step.config, round(gain, 3)))
    if len(kept) < len(plan.steps):  # what is reported is the speed of the steps that stay
        plan.steps = kept
        ways = {"stock": ways["stock"], "all": _Way(anatomy, plan, new_tokens).decode}
        timed = alternate(ways, rounds, progress, budget_s=BUDGET_S)
    plan.steps = kept
    plan.measured = Speed(
        stock_tokens_per_s=1 / statistics.median(timed["stock"]),
        patched_tokens_per_s=1 / statistics.median(timed["all"]),
        weight_bytes=_read_bytes(plan, anatomy),
        read_bandwidth_bytes_per_s=read_bandwidth(anatomy.device),
        prompt_tokens=PROMPT_TOKENS,
        threads=torch.get_num_threads(),
    )


def _read_bytes(plan: Plan, anatomy: Anatomy) -> int:
    """Return the bytes of weights that a token reads with the plan applied."""
    if all(Patcher.for_config(step.config).stage is not Stage.WEIGHTS for step in plan.steps):
        return anatomy.read_bytes
    journal = _applied(plan, anatomy)
    try:
        return anatomy.read_bytes
    finally:
        journal.undo()


def _loss(gain: float) -> str:
    return f"it does not pay here: without it a step takes {gain:.2f} of the time"


def _name(step: Step) -> str:
    return type(step.config).__name__
