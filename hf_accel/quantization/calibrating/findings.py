"""What calibrated rounding did to each product, for the report: whether it did what it says can be read off it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from hf_accel.errors import UnsupportedModelError
from hf_accel.ops.affine import Affine, dequantize, quantize
from hf_accel.ops.gptq import Solved, energy, loss
from hf_accel.quantization.observing import Moment

MOST_FALLBACKS = 0.25
"""Above this share of the weights that were rounded without calibration, calibrating has failed."""
MOST_ERROR = 0.97
"""A squared error of outputs of more than this share of that of rounding to nearest says that nothing was solved."""
_ROWS = 256  # of a weight, by which rounding to nearest is compared
_OUTLIER = 100.0  # times the median of the mean squares of the inputs


@dataclass(frozen=True)
class Finding:
    """One product.

    tokens: positions that its moment was taken over; error, error_of_rounding: squared error of its outputs on the
    text as a share of their square, with these codes and with rounding to nearest (on some rows of the weight);
    clipped: share of weights outside of the grid when they were rounded; changed: share of codes that differ from
    rounding to nearest; outliers: inputs with a mean square of more than 100 times their median; damping: what was
    added to the Hessian's diagonal, as a share of its mean; reason: why it was rounded to nearest, or "".
    """

    path: str
    bits: int
    weights: int
    tokens: int = 0
    error: float | None = None
    error_of_rounding: float | None = None
    clipped: float = 0.0
    changed: float = 0.0
    outliers: int = 0
    damping: float | None = None
    reason: str = ""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def found(
    path: str,
    weight: Tensor,
    solved: Solved,
    moment: Moment,
    damping: float | None,
    scales: tuple[Tensor, Tensor] | None = None,
) -> Finding:
    """Return what solving did to a weight [N, K].

    scales: by what its columns [K] were multiplied and its rows [N] divided before; rounding to nearest, with which it
    is compared, is that of the weight as it was.
    """
    affine = solved.affine
    rows = torch.linspace(0, len(weight) - 1, min(_ROWS, len(weight)), device=weight.device).round().long()
    some = weight.detach()[rows].double()
    by = 1.0 if scales is None else scales[0].double() / scales[1].double()[rows, None]
    plain = quantize((some / by).float(), affine.scheme, affine.scales.dtype)
    part = Affine(
        affine.codes[rows], affine.scales[rows], None if affine.zeros is None else affine.zeros[rows], affine.scheme
    )
    total = energy(some, moment.total) or 1.0
    low, high = affine.scheme.lowest - 0.5, affine.scheme.highest + 0.5
    power = moment.total.diagonal()
    return Finding(
        path,
        affine.scheme.bits,
        weight.numel(),
        moment.count,
        loss(some, part, moment.total) / total,
        energy(some - dequantize(plain).double() * by, moment.total) / total,
        float(((solved.values < low) | (solved.values > high)).float().mean()),
        float((part.codes != plain.codes).float().mean()),
        int((power > _OUTLIER * power.median()).sum()),
        damping,
    )


class Calibration:
    """The section of a report: what was found of every product, and notes on the text and the run.

    powers: path -> mean squares [parts, K] of what a product read in parts of the text of `part_rows` rows of
    `row_tokens` tokens; see `powers.py`.
    """

    def __init__(self, findings: Sequence[Finding], notes: Iterable[str] = ()) -> None:
        self.findings, self.notes = list(findings), list(notes)
        self.powers: dict[str, Tensor] = {}
        self.part_rows = self.row_tokens = 0

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return {"products": [finding.to_dict() for finding in self.findings], "notes": list(self.notes)}

    def __str__(self) -> str:
        solved = [finding for finding in self.findings if finding.error is not None]
        tokens = max((finding.tokens for finding in solved), default=0)
        lines = [f"{len(solved)} of {len(self.findings)} products solved on {tokens:,} tokens"]
        if solved:
            weights = sum(finding.weights for finding in solved)

            def mean(name: str) -> float:
                return sum(getattr(finding, name) * finding.weights for finding in solved) / weights

            worst = max(solved, key=lambda finding: finding.error or 0.0)
            lines.append(
                f"squared error of outputs {mean('error'):.2%} (rounding to nearest {mean('error_of_rounding'):.2%}), "
                f"most in {worst.path}: {worst.error:.2%}; {mean('changed'):.1%} of codes differ, "
                f"{mean('clipped'):.1%} clipped"
            )
        for reason in dict.fromkeys(finding.reason for finding in self.findings if finding.reason):
            paths = [finding.path for finding in self.findings if finding.reason == reason]
            lines.append(f"rounded to nearest, {reason}: {len(paths)}, {paths[0]} first")
        return "\n".join([*lines, *self.notes])


def check(findings: Sequence[Finding], *, is_solved: bool = True) -> None:
    """Raise unless calibration did what it says; `is_solved`: products were solved and not only scaled or refined.

    Raises:
        UnsupportedModelError: too many weights were rounded to nearest after all, or outputs are as far off as by that.
    """
    total = sum(finding.weights for finding in findings)
    fallen = [finding for finding in findings if finding.reason]
    share = sum(finding.weights for finding in fallen) / max(1, total)
    if share > MOST_FALLBACKS:
        raise UnsupportedModelError(
            f"{share:.0%} of the weights could not be calibrated ({fallen[0].path}: {fallen[0].reason}), more than "
            f"{MOST_FALLBACKS:.0%}. Give more or other text, or round them plainly with WeightOnlyConfig."
        )
    solved = [finding for finding in findings if finding.error is not None]
    after, before = (sum(getattr(f, name) or 0.0 for f in solved) for name in ("error", "error_of_rounding"))
    if is_solved and before and not after < MOST_ERROR * before:
        raise UnsupportedModelError(
            f"On the calibration text the outputs of {len(solved)} products are off by {after / len(solved):.2%}, by "
            f"{before / len(solved):.2%} where they are only rounded: calibrating gained nothing. Give other text, or "
            "use WeightOnlyConfig."
        )
