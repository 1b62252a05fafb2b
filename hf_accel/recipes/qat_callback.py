"""Watches a training in few bits by transformers' Trainer: it stops where what is trained is not what is deployed."""

from __future__ import annotations

import math
from typing import Any

from transformers import TrainerCallback

from hf_accel.core.model.support import unwrap
from hf_accel.errors import UnsupportedModelError
from hf_accel.quantization.learned import LearnedCodes, check_product, trained_products
from hf_accel.quantization.modules.fake_linear import FakeQuantizedLinear


class QATCallback(TrainerCallback):
    """Refuses to go on with a training in few bits that has gone wrong, and logs what becomes of the codes.

    Where training begins: products are in training, and the optimizer has their weights. At every step: fake
    quantization is on. With every log: the loss is a number, and so are all weights and scales; `qat_changed`, the
    share of codes that are others than at the start, and `qat_clipped`, the share of weights that are beyond the
    outermost codes by more than half a step, join the log.

    Raises:
        UnsupportedModelError: from within `Trainer.train`, with the product that is wrong and what to do.
    """

    def __init__(self) -> None:
        self.modules: dict[str, FakeQuantizedLinear] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **given: Any) -> None:
        self.modules = {path: module for path, _, _, module in trained_products(unwrap(model))}
        if not self.modules:
            raise UnsupportedModelError(
                "No product of the model is in training under fake quantization. Call hf_accel.optimize(model, "
                "[hf_accel.QATConfig(bits=...)]) before the Trainer is made."
            )
        optimizer = given.get("optimizer")
        if optimizer is not None:
            held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
            for path, module in self.modules.items():
                if module.weight.requires_grad and id(module.weight) not in held:
                    raise UnsupportedModelError(
                        f"The optimizer does not have the weight of {path}: it was made before hf_accel.optimize, and "
                        "trains weights that are no longer in the model. Make it afterwards."
                    )

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        for path, module in self.modules.items():
            if not module.is_on:
                raise UnsupportedModelError(
                    f"Fake quantization of {path} is off at step {state.global_step}: its weight would be trained for "
                    "another computation than the one that is deployed. Set is_on = True."
                )

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **given: Any) -> None:
        if not logs or "loss" not in logs:
            return
        for path, module in self.modules.items():
            check_product(path, module)
        if not math.isfinite(logs["loss"]):
            raise UnsupportedModelError(
                f"The loss is {logs['loss']} at step {state.global_step}, though all weights are numbers. Go back to a "
                "checkpoint, or train anew with a lower learning rate."
            )
        learned = LearnedCodes.of(self.modules)
        shares = {f"qat_{name}": learned.share(name) for name in ("changed", "clipped")}
        for log in (logs, *state.log_history[-1:]):  # what other callbacks are given, and what the Trainer keeps
            log |= shares
