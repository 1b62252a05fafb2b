"""The ladder of one model: which attention kernel answers which call, what goes down it, and why.

The back end that was asked for is the first; what it cannot do goes on to those after it, the reference last. `auto`
asks the one that trials chose for a kind of mask and a length, or stock's attention where nothing was faster. A kernel
that fails in a call is passed by in calls of that kind from then on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from hf_accel.attention.cases import Shape, case
from hf_accel.attention.demands import Demand
from hf_accel.attention.first_use import FirstUse, is_planned
from hf_accel.attention.kernel import AttentionKernel
from hf_accel.attention.kernels import KERNELS
from hf_accel.attention.question import Question, Visible, question_of
from hf_accel.attention.selftest import verdict
from hf_accel.attention.statistics import AttentionStatistics
from hf_accel.attention.trials import GAIN, STOCK, Kind, Stock, chosen, grouped_gain
from hf_accel.errors import described

AUTO = "auto"
MASKS = ("causal", "padded", "boolean")
FIRST_USE = "flash until planned"  # as the report counts these calls


class Plan(NamedTuple):
    """The kernel that answers a question, None for stock's attention, and those passed by, with reasons."""

    kernel: AttentionKernel | None
    falls: tuple[tuple[str, str], ...] = ()


class Ladder:
    """Answers the attention calls of one model. asked: the name of a back end, or "auto"."""

    is_probe = False

    def __init__(self, asked: str) -> None:
        self.asked = asked
        self.statistics = AttentionStatistics(asked)
        self.reads_grouped = True  # few queries read grouped keys and values as they are
        self.first_use: FirstUse | None = None
        self._plans: dict[Question, Plan] = {}
        self._failed: dict[tuple[Question, str], str] = {}

    @property
    def takes_bands(self) -> bool:
        """Whether a kernel may be asked that takes bands as they are: else masks are made as stock makes them."""
        return self.asked != AUTO or any(each.kernel != STOCK for each in self.statistics.chosen)

    @property
    def pays(self) -> bool:
        """Whether anything was faster than stock's attention."""
        return self.reads_grouped or self.takes_bands or self.first_use is not None

    def prepare(self, demands: list[Demand], stock: Callable[[Demand], Stock], longest: int) -> None:
        """Test the kernels on what a model demands and, for `auto`, time those that pass.

        stock: returns stock's attention as it serves a demand. longest: tokens of a text of the model.
        """
        names = [name for name in KERNELS if self._is_candidate(name, demands)]
        for name in names:
            if found := next((v for d in demands if (v := verdict(name, shape_of(d.question)))), None):
                self.statistics.refused[name] = found
        if self.asked != AUTO:
            return
        passed = tuple(name for name in names if name not in self.statistics.refused)
        self.reads_grouped = False
        for demand in demands:
            question, shape = demand.question, shape_of(demand.question)
            threads = torch.get_num_threads()
            groups = question.groups
            if shape.device.type == "cpu":  # as many heads as keep the threads busy
                groups = min(groups, max(1, threads // shape.ratio))
            if shape.ratio > 1 and question.softcap is None and not question.has_sinks:
                self.reads_grouped |= grouped_gain(shape, groups, stock(demand), threads) > GAIN
            rest = (question.softcap, question.has_sinks)
            kinds = [Kind(mask, None, *rest) for mask in MASKS]
            if question.window is not None:
                kinds += [Kind(mask, question.window, *rest) for mask in MASKS[:2]]
            for kind in kinds:
                tried = chosen(kind, shape, groups, passed, stock(demand), longest, threads)
                self.statistics.chosen += [each for each in tried if each not in self.statistics.chosen]

    def expect_plans(self, demands: list[Demand]) -> None:
        """Serve prompts of new lengths by what plans nothing, if torch, whose attention is stock's, would plan them."""
        if any(_is_planned(shape_of(demand.question)) for demand in demands):
            self.first_use = FirstUse()

    def _is_candidate(self, name: str, demands: list[Demand]) -> bool:
        kernel = KERNELS[name]
        if self.asked != AUTO:
            return name == self.asked
        return all(kernel.is_tried(d.question.device) for d in demands) and kernel.missing() is None

    def attend(
        self,
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        visible: Visible,
        scale: float,
        softcap: float | None,
        sinks: torch.Tensor | None,
        stock: Callable[[], torch.Tensor],
    ) -> torch.Tensor:
        """Return attention [B, T, H, Dv] of the first kernel that answers the question of this call."""
        question = question_of(query, key, value, visible, softcap, sinks)
        while True:
            plan = self._plans.get(question)
            if plan is None:
                plan = self._plans[question] = self._plan(question)
            kernel, falls = plan
            name = STOCK if kernel is None else kernel.name
            if self.first_use is not None and self._may_plan(name):
                first = self.first_use.attend(query, key, value, visible, scale)
                if first is not None:
                    self.statistics.count(FIRST_USE)
                    return first
            if kernel is None:
                output = stock()
                break
            try:
                output = kernel.attend(query, key, value, visible, scale, softcap, sinks)
                break
            except Exception as error:  # whatever its package raises; the next one serves the call
                self._failed[question, kernel.name] = f"it failed ({described(error)})"
                self._plans.pop(question, None)
        self.statistics.count(name, falls)
        return output

    def _may_plan(self, name: str) -> bool:
        return name in (STOCK, "sdpa") or (name == "cudnn" and self.asked == AUTO)

    def _plan(self, question: Question) -> Plan:
        falls: list[tuple[str, str]] = []
        for name in self._order(question):
            if name == STOCK:
                return Plan(None, tuple(falls))
            kernel = KERNELS[name]
            reason = self._failed.get((question, name)) or kernel.obstacle(question)
            if reason is None:
                reason = self.statistics.refused.get(name) or verdict(name, shape_of(question))
            if reason is None:
                return Plan(kernel, tuple(falls))
            falls.append((name, reason))
        return Plan(None, tuple(falls))

    def _order(self, question: Question) -> list[str]:
        names = list(KERNELS)
        if self.asked != AUTO:
            below = [name for name in names[names.index(self.asked) + 1 :] if KERNELS[name].missing() is None]
            return [self.asked, *below]
        kind = str(Kind(question.mask, question.window, question.softcap, question.has_sinks))
        found = [each for each in self.statistics.chosen if each.kind == kind]
        if not found:
            return [STOCK]
        best = max((each for each in found if each.positions <= question.positions), default=found[0], key=_positions)
        return [STOCK] if best.kernel == STOCK else [best.kernel, STOCK]


def _positions(chosen: Any) -> int:
    return int(chosen.positions)


def _is_planned(shape: Shape) -> bool:
    if shape.device.type == "cpu":
        return False
    call = case("causal", shape, 64, starts=(0,))
    return is_planned(call.query, call.key, call.value)


def shape_of(question: Question) -> Shape:
    """Return what a kernel is tested with for a question."""
    return Shape(question.device, question.dtype, question.sizes, question.heads // question.groups)
