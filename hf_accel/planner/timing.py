"""Times the steps of a plan on the model itself and drops those that are shown not to pay.

All steps together against stock, and each left out in turn, alternating in the same rounds: what a step is worth is
what a token costs without it. Cost: a second, and for models of a billion parameters some 25 tokens.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from hf_accel.core.calls.report import Speed
from hf_accel.core.drift import CACHE
from hf_accel.core.steps.applying import applied
from hf_accel.core.steps.goal import Gain, Goal
from hf_accel.core.steps.patcher import Patcher, Stage
from hf_accel.core.steps.plan import Plan, Step
from hf_accel.core.steps.setting import Setting
from hf_accel.errors import described
from hf_accel.measure import alternate, random_prompt, read_bandwidth, timed_generate
from hf_accel.planner.trying import drop, drop_what_fails, name_of

BUDGET_S = 0.6
PROMPT_TOKENS = 1
FEWEST_TOKENS, MOST_TOKENS = 3, 33
ROUNDS = 7
VERIFY_TOKENS = 64
# a step may cost a token this much time before it counts as a loss: less cannot be told from noise
NOISE = 0.02
# steps that do the work of what they replace save or cost microseconds of a token: too little to show beside this
OVERHEAD_SHOWS_S = 0.02
FAR = 1.25  # times as long as all steps together: no second look is needed at how much a step gains
# a process that waited for more than its own computing took was not alone on the machine
WAITING = 1.1


@dataclass
class Times:
    """Seconds per token of one way of running the model: by the clock, and of the processor."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def __add__(self, other: Times) -> Times:
        return Times(self.wall + other.wall, self.cpu + other.cpu)

    @property
    def is_disturbed(self) -> bool:
        """Whether other programs took the machine from this one for much of the time."""
        return bool(self.cpu) and sum(self.wall) > WAITING * sum(self.cpu)


def least(seconds: list[float]) -> float:
    """Return the lower quartile: other programs only ever add time, and a single token may be lucky."""
    return sorted(seconds)[len(seconds) // 4]


def spread(seconds: list[float]) -> float:
    """Return how far the lower half of the values lies apart, relative to the least of them."""
    return statistics.median(seconds) / min(seconds) - 1


def is_slower(one: Times, other: Times) -> bool:
    """Return whether `one` is shown to take longer than `other`: by more than noise and what each of them varies by.

    By the clock; where other programs took the machine even from the faster one, by the time of the processor, unless
    the clock shows twice the time.
    """
    if not other.is_disturbed:
        return _is_longer(one.wall, other.wall)
    return _is_longer(one.cpu, other.cpu) or _is_longer(one.wall, other.wall, factor=2.0)


def _is_longer(one: list[float], other: list[float], factor: float = 1 / (1 - NOISE)) -> bool:
    return least(one) > factor * least(other) * (1 + max(spread(one), spread(other)))


def keep_what_pays(plan: Plan, goal: Goal, setting: Setting, beside: tuple[str, ...] = ()) -> None:
    """Measure the plan, drop what does not pay, and note each step's gain and the speed of the whole.

    Stock is the model as it is with the named steps of the plan. beside: the named configs that stood in both.
    """
    timing = _Timing(plan, goal, setting, drop_what_fails(plan, setting))
    if not timing.drop_what_loses():
        return
    timing.judge_steps_of_several_tokens()
    plan.measured = replace(timing.speed(), beside=beside)


@dataclass(frozen=True)
class _Way:
    """One set of steps to time."""

    setting: Setting
    plan: Plan
    new_tokens: int

    def decode(self) -> Times:
        """Return the seconds of each token but the first at batch 1 with these steps applied."""
        with self._applied() as model:
            prompt = random_prompt(model, PROMPT_TOKENS)
            inputs = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt), "pad_token_id": 0}
            run = timed_generate(model, inputs, self.new_tokens)
            return Times(run.tokens_s, run.tokens_cpu_s)

    @torch.no_grad()
    def verify(self) -> Times:
        """Return the seconds of steps of several query tokens over a left-padded batch and its cache."""
        with self._applied() as model:
            ids = random_prompt(model, VERIFY_TOKENS, batch=2)
            mask = torch.ones_like(ids)
            mask[0, :8] = 0
            cache, found = DynamicCache(config=model.config.get_text_config(decoder=True)), Times()
            for start, stop in ((0, 32), (32, 40), (40, 48), (48, 56), (56, 64)):
                wall, cpu = time.perf_counter(), time.process_time()
                model(ids[:, start:stop], attention_mask=mask[:, :stop], use_cache=True, **{CACHE: cache})
                if start:
                    found.wall.append(time.perf_counter() - wall)
                    found.cpu.append(time.process_time() - cpu)
            return found

    @contextmanager
    def _applied(self) -> Iterator[PreTrainedModel]:
        with applied(self.plan, self.setting) if self.plan.steps else nullcontext():
            yield self.setting.model


class _Timing:
    """The steps of one plan, which it takes out where they fail or lose."""

    def __init__(self, plan: Plan, goal: Goal, setting: Setting, token_s: float) -> None:
        """token_s: about what a token takes by stock."""
        self.plan, self.goal, self.setting = plan, goal, setting
        config = setting.model.config.get_text_config(decoder=True)
        self.room_tokens = (getattr(config, "max_position_embeddings", None) or 4096) - PROMPT_TOKENS
        self.times: dict[str, Times] = {}
        self.new_tokens = FEWEST_TOKENS
        self.token_s = token_s
        self.times_everything = False

    def drop_what_loses(self) -> bool:
        """Time the steps and drop those that are shown to cost more than they gain; return whether any is left."""
        plan = self.plan
        while plan.offered:
            steps = self._timed_steps()
            plans = {"stock": Plan(steps=plan.named), "all": plan} | {
                name_of(step): plan.without(type(step.config)) for step in steps
            }
            self.new_tokens = self._tokens(len(plans))
            rounds = round(BUDGET_S / (len(plans) * (self.new_tokens + 1) * self.token_s))
            self.times = self._first_times(plans, max(2, min(ROUNDS, rounds)))
            losers = [step for step in steps if is_slower(self.times["all"], self.times[name_of(step)])]
            if losers or is_slower(self.times["all"], self.times["stock"]):  # one disturbed run must not cost a step
                again = {name: plans[name] for name in ("stock", "all", *map(name_of, losers))}
                for name, more in self._alternate(again, 3).items():
                    self.times[name] += more
                losers = [step for step in losers if is_slower(self.times["all"], self.times[name_of(step)])]
            loses = is_slower(self.times["all"], self.times["stock"]) and not self.goal.saves_memory
            if not loses and not losers:
                break
            if loses and losers:  # one step may cost more than all others gain: leave it out and look again
                losers = [min(losers, key=self._gain)]
            if losers:
                for step in losers:
                    drop(self.plan, [step], _loss(self._gain(step)))
                if not loses:  # what is reported is the speed of the steps that stay
                    self.times |= self._alternate({"stock": plans["stock"], "all": plan}, 2)
                    break
            elif not self.times_everything:
                self.times_everything = True
                continue
            else:
                ms = {name: 1e3 * least(self.times[name].wall) for name in ("all", "stock")}
                slower = f"all steps took {ms['all']:.2f} ms per token, stock {ms['stock']:.2f} ms"
                drop(self.plan, self.plan.offered, slower)
        plan.steps = [self._with_gain(step) for step in plan.steps]
        return bool(plan.offered)

    def _first_times(self, plans: dict[str, Plan], rounds: int) -> dict[str, Times]:
        """Time all ways; where tokens take long, once what is far from the plan already after one round."""
        if self.token_s <= OVERHEAD_SHOWS_S:
            return self._alternate(plans, rounds)
        times = self._alternate(plans, 1)
        least_s = {name: least(found.wall) for name, found in times.items()}
        close = {name: plan for name, plan in plans.items() if least_s[name] < FAR * least_s["all"]}
        for name, more in self._alternate(close, rounds - 1).items():
            times[name] += more
        return times

    def judge_steps_of_several_tokens(self) -> None:
        """Keep what gains in steps of several tokens only where it is faster there."""
        for step in [step for step in self.plan.offered if _patcher(step).gain is Gain.SEVERAL_TOKENS]:
            if self.room_tokens < VERIFY_TOKENS:
                drop(self.plan, [step], "the model's context is too short to measure what it gains")
                continue
            pair = {
                "with": self._way(self.plan).verify,
                "without": self._way(self.plan.without(type(step.config))).verify,
            }
            try:
                runs = alternate(pair, 3, self.setting.progress, budget_s=BUDGET_S)
            except Exception as error:
                drop(self.plan, [step], f"passes of several tokens over a padded batch fail here ({described(error)})")
                continue
            seconds = {name: least([s for times in found for s in times.wall]) for name, found in runs.items()}
            gain = seconds["without"] / seconds["with"]
            if gain < 1 + NOISE:
                drop(self.plan, [step], _loss(gain))
            else:
                self.plan.steps = [replace(s, gain=round(gain, 3)) if s is step else s for s in self.plan.steps]

    def speed(self) -> Speed:
        """Return the speed of stock and of the steps that are left."""
        return Speed(
            stock_tokens_per_s=1 / statistics.median(self.times["stock"].wall),
            patched_tokens_per_s=1 / statistics.median(self.times["all"].wall),
            weight_bytes=self._read_bytes(),
            read_bandwidth_bytes_per_s=read_bandwidth(self.setting.anatomy.device),
            prompt_tokens=PROMPT_TOKENS,
            threads=torch.get_num_threads(),
        )

    def _timed_steps(self) -> list[Step]:
        found = []
        for step in self.plan.offered:
            patcher = _patcher(step)
            is_overhead = patcher.gain is Gain.OVERHEAD and self.token_s > OVERHEAD_SHOWS_S
            if patcher.gain is Gain.SEVERAL_TOKENS or (is_overhead and not self.times_everything):
                continue
            if self.goal.saves_memory and patcher.saves_memory:
                continue
            found.append(step)
        return found

    def _tokens(self, ways: int) -> int:
        wanted = round(BUDGET_S / 2 / ways / self.token_s)
        return max(FEWEST_TOKENS, min(MOST_TOKENS, self.room_tokens, wanted))

    def _alternate(self, plans: dict[str, Plan], rounds: int) -> dict[str, Times]:
        ways = {name: self._way(plan).decode for name, plan in plans.items()}
        runs = alternate(ways, rounds, self.setting.progress, budget_s=BUDGET_S)
        return {name: sum(found, Times()) for name, found in runs.items()}

    def _way(self, plan: Plan) -> _Way:
        return _Way(self.setting, plan, self.new_tokens)

    def _gain(self, step: Step) -> float:
        return least(self.times[name_of(step)].wall) / least(self.times["all"].wall)

    def _with_gain(self, step: Step) -> Step:
        return replace(step, gain=round(self._gain(step), 3)) if name_of(step) in self.times else step

    def _read_bytes(self) -> int:
        """Return the bytes of weights that a token reads with the plan applied."""
        if all(_patcher(step).stage > Stage.WEIGHTS for step in self.plan.steps):
            return self.setting.anatomy.read_bytes
        with applied(self.plan, self.setting):
            return self.setting.anatomy.read_bytes


def _patcher(step: Step) -> Patcher[Any]:
    return Patcher.for_config(step.config)


def _loss(gain: float) -> str:
    return f"it does not pay here: without it a step takes {gain:.2f} of the time"
