"""Whether steps of several tokens equal steps of one on this model, how they round, and what they take.

Drafts stand on that equality, and stock does not promise it: masks and caches may disagree past a window, experts may
depend on what else is in the batch. So it is tried, on the model itself and, where there are windows, on a copy with
small ones: tokens one by one as plain decoding takes them in, against steps of up to 32 that are partly taken back,
and against two rows of different lengths. The same forward passes are timed; about twenty in all.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace

import torch
from torch import nn

from hf_accel.core.calls.rows import apart_obstacle
from hf_accel.core.model.rope import moving_rope, unfamiliar_lengths
from hf_accel.errors import described
from hf_accel.kernels.weights import PackedProduct
from hf_accel.ops import tolerances
from hf_accel.speculative.costs import RowCosts, settle
from hf_accel.speculative.trials import PROMPT_TOKENS, WIDEST, Trials
from hf_accel.speculative.windows import NARROW, narrowed, widest_window

SMALL_ROWS = 16  # up to here products of few rows may have kernels of their own
WIDTHS = (2, 4, 8, 16, WIDEST)
NEEDED = 8  # up to here every width is tried, whatever it takes
KEPT = {8: 2, 16: 2}  # how many tokens of a step stay, all others are taken back
HOPELESS = 6.0  # drafts never pay where a step takes so many times as long as a single one
OTHER = "steps of several tokens give other logits than single ones"


@dataclass(frozen=True)
class Tolerance:
    """What rounding explains on a model. is_rough: whether it may also turn a router's choice between experts."""

    limit: float
    is_rough: bool

    @classmethod
    def of(cls, model: nn.Module) -> Tolerance:
        dtype: torch.dtype = model.dtype  # type: ignore[assignment]
        is_packed = any(isinstance(module, PackedProduct) for module in model.modules())
        return cls(tolerances.of_step_logits(dtype, is_packed), is_packed or dtype.itemsize <= 2)

    def typical(self, relative: torch.Tensor) -> float:
        """Return the largest difference of all positions, the median where a single position proves nothing."""
        return float(relative.flatten().median() if self.is_rough else relative.max())


@dataclass
class Wide:
    """Steps of several tokens against single ones: relative difference of logits by width, and the largest difference.

    few, many: the latter in steps of up to SMALL_ROWS rows, and in all.
    """

    rows: RowCosts
    relative: dict[int, float]
    few: float
    many: float

    def is_equal(self, tolerance: Tolerance) -> bool:
        return all(difference <= tolerance.limit for difference in self.relative.values())  # not if NaN


@dataclass
class Proof:
    """What was found.

    rounding: how far logits were from those of single steps, in few rows and more; 0 where no text shows it, as in
    fp32. obstacle: why every call is decoded plainly; apart: why batches are; None: they need not be.
    """

    rows: RowCosts
    rounding: tuple[float, float]
    apart_difference: float
    obstacle: str | None = None
    apart: str | None = None


@torch.no_grad()
def prove(trials: Trials) -> Proof:
    """Try steps on the model of `trials`, past its windows, and where rotary embeddings of others' code may change."""
    tolerance = Tolerance.of(trials.model)
    wide = compare(trials, tolerance)
    proof = Proof(wide.rows, (wide.few, wide.many) if tolerance.is_rough else (0.0, 0.0), math.inf)
    if not wide.is_equal(tolerance):
        proof.obstacle = OTHER
        return proof
    proof.obstacle = _far_obstacle(trials, tolerance)
    proof.apart = apart_obstacle(trials.model) if trials.takes_positions else "it takes no positions"
    if proof.apart is None:
        proof.apart_difference = apart_difference(trials, tolerance)
    window = widest_window(trials.model)
    if window is not None and window > NARROW and proof.obstacle is None:
        _pass_window(proof, trials, window, tolerance)
    if proof.apart is None and proof.apart_difference == math.inf:
        proof.apart = "rows of different lengths get other results than alone"
    return proof


def _pass_window(proof: Proof, trials: Trials, window: int, tolerance: Tolerance) -> None:
    """Try the same past windows made small."""
    try:
        model, layers, config = narrowed(trials.model)
        narrow = Trials.of(model, trials.prepare_cache, writes=False, layers=layers, cache_config=config)
        wide = compare(narrow, tolerance, is_timed=False)
    except Exception as error:  # stock itself may fail there
        proof.obstacle = f"steps past the window of {window} tokens could not be tried: {described(error)}"
        return
    # a step of two ends where the window does: what differs there is rounding
    limit = min(tolerance.limit, max(4 * wide.relative[2], tolerance.limit / 8))
    tolerance = replace(tolerance, limit=limit)
    if not wide.is_equal(tolerance):
        proof.obstacle = f"{OTHER} past the window of {window} tokens"
    elif proof.apart_difference < math.inf and apart_difference(narrow, tolerance) == math.inf:
        proof.apart_difference = math.inf
        proof.apart = f"rows of different lengths get other results than alone past the window of {window} tokens"


def _far_obstacle(trials: Trials, tolerance: Tolerance) -> str | None:
    """Return why drafts fail beyond a rope's switch, or around the lengths that foreign rotary code names."""
    rope = moving_rope(trials.model)
    beyond = [] if rope is None else [(n, n) for n in rope.switches if n > trials.first_position]
    around = [(n, max(0, n - PROMPT_TOKENS - NEEDED // 2)) for n in unfamiliar_lengths(trials.model)]
    for length, first in (*beyond, *around):
        try:
            far = Trials.of(trials.model, trials.prepare_cache, writes=False, first_position=first)
            wide = compare(far, tolerance, is_timed=False)
        except (IndexError, RuntimeError, ValueError):
            continue  # stock cannot go there, either
        if not wide.is_equal(tolerance):
            return f"{OTHER} around position {length}"
    return None


@torch.no_grad()
def compare(trials: Trials, tolerance: Tolerance, is_timed: bool = True) -> Wide:
    """Compare steps of several tokens with the single ones of `trials`, and time them."""
    stepper = trials.stepper(1)
    at = PROMPT_TOKENS
    stepper.forward(trials.tokens(0, at))
    stepper.keep([at])
    seconds = {1: trials.single_s}
    wide = Wide(RowCosts(seconds), {}, 0.0, 0.0)

    def step(width: int) -> torch.Tensor:
        start = time.perf_counter()
        logits = stepper.forward(trials.tokens(at, width))
        logits[0, -1, 0].item()  # waits for a device
        seconds[width] = min(seconds.get(width, math.inf), time.perf_counter() - start)
        return logits

    def again(width: int) -> None:
        step(width)
        stepper.keep([at])

    for width in WIDTHS:
        logits = step(width)
        single = trials.expected[:, at:][:, :width]
        difference = _subtract(logits[:, : single.shape[1]], single)
        wide.relative[width] = tolerance.typical(_relative(difference, single))
        wide.many = max(wide.many, float(difference.abs().max()))
        wide.few = wide.many if width <= SMALL_ROWS else wide.few
        at += KEPT.get(width, 0)
        stepper.keep([at])
        if is_timed and width >= NEEDED and seconds[width] > HOPELESS * seconds[1]:
            break
    if is_timed:
        settle(seconds, again)
    return wide


@torch.no_grad()
def apart_difference(trials: Trials, tolerance: Tolerance) -> float:
    """Return how far (relative) two rows that are apart are from each alone; inf: further than rounding, or no way.

    One of them is padded, and both begin in step, as stock's batches are: some models hide padding in a way of theirs.
    """
    found: list[torch.Tensor] = []

    def step(starts: tuple[int, int], width: int) -> None:
        logits = stepper.forward(torch.cat([trials.tokens(start, width) for start in starts]))
        for row, start in enumerate(starts):
            single = trials.expected[:, start:][:, :width]
            found.append(_relative(_subtract(logits[row : row + 1], single), single).flatten())

    n = PROMPT_TOKENS
    try:
        stepper = trials.padded(n)  # row 1 is a token behind in text, not in columns
        stepper.keep([n, n])
        step((n, n - 1), 1)
        stepper.keep([n + 1, n + 1])
        step((n + 1, n), 2)
        stepper.keep([n + 3, n + 2])
        step((n + 3, n + 1), 2)
        stepper.keep([n + 4, n + 3])
        step((n + 4, n + 2), 1)
    except (RuntimeError, ValueError, TypeError, AttributeError, KeyError, IndexError):
        return math.inf  # the model does not take masks of its attention's kind
    relative = torch.cat(found)
    return float(relative.max()) if tolerance.typical(relative) <= tolerance.limit else math.inf


def difference_of(found: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Return the difference [B, T] of logits [B, T, V], relative to those expected."""
    return _relative(_subtract(found, expected), expected.float())


def _subtract(found: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Return the difference; 0 where both are the same infinity."""
    return torch.where(found == expected, 0.0, found.float() - expected.float())


def _relative(difference: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Return the difference [1, T, V] at every position, relative to what was expected."""
    return difference.norm(dim=-1) / expected.masked_fill(expected.isinf(), 0.0).norm(dim=-1).clamp(min=1e-30)
