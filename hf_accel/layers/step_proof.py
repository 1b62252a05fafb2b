"""The native step of a whole model from the modules it is made of, and the proof that it computes what they do."""

from __future__ import annotations

import time
from typing import Any

import torch
from transformers import DynamicCache

from hf_accel.core.drift import CACHE
from hf_accel.core.model.anatomy import Anatomy, is_packed
from hf_accel.core.model.discovery.ends import EndsForm
from hf_accel.core.model.discovery.readings import Unexplained
from hf_accel.core.model.shadow import twin
from hf_accel.kernels import native
from hf_accel.kernels.weights import PackedProduct
from hf_accel.layers.guard import BlockStep
from hf_accel.ops import tolerances

PROVEN = (0, 1, 2, 3)  # positions at which a step is compared with the model's own

LENGTH = 256  # of the text in which threads are tried
TRIED_BYTES = 2**24  # smaller models are tried with one thread: waking others takes longer than their share of the work


def ends_of(model: Any, form: EndsForm) -> native.StepEnds:
    """Return what stands around the layers of `model`, as kernels take it."""
    head, norm = model.get_submodule(form.head), None
    bias = None if head.bias is None else head.bias.detach()
    weight = head.packed if isinstance(head, PackedProduct) else head.weight.detach()
    if form.norm is not None:
        held, names = model.get_submodule(form.norm.path), (form.norm.weight, form.norm.bias)
        its_weight, its_bias = (None if name is None else getattr(held, name).detach() for name in names)
        norm = native.Norm(kind=form.norm.kind, eps=form.norm.eps, weight=its_weight, bias=its_bias)
    return native.StepEnds(
        embedding=model.get_submodule(form.embedding).weight.detach(),
        scale=form.scale,
        positions=None if form.positions is None else model.get_submodule(form.positions).weight.detach(),
        offset=form.offset,
        norm=norm,
        head=native.Projection(weight, bias),
        logit_scale=form.logit_scale,
        softcap=form.softcap,
    )


def prove(anatomy: Anatomy, step: native.NativeStep, steps: list[BlockStep]) -> None:
    """Compare a few steps with the model's own, on a copy, and let it have the threads that it runs fastest with.

    Raises:
        Unexplained: rounding does not explain the difference.
    """
    model, memory, parts = twin(anatomy.model), native.StepMemory(len(steps), step.hidden), [s.block for s in steps]
    cache: Any = DynamicCache(config=model.config)
    shapes = [(2, 1, part.kv_heads, len(PROVEN), part.head_dim) for part in parts]
    buffers = [torch.zeros(shape, dtype=step.dtype) for shape in shapes]
    pairs = [(buffer[0], buffer[1]) for buffer in buffers]
    bound = tolerances.of_step_logits(anatomy.dtype, is_packed(anatomy.model))
    ids = torch.randint(step.vocabulary, (len(PROVEN),), generator=torch.Generator().manual_seed(2)).tolist()
    for position, token in zip(PROVEN, ids):
        inputs = {"position_ids": torch.tensor([[position]]), "use_cache": True, CACHE: cache}
        with torch.no_grad():
            expected = model(input_ids=torch.tensor([[token]]), **inputs).logits.double()
        for index, (keys, values) in enumerate(pairs):
            memory.place(index, keys, values, position, 0, None)
        memory.choice.fill_(token)
        found = step(memory, position)
        if found is None or not (found.double() - expected).norm() <= bound * expected.norm():
            raise Unexplained("a step of the whole model in one call gave other logits than the model")
    if anatomy.weight_bytes < TRIED_BYTES:
        step.threads = min((0, 1), key=lambda threads: _seconds(step, steps, threads))


def _seconds(step: native.NativeStep, steps: list[BlockStep], threads: int) -> float:
    """Return the least time of a step in a text of usual length."""
    memory, position = native.StepMemory(len(steps), step.hidden), min(LENGTH, step.positions) - 1
    for index, part in enumerate(part.block for part in steps):
        keys = torch.zeros((1, part.kv_heads, position + 1, part.head_dim), dtype=step.dtype)
        memory.place(index, keys, keys, position, 0, None)
    best, step.threads = float("inf"), threads
    for _ in range(40):
        start = time.perf_counter()
        step(memory, position)
        best = min(best, time.perf_counter() - start)
    return best
