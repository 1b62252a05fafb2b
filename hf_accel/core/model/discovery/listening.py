"""Runs the decoder of a copy of a model once, and keeps what its layers, their modules and their attention were given.

Attention is heard under a name of ours in transformers' registry, which computes it plainly. Cost: a forward pass of a
few tokens; what is kept of a layer is given up when the next one has run.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from hf_accel.core.model.back_end_names import BackEndName

# without "flash", "sdpa" or "flex", which transformers would take for its own back ends; models that compare it take it for sdpa
NAME = BackEndName("hfaccel_heard", "sdpa")
_ATTRIBUTE = "_attn_implementation_internal"
TOKENS = 7
_INERT = frozenset({"dropout", "position_ids", "use_cache", "sliding_window", "cache_position", "output_attentions"})


@dataclass
class Call:
    """One call of a module within a layer: its path, and copies of the first tensor it was given and returned."""

    path: str
    module: nn.Module
    given: Tensor
    returned: Tensor


@dataclass
class Heard:
    """One call of attention: queries [B, H, T, D], keys and values [B, G, S, D], and what came out, [B, T, H, D].

    options: what the module asked for beside these, as its name and value.
    """

    module: Any
    query: Tensor
    key: Tensor
    value: Tensor
    scale: float
    softcap: float | None
    sinks: Tensor | None
    options: dict[str, Any]
    output: Tensor


@dataclass
class Recorded:
    """What one decoder layer was given and returned.

    arguments: by name, without the hidden states. output: as its forward returned it. calls: of the modules within, in
    order of their ends. clamps: for each time that values were clamped, the modules that ran then: whether they are
    shows only where they are large, which those of a few random tokens may not be.
    """

    path: str
    layer: Any
    given: Tensor
    arguments: dict[str, Any]
    output: Any
    returned: Tensor
    calls: list[Call] = field(default_factory=list)
    heard: list[Heard] = field(default_factory=list)
    clamps: list[list[nn.Module]] = field(default_factory=list)


_listener: ContextVar[list[Heard] | None] = ContextVar("hf_accel_listener", default=None)


def _heard_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention in transformers' calling convention, computed plainly and kept for whoever listens."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    group = query.shape[1] // key.shape[1]
    keys, values = (t.repeat_interleave(group, 1).float() for t in (key, value))
    scores = query.float() @ keys.mT * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    tokens, positions = scores.shape[-2:]
    if attention_mask is None:
        visible = torch.ones(tokens, positions, dtype=torch.bool, device=scores.device).tril(positions - tokens)
        scores = scores.masked_fill(~visible, -torch.inf)
    elif attention_mask.dtype is torch.bool:
        scores = scores.masked_fill(~attention_mask[..., :positions], torch.finfo(torch.float32).min)
    else:
        scores = scores + attention_mask[..., :positions].float()
    if s_aux is not None:
        sinks = s_aux.float().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        weights = torch.cat([scores, sinks], -1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1)
    output = (weights @ values).transpose(1, 2).to(query.dtype).contiguous()
    found = _listener.get()
    if found is not None:
        rest = {name: option for name, option in options.items() if name not in _INERT and option is not None}
        if is_causal is False:
            rest["is_causal"] = False
        kept = [t.detach().clone() for t in (query, key, value)]
        found.append(Heard(module, *kept, float(scale), softcap, s_aux, rest, output.clone()))
    return output, None


AttentionInterface.register(str(NAME), _heard_attention)
AttentionMaskInterface.register(str(NAME), sdpa_mask)


_CLAMPS = frozenset({"clamp", "clamp_", "clip", "clip_", "minimum", "maximum", "clamp_min", "clamp_max"})


class _Ear(TorchFunctionMode):
    """Hears attention of models that call torch's own instead of transformers' registry; and what clamps values.

    Whether values are clamped shows only where they are large, which those of a few random tokens may not be.
    """

    def __init__(self, running: list[tuple[nn.Module, Tensor | None]], clamps: list[str]) -> None:
        super().__init__()
        self.running, self.clamps = running, clamps

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        found = _listener.get()
        if getattr(func, "__name__", "") in _CLAMPS:
            self.clamps.append([module for module, _ in self.running])
        if getattr(func, "__name__", "") in _CLAMPS:
            self.clamps.append(func.__name__)
        if func is functional.scaled_dot_product_attention and found is not None and self.running:
            given = dict(zip(("query", "key", "value", "attn_mask", "dropout_p", "is_causal"), args)) | (kwargs or {})
            query, key, value = (given[name].detach().clone() for name in ("query", "key", "value"))
            mask, scale = given.get("attn_mask"), given.get("scale")
            options = {"a mask of each head": mask} if mask is not None and mask.shape[1] != 1 else {}
            scale = query.shape[-1] ** -0.5 if scale is None else scale
            module = self.running[-1][0]
            found.append(Heard(module, query, key, value, scale, None, None, options, output.transpose(1, 2).clone()))
        return output


@contextmanager
def _hearing(model: nn.Module) -> Iterator[None]:
    """Let the attention of `model`, a copy, be heard for the length of the block."""
    configs = {id(config): config for m in model.modules() if (config := vars(m).get("config")) is not None}
    inner = [value for config in configs.values() for value in vars(config).values() if _ATTRIBUTE in _space(value)]
    before = [(config, vars(config).get(_ATTRIBUTE)) for config in (*configs.values(), *inner)]
    try:
        for config, name in before:
            if name is not None:
                vars(config)[_ATTRIBUTE] = NAME
        yield
    finally:
        for config, name in before:
            if name is not None:
                vars(config)[_ATTRIBUTE] = name


def _space(value: Any) -> dict[str, Any]:
    return getattr(value, "__dict__", {})


def stacks(decoder: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the members of the outermost lists of modules in a decoder, with their paths."""
    found: list[tuple[str, nn.Module]] = []
    for path, module in decoder.named_modules():
        if isinstance(module, nn.ModuleList) and not any(path.startswith(f"{other}.") for other, _ in found):
            found += [(f"{path}.{index}" if path else str(index), child) for index, child in enumerate(module)]
    return found


def decoder_of(model: Any) -> Any:
    """Return the part of a model that is its decoder, or the model without its head."""
    decoder = model.get_decoder()
    return decoder if isinstance(decoder, PreTrainedModel) else model.base_model


def listen(model: Any, use: Callable[[Recorded], None], start: int = 0) -> None:
    """Run the decoder of `model`, a copy, on two rows of random tokens; `use` gets each member of its lists of modules.

    The first row begins with padding, so that masks and positions matter. Where angles come by axis, as of images,
    every axis has positions of its own. start: the position of the first token.
    """
    embeddings = model.get_input_embeddings().weight
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(embeddings.shape[0], (2, TOKENS), generator=generator).to(embeddings.device)
    mask = torch.ones_like(tokens)
    mask[0, 0] = 0
    inputs: dict[str, Any] = {"input_ids": tokens, "attention_mask": mask, "use_cache": True}
    if start:
        inputs["position_ids"] = start + (mask.cumsum(-1) - 1).clamp(min=0)

    def use_plain(record: Recorded) -> None:
        if axes := axes_of(record.arguments):
            raise _ByAxis(axes)
        use(record)

    with _hearing(model), torch.no_grad():
        decoder = decoder_of(model)
        try:
            _run(decoder, inputs, use_plain)
        except _ByAxis as found:
            _run(decoder, inputs | {"position_ids": positions_apart(found.axes, TOKENS, start).to(tokens.device)}, use)


def positions_apart(axes: int, tokens: int, start: int = 0) -> Tensor:
    """Return positions [axes, 2, tokens] from `start` on of which no axis has those of another."""
    return start + torch.randint(0, 50, (axes, 2, tokens), generator=torch.Generator().manual_seed(1))


class _ByAxis(Exception):
    """Ends a run in which positions of several axes were the same."""

    def __init__(self, axes: int) -> None:
        self.axes = axes


def axes_of(arguments: dict[str, Any]) -> int:
    """Return by how many axes of positions a layer's angles come; 0 where by one."""
    angles = arguments.get("position_embeddings")
    return int(angles[0].shape[0]) if isinstance(angles, tuple) and angles[0].dim() == 4 else 0


def _run(decoder: nn.Module, inputs: dict[str, Any], use: Callable[[Recorded], None]) -> None:
    thread, hooks = threading.get_ident(), []
    state: list[Recorded] = []  # of the layer that runs

    def begin(path: str, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if threading.get_ident() == thread:
            arguments = bound(type(layer), args, kwargs)
            given = arguments.pop(hidden_name(layer), None)
            if _is_hidden(given):
                state[:] = [Recorded(path, layer, given.clone(), arguments, None, given)]
                heard.clear()
                clamps.clear()

    def end(layer: Any, args: tuple[Any, ...], output: Any) -> None:
        if threading.get_ident() == thread and state and state[0].layer is layer:
            record = state.pop()
            record.output, record.heard, record.clamps = output, [*heard], [*clamps]
            first = output[0] if isinstance(output, tuple) and output else output
            if _is_hidden(first):
                record.returned = first.clone()
                use(record)

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if threading.get_ident() == thread and state:
            tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
            waiting.append((module, tensors[0].clone() if tensors else None))

    def after(path: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if threading.get_ident() == thread and state and waiting:
            owner, given = waiting.pop()
            first = output[0] if isinstance(output, tuple) and output else output
            if owner is module and given is not None and isinstance(first, Tensor):
                state[0].calls.append(Call(path, module, _in_rows(given), _in_rows(first.clone())))

    heard: list[Heard] = []
    clamps: list[list[nn.Module]] = []
    waiting: list[tuple[nn.Module, Tensor | None]] = []
    token = _listener.set(heard)
    try:
        for path, layer in stacks(decoder):
            hooks.append(layer.register_forward_pre_hook(partial(begin, path), with_kwargs=True))
            for name, module in layer.named_modules():
                if name:
                    hooks.append(module.register_forward_pre_hook(before, with_kwargs=True))
                    hooks.append(module.register_forward_hook(partial(after, name)))
            hooks.append(layer.register_forward_hook(end))
        with _Ear(waiting, clamps):
            decoder(**inputs)
    finally:
        _listener.reset(token)
        for hook in hooks:
            hook.remove()


def _in_rows(value: Tensor) -> Tensor:
    """Return a tensor [B, T, ...] of what some models make flat."""
    return value.view(2, TOKENS, *value.shape[1:]) if value.shape[:1] == (2 * TOKENS,) else value


def _is_hidden(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 3 and value.shape[:2] == (2, TOKENS) and value.is_floating_point()


def hidden_name(layer: Any) -> str:
    """Return the name of the first argument of a layer's forward, which is its hidden states."""
    return next(iter(_names(type(layer))), "hidden_states")


def bound(kind: type, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return all arguments of a call of a layer of this class by name."""
    return dict(zip(_names(kind), args)) | kwargs


@functools.cache
def _names(kind: type) -> tuple[str, ...]:
    parameters = [*inspect.signature(kind.forward).parameters.values()][1:]  # type: ignore[attr-defined]
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return tuple(parameter.name for parameter in parameters if parameter.kind in positional)
