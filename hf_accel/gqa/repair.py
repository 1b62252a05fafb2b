"""Least squares of an attention layer's output: what the closed forms lost and its own weights can win back.

The output projection has a closed form: the ridge regression of the original's output on what the heads attend to. It
shrinks towards the weights it starts from, so that directions which the text does not show stay as they are. Queries
and keys stand in a softmax, and values share their heads: for them the same least squares are gone down by gradients
(Adam, Kingma and Ba 2015, arXiv:1412.6980), each weight at a rate in proportion to its size. What is kept is what is
better on rows that nothing was fitted to; nothing that makes those worse is.
Memory: the layer's projections in fp32 four times over, and the text's inputs and outputs of one layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_accel.gqa.layouts import out_in
from hf_accel.gqa.running import RecordedCall, Runnable

RATE = 3e-2  # of a weight's root mean square, at the first step
RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # of the mean eigenvalue
EXACT = 1e-5  # of the output's norm: what rounding leaves


@dataclass(frozen=True)
class Errors:
    """Of the output's norm, on rows that nothing was fitted to: after the closed forms, and after the repair."""

    before: float
    after: float


@dataclass(frozen=True)
class Task:
    """A layer with new projections is to give `targets` [N, T, E] for `inputs` [N, T, E], `batch` rows at a time.

    The last `kept_back` batches are not fitted to.
    """

    runnable: Runnable
    call: RecordedCall
    inputs: Tensor
    targets: Tensor
    batch: int
    kept_back: int

    def batches(self, *, fitted: bool) -> Iterator[tuple[Tensor, Tensor]]:
        rows = len(self.inputs) - self.kept_back * self.batch
        part = slice(0, rows) if fitted else slice(rows, None)
        yield from zip(self.inputs[part].split(self.batch), self.targets[part].split(self.batch), strict=True)

    @torch.no_grad()
    def error(self) -> float:
        """Return the relative error of the outputs on the rows kept back."""
        lost = total = 0.0
        for inputs, targets in self.batches(fitted=False):
            lost += float((self.runnable.run(self.call, inputs) - targets).square().sum())
            total += float(targets.square().sum())
        return (lost / total) ** 0.5 if total else 0.0


def repair(task: Task, steps: int, advance: Callable[[], None] = lambda: None) -> Errors:
    """Bring the projections of the task's module nearer to its targets, in place, and return the errors."""
    before = best = task.error()
    if before <= EXACT:
        return Errors(before, before)
    for improve in (fit_output, *([lambda each: descend(each, steps), fit_output] if steps else [])):
        weights = [parameter.detach().clone() for parameter in task.runnable.module.parameters()]
        improve(task)
        if (now := task.error()) < best:
            best = now
        else:  # also where it is no number
            for parameter, weight in zip(task.runnable.module.parameters(), weights, strict=True):
                parameter.detach().copy_(weight)
        advance()
    return Errors(before, best)


@torch.no_grad()
def fit_output(task: Task) -> None:
    """Write the ridge regression of the targets on what the heads attend to into the output projection.

    The ridge is the one of RIDGES that is best on the rows kept back.
    """
    product, run = task.runnable.output, task.runnable.run
    weight = out_in(product)
    first = weight.double()
    if product.bias is not None:
        first = torch.cat([first, product.bias.double()[:, None]], 1)
    gram = torch.zeros(first.shape[1], first.shape[1], dtype=torch.float64, device=weight.device)
    cross = torch.zeros_like(first)
    count = 0
    for inputs, targets in task.batches(fitted=True):
        with task.runnable.attended() as read:
            outputs = run(task.call, inputs)
        rows = read[0].flatten(0, -2).double()
        if product.bias is not None:
            rows = torch.cat([rows, torch.ones_like(rows[:, :1])], 1)
        gram += rows.mT @ rows
        cross += (targets - outputs).flatten(0, -2).double().mT @ rows
        count += len(rows)
    values, vectors = torch.linalg.eigh(gram)
    rotated = cross @ vectors
    best, found = task.error(), None
    for ridge in RIDGES:
        solved = first + (rotated / (values.clamp_min(0) + ridge * values.mean()).clamp_min(1e-300)) @ vectors.mT
        _write(product, weight, solved)
        if (now := task.error()) < best:
            best, found = now, solved
    _write(product, weight, first if found is None else found)


def _write(product: Any, weight: Tensor, solved: Tensor) -> None:
    weight.copy_(solved[:, : weight.shape[1]])
    if product.bias is not None:
        product.bias.copy_(solved[:, -1])


def descend(task: Task, steps: int) -> None:
    """Take gradient steps of the relative squared error, over all weights of the layer's products."""
    runnable = task.runnable
    weights = [
        runnable.module.get_submodule(name).get_parameter("weight").requires_grad_() for name in runnable.layer.products
    ]
    rates = [RATE * float(weight.detach().square().mean().sqrt()) for weight in weights]
    groups = [{"params": [weight], "lr": rate} for weight, rate in zip(weights, rates, strict=True)]
    adam = torch.optim.Adam(groups, betas=(0.9, 0.99))
    batches = list(task.batches(fitted=True))
    generator = torch.Generator().manual_seed(0)
    order: list[int] = []
    try:
        for step in range(steps):
            order = order or torch.randperm(len(batches), generator=generator).tolist()
            inputs, targets = batches[order.pop()]
            with torch.enable_grad():
                lost = (runnable.run(task.call, inputs) - targets).square().sum() / targets.square().sum()
                gradients = torch.autograd.grad(lost, weights)
            for group, rate, weight, gradient in zip(adam.param_groups, rates, weights, gradients, strict=True):
                group["lr"], weight.grad = rate * (1 - step / steps), gradient
            adam.step()
    finally:
        for weight in weights:
            weight.requires_grad_(False)
            weight.grad = None
