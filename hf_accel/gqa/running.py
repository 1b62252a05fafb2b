"""Runs attention modules by themselves, on what they read when their model read calibration text.

A module is called as its model called it, with the masks and positions recorded then, so that rotary embeddings,
windows, caps and norms need not be known. Rows of one length without padding have all one call but for what is read.
Memory: what the layers recorded at a time read, [tokens, E] each in the model's dtype, and one layer's projections in
fp32.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hf_accel.errors import UnsupportedModelError
from hf_accel.gqa.heads import AttentionLayer, Heads, read_heads, write_heads
from hf_accel.gqa.layouts import layout_of

_HERE = object()  # stands for what is read


@dataclass
class RecordedCall:
    """How a model calls an attention module for a batch of B rows of T tokens.

    inputs [B, T, E], outputs [B, T, E]: what it read, and what it gave.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    inputs: Tensor
    outputs: Tensor | None = None

    def rotary_sizes(self) -> set[int]:
        """Return the sizes of the cosines and sines that the module is given, if any."""
        given = self.kwargs.get("position_embeddings")
        return {t.shape[-1] for t in given if isinstance(t, Tensor)} if isinstance(given, (tuple, list)) else set()


@dataclass
class Read:
    """What an attention module read, `rows` [N, T, E], batch by batch, and how it is called."""

    call: RecordedCall
    batches: list[Tensor] = field(default_factory=list)

    @property
    def rows(self) -> Tensor:
        return torch.cat(self.batches)


def recorded(model: Any, layers: Sequence[AttentionLayer], ids: Tensor, batch: int) -> dict[str, Read]:
    """Return what attention modules read, by path, when `model` reads ids [N, T], N a multiple of `batch`.

    Raises:
        UnsupportedModelError: a module is called more than once, or not at all.
    """
    found: dict[str, Read] = {}

    def record(path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs = args[0] if args else kwargs["hidden_states"]
        if path not in found:
            rest = (_HERE, *args[1:]) if args else ()
            named = kwargs if args else kwargs | {"hidden_states": _HERE}
            found[path] = Read(RecordedCall(rest, named, inputs.detach()))
        found[path].batches.append(inputs.detach())

    def record_outputs(path: str, module: nn.Module, args: tuple[Any, ...], outputs: Any) -> None:
        if found[path].call.outputs is None:
            found[path].call.outputs = _first(outputs).detach()

    hooks = [x.module.register_forward_pre_hook(partial(record, x.path), with_kwargs=True) for x in layers]
    hooks += [x.module.register_forward_hook(partial(record_outputs, x.path)) for x in layers]
    try:
        with torch.no_grad():
            for rows in ids.to(model.device).split(batch):
                model(rows, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    calls = -(-len(ids) // batch)
    for layer in layers:
        times = len(found[layer.path].batches) if layer.path in found else 0
        if times != calls:
            raise UnsupportedModelError(
                f"{layer.path} is called {times} times in {calls} forward passes; only attention that each pass calls "
                "once is converted."
            )
    return found


def _first(outputs: Any) -> Tensor:
    """Return what attention gives to its layer; weights may come beside it."""
    return outputs[0] if isinstance(outputs, tuple) else outputs  # type: ignore[no-any-return]


class Runnable:
    """A copy of an attention module, in at least fp32, that is run by itself, and whose projections are its own."""

    def __init__(self, layer: AttentionLayer, config: Any) -> None:
        module = copy.deepcopy(layer.module).eval().requires_grad_(False)
        module.to(torch.promote_types(next(module.parameters()).dtype, torch.float32))
        own = getattr(module, "config", None)
        if own is not None and "flash" in str(own._attn_implementation):  # which computes in half precision only
            own._attn_implementation = "sdpa"
        self.module, self.config = module, config
        self.layer = replace(layer, module=module)
        self.output: Any = module.get_submodule(layout_of(module, config).o)  # the output projection

    @property
    def path(self) -> str:
        return self.layer.path

    @property
    def dtype(self) -> torch.dtype:
        return next(self.module.parameters()).dtype

    def heads(self) -> Heads:
        return read_heads(self.layer, self.config)

    def write(self, heads: Heads) -> None:
        write_heads(self.layer, self.config, heads)

    def run(self, call: RecordedCall, inputs: Tensor) -> Tensor:
        """Return the outputs [B, T, E] for `inputs` [B, T, E], rows in the place of those of the recorded call."""
        dtype = self.dtype

        def suited(value: Any) -> Any:
            if value is _HERE:
                return inputs.to(dtype)
            if isinstance(value, Tensor) and value.is_floating_point():
                return value.to(dtype)
            if isinstance(value, (tuple, list)):
                return type(value)(map(suited, value))
            return value

        args, kwargs = tuple(map(suited, call.args)), {name: suited(value) for name, value in call.kwargs.items()}
        return _first(self.module(*args, **kwargs))

    def outputs(self, call: RecordedCall, heads: Heads) -> Tensor:
        """Return the outputs of the recorded call with these projections."""
        self.write(heads)
        with torch.no_grad():
            return self.run(call, call.inputs)

    @contextmanager
    def attended(self) -> Iterator[list[Tensor]]:
        """Collect what the output projection reads [B, T, H * Dv]: the values of each head, weighted."""
        found: list[Tensor] = []
        hook = self.output.register_forward_pre_hook(lambda module, args: found.append(args[0].detach()))
        try:
            yield found
        finally:
            hook.remove()
