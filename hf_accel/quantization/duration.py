"""How long solving weights on text will take here, from trials of milliseconds: said before it is begun.

Factoring grows with the cube of the inputs, solving with rows times inputs squared, and reading with the tokens; each
is timed on a small piece of the model and scaled. For large products that overestimates, since small ones are run less
efficiently.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

import torch

from hf_accel.core.model.shadow import twin
from hf_accel.core.steps.setting import Setting
from hf_accel.measure.text import context_tokens
from hf_accel.ops.affine import Scheme
from hf_accel.ops.gptq import Factor, solve
from hf_accel.quantization.calibrating.products import products_of, widest_of
from hf_accel.quantization.calibrating.text import own_tokens
from hf_accel.quantization.config import WeightOnlyConfig
from hf_accel.quantization.targets import targets

T = TypeVar("T")
_TRIAL = 256  # rows and inputs of the product that is solved, at most
_READ_TOKENS = 32


@torch.inference_mode(False)
@torch.no_grad()
def calibrating_seconds(setting: Setting, config: WeightOnlyConfig, count: int) -> float:
    """Return about how many seconds it takes to try `count` candidates like `config`, text to be written included."""
    model = twin(setting.model)
    chosen, _ = targets(setting.anatomy, config)
    products = [p for target in chosen for p in products_of(model, target, config)]
    shapes = [product.weight.shape for product in products]
    if not shapes:
        return 0.0
    widest = max(products, key=lambda product: product.weight.shape[1])
    weight = widest.weight[:_TRIAL, :_TRIAL].float()
    rows, columns = weight.shape
    moment = torch.eye(columns, dtype=torch.float64, device=weight.device)
    factor, factor_s = _timed(lambda: Factor.of(moment, 0.01, True))
    _, solve_s = _timed(lambda: solve(weight, factor, Scheme(8), torch.float32))
    cube, square = factor_s / columns**3, solve_s / (rows * columns**2)
    solving = sum(cube * k**3 + square * n * k**2 for n, k in shapes)
    ids = torch.zeros(1, min(_READ_TOKENS, context_tokens(model)), dtype=torch.int64, device=setting.anatomy.device)
    token_s = _timed(lambda: model(ids, use_cache=False))[1] / ids.shape[1]
    if setting.calibration is not None:
        return count * (solving + 2 * token_s * setting.calibration.ids.numel())
    _, step_s = _timed(lambda: model(ids[:, :1].expand(8, 1), use_cache=False))
    tokens = own_tokens(widest_of(chosen))
    return step_s * tokens / 8 + count * (solving + 2 * token_s * tokens)


def _timed(function: Callable[[], T]) -> tuple[T, float]:
    """Return what a function returns, and the seconds of its second call: by the clock or, if less, the processor."""
    function()
    wall, cpu = time.perf_counter(), time.process_time()
    found = function()
    return found, min(time.perf_counter() - wall, time.process_time() - cpu)
