"""A whole decoder layer in one native call, for decoding steps and prompts; of one with experts, its attention half.

Stock spends about 160 µs of Python and dispatch per layer and token (twenty operators); one call spends one. The
weights stay where they are. The call does what the layer's own forward does, operation by operation and rounding by
rounding; a layer is only replaced after both gave the same result here (`audit`), for as many rows as a `trial` shows
to be faster, and any other call (hooks, gradients, adapters, foreign caches, more rows) goes to the layer's own
forward.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from hf_accel.core.calls.doors import Door
from hf_accel.core.calls.hosting import Host
from hf_accel.core.config import Config
from hf_accel.core.journal import beneath, subclass
from hf_accel.core.model.blocks import DecoderBlock
from hf_accel.core.model.discovery.listening import bound
from hf_accel.core.model.discovery.readings import Unexplained
from hf_accel.core.model.modes import evaluating
from hf_accel.core.model.watching import Surroundings
from hf_accel.core.steps.patcher import Change, Fidelity, Patcher, Stage
from hf_accel.core.steps.setting import Setting
from hf_accel.errors import VerificationError
from hf_accel.kernels import native
from hf_accel.kernels.weights import PackedProduct
from hf_accel.layers.audit import PROMPT_TOKENS, Audit, Replacement
from hf_accel.layers.guard import BlockStep
from hf_accel.layers.linear import native_obstacles
from hf_accel.layers.parts import lies_transposed
from hf_accel.layers.step_guard import StepGuard
from hf_accel.layers.stepping import StepRunner
from hf_accel.layers.trial import ROUNDS, Extent, tried_rows
from hf_accel.ops import tolerances


@dataclass(frozen=True, kw_only=True)
class DecoderBlockConfig(Config):
    """Decoder layers in one native call each, where what they compute is understood (see docs/how-it-works.md).

    max_rows: calls of up to this many rows (batch x query tokens) run natively, larger ones by the layer's own forward.
        None: at least 16, or 32 where products of many rows are made natively (see `NativeLinearConfig`) and weights do
        not lie transposed, and as many as a short trial on each shape of layer shows to be faster.
    """

    max_rows: int | None = None

    def __post_init__(self) -> None:
        if self.max_rows is not None:
            self.check_integer("max_rows", 1)


class DecoderBlockPatcher(Patcher[DecoderBlockConfig], config=DecoderBlockConfig):
    stage = Stage.ATTENTION
    fidelity = Fidelity.EXACT
    occupies = "decoder layers"
    is_preferred = True

    def obstacles(self, setting: Setting) -> list[str]:
        found = native_obstacles(setting.anatomy)
        if not setting.is_glance and not setting.anatomy.blocks:
            found.append(f"{setting.anatomy.blocks_missing}.")
        return found

    def patch(self, setting: Setting, host: Host) -> Change:
        anatomy = setting.anatomy
        skipped = list(anatomy.odd_layers)
        least = self.config.max_rows or native.best_rows(anatomy.dtype) or native.MAX_ROWS
        steps: list[BlockStep] = []
        with evaluating(anatomy.model):
            audit = Audit(setting, "DecoderBlockConfig")
            surroundings = Surroundings(m for block in anatomy.blocks for m in (block.layer, *block.modules))
            failed: VerificationError | None = None
            for block in anatomy.blocks:
                try:
                    few = least
                    if self.config.max_rows is None and lies_transposed(block):  # ATen's products of more may be faster
                        few = min(least, native.FEW_ROWS)
                    step = BlockStep(block, Extent(few, few), surroundings)
                    audit.check(block, _replacement(step), layer_bound(block, anatomy.dtype))
                except (ValueError, VerificationError) as error:  # such as packed weights that cannot be taken apart
                    skipped.append(f"layer {block.index} runs as it is: {error}")
                    failed = failed or (error if isinstance(error, VerificationError) else None)
                    continue
                if step.watch.is_hooked():
                    skipped.append(f"layer {block.index} is hooked, and runs as it is as long as it is")
                steps.append(step)
            if not steps and failed is not None:
                raise failed
            if self.config.max_rows is None:
                _try_more_rows(steps, audit)
            for step in steps:
                if step.extent.many > native.MAX_ROWS:
                    most = layer_bound(step.block, anatomy.dtype)
                    audit.check(step.block, _replacement(step), most, PROMPT_TOKENS)
            whole, token = self._whole(setting, steps)
            for step in steps:
                layer = step.block.layer
                made = subclass(NativeLayer, type(layer), step=step, forward=native_forward(step))
                host.journal.swap_class(layer, made)
            if whole is not None:
                whole.watch()
                host.stand(Door.FORWARD, StepRunner(anatomy.model, whole))
        extents = " or ".join(str(rows) for rows in sorted({step.extent.many for step in steps})) or str(least)
        summary = f"{len(steps)} decoder layers run in one native call for up to {extents} rows"
        kinds = dict.fromkeys(str(step.block.form) for step in steps)
        return Change(f"{summary}; {token}; found: {' | '.join(kinds)}", skipped=tuple(skipped))

    def _whole(self, setting: Setting, steps: list[BlockStep]) -> tuple[StepGuard | None, str]:
        """Return the step of the whole model, None where there is none, and a clause for the report."""
        try:
            found = StepGuard(setting.anatomy, steps, [type(step.block.layer) for step in steps])
        except (Unexplained, ValueError) as error:
            return None, f"a token runs layer by layer ({error})"
        return found, "a token runs in one call for all of them, embedding and head"


def _replacement(step: BlockStep) -> Replacement:
    return partial(native_step, step, is_audit=True)


def _try_more_rows(steps: list[BlockStep], audit: Audit) -> None:
    """Let layers of each shape serve as many rows as a trial shows to be faster natively."""
    shapes: dict[Any, list[BlockStep]] = {}
    for step in steps:
        shapes.setdefault(step.shape, []).append(step)
    for shape, members in shapes.items():
        few = members[0].extent.few
        if members[0].masks != "boolean":  # other masks are served for few rows only
            continue
        pairs = [(partial(audit.recorded, step.block), _replacement(step)) for step in members[:ROUNDS]]
        many = tried_rows(few, shape, pairs)
        for step in members:
            step.extent = Extent(few, many)


def layer_bound(block: DecoderBlock, dtype: torch.dtype) -> float:
    """Return the difference of a layer's output from its own forward's that rounding explains."""
    is_packed = any(isinstance(module, PackedProduct) for module in block.modules)
    return tolerances.of_layer_output(dtype, is_packed)


NO_ANGLES = (None, None)


class NativeLayer:
    """Marks decoder layers whose `forward` is a `native_forward`."""

    step: BlockStep


def native_forward(step: BlockStep) -> Callable[..., Any]:
    """Return the `forward` of a layer: plain decoding steps natively, all else as the class it is mixed over does."""
    return layer_forward(NativeLayer, step, native_step)


def layer_forward(marker: type, step: BlockStep, run: Callable[..., torch.Tensor | None]) -> Callable[..., Any]:
    """Return the `forward` of a layer whose class is mixed over with `marker`: by `run`, or as its own class does.

    The step is bound here and not read from the layer, whose class another thread may put back while this runs.
    """
    call, kind = step.block.form.call, type(step.block.layer)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        arguments = bound(kind, args, kwargs) if args else dict(kwargs)
        hidden = arguments.pop(call.hidden, None)
        result = run(step, hidden, arguments) if call.fits(arguments) else None
        if result is None:
            return beneath(marker, self, "forward")(*args, **kwargs)
        return (result, *[None] * (call.length - 1)) if call.length else result

    return forward


def native_step(
    step: BlockStep, hidden: torch.Tensor, kwargs: dict[str, Any], *, is_audit: bool = False
) -> torch.Tensor | None:
    """Return the layer's output [B, T, E], or None if the native call does not cover this step.

    is_audit: the call has just been built; hooks on the layer, and the number of rows, do not matter.
    """
    if type(hidden) is not torch.Tensor or len(shape := hidden.shape) != 3:
        return None
    batch, tokens, _ = shape
    extent = step.extent
    if (
        (batch * tokens > extent.many and not is_audit)
        or not hidden.is_cpu
        or torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch.is_autocast_enabled("cpu")
        or step.block.layer.training
    ):
        return None
    form = step.block.form
    cache, mask = kwargs.get(form.call.cache), kwargs.get(form.call.mask)
    angles = kwargs.get("position_embeddings") if form.rotary != "none" else NO_ANGLES
    if cache is None or angles is None or getattr(cache, "offloading", True):
        return None
    block = step.block
    if cache.layer_class_to_replicate is not None:
        while len(cache.layers) <= block.index:
            cache.layers.append(cache.layer_class_to_replicate())
    if block.index >= len(cache.layers):  # stock's forward raises the error
        return None
    layer = cache.layers[block.index]
    reserve = getattr(layer, "reserve", None)
    if reserve is None or not (is_audit or step.is_current()):
        return None
    cos, sin = angles if form.angles.is_plain else step.turned(angles)
    if hidden.dtype is not step.dtype or not (cos is None or cos.dtype in (step.dtype, torch.float32)):
        return None
    reserved = reserve(batch, tokens, block.kv_heads, block.head_dim, hidden.dtype, hidden.device)
    if reserved is None:
        return None
    keys, values, past, first, row_past, rows = reserved
    if not (is_audit or extent.covers(batch * tokens, past + tokens - first)):
        return None
    if rows is not None:
        mask = None
    elif mask is None:
        if tokens > 1 and past != first:
            return None
    elif (
        not isinstance(mask, torch.Tensor)
        or mask.dim() != 4
        or mask.shape[1] != 1
        or mask.shape[2] != tokens
        or mask.shape[3] != past + tokens - first
        or mask.dtype not in (torch.bool, hidden.dtype)
    ):
        return None
    bits = getattr(layer, "bits", None)
    output = step.kernel(hidden.contiguous(), cos, sin, keys, values, past, first, mask, row_past, bits, rows)
    if output is None:  # the layer's own forward writes the same positions again
        return None
    layer.commit(tokens)
    return with_feed_forward(block, *output) if isinstance(output, tuple) else output


def with_feed_forward(block: DecoderBlock, residual: torch.Tensor, normed: torch.Tensor) -> torch.Tensor:
    """Return the layer's output after its attention half, with the feed-forward part as the module it is."""
    found: Any = block.feed_forward(normed)  # type: ignore[misc]
    added: torch.Tensor = found[0] if isinstance(found, tuple) else found
    added = added.view(residual.shape)  # some give flat rows
    norm, form = block.norm("mlp_out"), block.form
    if norm is not None:
        added = norm(added)
    if form.residual_scale != 1.0:
        added = added * form.residual_scale
    output = residual + added
    return output if form.out_scale == 1.0 else output * form.out_scale
