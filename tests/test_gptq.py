"""The solver against the equations as they are written, and what it promises of every Hessian."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hf_accel.ops import gptq
from hf_accel.ops.affine import Affine, Scheme, dequantize, encode, quantize, quantize_groups
from hf_accel.ops.gptq import Factor, loss, solve

SCHEMES = [Scheme(4, 32), Scheme(3, 64), Scheme(2, 32), Scheme(2, 64, False), Scheme(4, 128, False), Scheme(8)]


def drawn(rows: int = 24, columns: int = 128, tokens: int = 600, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return a weight [N, K], and the second moment of inputs that hang together and have large channels."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    inputs = torch.randn(tokens, columns, generator=generator, dtype=torch.float64) @ mixing
    inputs *= torch.rand(columns, generator=generator, dtype=torch.float64) * 3 + 0.1
    return torch.randn(rows, columns, generator=generator), inputs.T @ inputs


def damped(moment: Tensor) -> Tensor:
    return moment + 0.01 * moment.diagonal().mean() * torch.eye(len(moment), dtype=torch.float64)


def textbook(weight: Tensor, moment: Tensor, scheme: Scheme, damping: float, is_ordered: bool) -> Tensor:
    """Return the codes by the equations of Optimal Brain Quantization: H^-1 loses a row and a column at each step."""
    n, k = weight.shape
    group = scheme.columns_per_scale(k)
    hessian = moment.clone()
    order = torch.argsort(hessian.diagonal(), descending=True) if is_ordered else torch.arange(k)
    hessian += torch.eye(k, dtype=torch.float64) * damping * hessian.diagonal().mean()
    inverse = torch.linalg.inv(hessian)
    left = weight.double().clone()
    codes = torch.zeros(n, k, dtype=torch.int8)
    _, scales, zeros = quantize_groups(weight.view(n, -1, group), scheme, torch.bfloat16)
    for place, column in enumerate(order.tolist()):
        if not is_ordered and column % group == 0:  # scales of what is left of the weight by now
            found = quantize_groups(left[:, None, column : column + group].float(), scheme, torch.bfloat16)
            scales[:, column // group], zeros_now = found[1][:, 0], found[2]
            if zeros is not None and zeros_now is not None:
                zeros[:, column // group] = zeros_now[:, 0]
        scale = scales[:, column // group, 0].double()
        zero = None if zeros is None else zeros[:, column // group, 0].double()
        code = encode(left[:, column].clone(), scale, zero, scheme)
        codes[:, column] = code.to(torch.int8)
        error = left[:, column] - (code if zero is None else code - zero) * scale
        for other in order[place + 1 :].tolist():
            left[:, other] -= error * inverse[column, other] / inverse[column, column]
        inverse -= torch.outer(inverse[:, column], inverse[column]) / inverse[column, column]
    return codes


@pytest.mark.parametrize("is_ordered", [True, False], ids=["ordered", "in order"])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_codes_are_those_of_the_equations(scheme: Scheme, is_ordered: bool) -> None:
    weight, moment = drawn()
    found = solve(weight, Factor.of(moment, 0.01, is_ordered), scheme, torch.bfloat16, refits=0)
    expected = textbook(weight, moment, scheme, 0.01, is_ordered)
    assert (found.affine.codes != expected).float().mean() < 0.002, "but for ties of rounding"


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_outputs_are_closer_than_by_rounding_and_refits_bring_them_closer(scheme: Scheme) -> None:
    weight, moment = drawn()
    factor, hessian = Factor.of(moment, 0.01, True), damped(moment)
    plain = loss(weight, quantize(weight, scheme, torch.bfloat16), hessian)
    solved = [solve(weight, factor, scheme, torch.bfloat16, refits) for refits in (0, 1, 3)]
    losses = [loss(weight, one.affine, hessian) for one in solved]
    assert losses[0] < 0.8 * plain
    assert losses[2] <= losses[1] <= losses[0]
    assert scheme.bits == 8 or losses[1] < losses[0]
    for one, told in zip(solved, losses, strict=True):
        assert one.loss == pytest.approx(told, rel=1e-3), "what solving says it lost is what is lost"
        codes, affine = one.affine.codes.float(), one.affine
        assert affine.scales.dtype is torch.bfloat16
        off = (one.values - codes).abs()
        inner = (codes > scheme.lowest) & (codes < scheme.highest)
        assert float(off[inner].max()) <= 0.5 + 1e-3
        assert int(affine.codes.min()) >= scheme.lowest
        assert int(affine.codes.max()) <= scheme.highest


def test_scales_that_are_refitted_are_those_of_least_squares() -> None:
    """No scale of a row can be changed by a hundredth without a larger error, but for what bf16 rounds."""
    weight, moment = drawn(8)
    factor = Factor.of(moment, 0.01, True)
    first = solve(weight, factor, Scheme(3, 32), torch.float32, 0).affine
    scales = gptq._fitted(weight.double(), factor, first)
    fitted = Affine(first.codes, scales, None, first.scheme)
    hessian = damped(moment)
    least = loss(weight, fitted, hessian)
    assert least < loss(weight, first, hessian)
    for group in range(4):
        for change in (0.99, 1.01):
            changed = scales.clone()
            changed[:, group] *= change
            assert loss(weight, Affine(first.codes, changed, None, first.scheme), hessian) > least


def test_inputs_that_do_not_matter() -> None:
    weight, moment = drawn()
    dead = torch.zeros(128, dtype=torch.bool)
    dead[[3, 77]] = True
    moment[dead] = 0.0
    moment[:, dead] = 0.0
    found = solve(weight, Factor.of(moment, 0.01, True), Scheme(4, 32), torch.bfloat16)
    assert bool(dequantize(found.affine).isfinite().all())
    assert not int(found.affine.codes[:, dead].abs().max()), "an input that is always zero has weights of zero"
    diagonal = torch.diag(moment.diagonal().clamp(min=1.0))
    alone = solve(weight, Factor.of(diagonal, 1e-6, True), Scheme(4, 32), torch.bfloat16, refits=0)
    plain = quantize(weight, Scheme(4, 32), torch.bfloat16)
    assert torch.equal(alone.affine.codes, plain.codes), "inputs that have nothing to do with each other: rounding"


def test_a_singular_hessian_is_damped_more_and_says_so() -> None:
    weight, _ = drawn()
    few = torch.randn(3, 128, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    moment = few.T @ few
    factor = Factor.of(moment, 0.01, True)
    assert factor.damping == 0.01, "three tokens are enough with the usual damping"
    turned = moment - 0.05 * moment.diagonal().mean() * torch.eye(128, dtype=torch.float64)
    assert Factor.of(turned.clamp(min=-1e9), 0.01, True).damping > 0.01
    with pytest.raises(ValueError, match="not finite"):
        Factor.of(moment * float("nan"), 0.01, True)
    with pytest.raises(ValueError, match="cannot be factored"):
        Factor.of(-1e12 * moment.abs() + torch.eye(128, dtype=torch.float64), 0.01, True)
    with pytest.raises(ValueError, match="groups of 48 do not divide 128"):
        solve(weight, factor, Scheme(4, 48), torch.bfloat16)


def test_the_same_each_time_and_nothing_is_written_to() -> None:
    weight, moment = drawn()
    kept = weight.clone(), moment.clone()
    found = [solve(weight, Factor.of(moment, 0.01, True), Scheme(2, 32, False), torch.bfloat16) for _ in range(2)]
    assert torch.equal(found[0].affine.codes, found[1].affine.codes)
    assert torch.equal(found[0].affine.scales, found[1].affine.scales)
    assert torch.equal(weight, kept[0])
    assert torch.equal(moment, kept[1])
