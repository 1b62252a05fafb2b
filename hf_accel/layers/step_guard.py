"""The native step of a whole model: built and proven when layers are, and looked at whether it still stands for it."""

from __future__ import annotations

import threading
import weakref
from typing import Any

import torch

from hf_accel.core.calls.call import Request
from hf_accel.core.model.anatomy import Anatomy
from hf_accel.core.model.discovery.ends import EndsForm, described_ends
from hf_accel.core.model.discovery.hollow import Hollow
from hf_accel.core.model.discovery.readings import Unexplained
from hf_accel.core.model.layer_list import layer_list
from hf_accel.core.model.rope import moving_rope
from hf_accel.core.model.watching import Surroundings, Watch, differing
from hf_accel.kernels import native
from hf_accel.layers.guard import FOLLOWED, BlockStep
from hf_accel.layers.step_proof import ends_of, prove

POSITIONS = 512  # known at first
OF_THE_MODEL = frozenset({"generation_config", "name_or_path", "hf_quantizer"})  # no forward reads them
_ATTENTION = "_attn_implementation_internal"  # which layers look at themselves


class StepGuard:
    """Builds the step of a model from those of its layers. Raises: Unexplained, ValueError where there is none.

    steps: of all layers, in order. kinds: the class of each layer before it was replaced.
    """

    def __init__(self, anatomy: Anatomy, steps: list[BlockStep], kinds: list[type]) -> None:
        model = anatomy.model
        if len(steps) != len(layer_list(model)[1]) or any(step.block.form.feed_forward for step in steps):
            raise Unexplained("not every layer is a single native call")
        if reason := moving_rope(model):
            raise Unexplained(str(reason))
        self.steps, self._lock = steps, threading.Lock()
        self._blocks = [(step.block.path, kind, step.block.form) for step, kind in zip(steps, kinds, strict=True)]
        self.hollow = Hollow(model, self._blocks)
        self.form: EndsForm = described_ends(self.hollow)
        self._model, self._model_vars = weakref.ref(model), vars(model)
        self._threads = 0
        self._build(model, POSITIONS)
        prove(anatomy, self.step, steps)
        self._threads = self.step.threads

    def watch(self) -> None:
        """Begin to watch: the model as it is from here on is what was proven."""
        model: Any = self._model()
        layers = [step.block.layer for step in self.steps]
        inner = {id(module) for layer in layers for module in layer.modules()}
        outer = [module for module in model.modules() if module is not model and id(module) not in inner]
        self._modules = [*outer, *layers]
        self._watch = Watch(model, self._modules)
        self._hooks = model._forward_hooks, model._forward_pre_hooks
        self._forward = type(model).forward
        self._attentions = [vars(step.block.attention) for step in self.steps]
        self._read_attention()
        self._surroundings = Surroundings([model, *outer])
        configs = {id(held["config"]): vars(held["config"]) for m in (model, *outer) if "config" in (held := vars(m))}
        self._configs = [(values, dict(values)) for values in configs.values()]
        self._request = 0

    def _read_attention(self) -> None:
        self._attention_configs = [held.get("config") for held in self._attentions]
        named = {id(config): vars(config) for config in self._attention_configs if config is not None}
        self._names = [(values, values.get(_ATTENTION)) for values in named.values()]

    def _build(self, model: Any, positions: int) -> None:
        ends = ends_of(model, self.form)
        self._kernels = [step.kernel for step in self.steps]
        self._versions = self._buffer_versions()
        self._learned = 2**62 if ends.positions is None else len(ends.positions) - ends.offset
        self.step = native.NativeStep(self._kernels, ends, self.hollow.angles(min(positions, self._learned)))
        self.step.threads = self._threads

    def _buffer_versions(self) -> list[int]:
        buffers = (b for m in self.hollow.model.modules() for b in m._buffers.values() if b is not None)
        return [0 if buffer.is_inference() else buffer._version for buffer in buffers]

    def longer(self, position: int) -> native.NativeStep | None:
        """Return a step that knows `position`, None where there is none."""
        with self._lock:
            step = self.step
            if position < step.positions:
                return step
            if position >= self._learned:
                return None
            wanted = min(max(2 * step.positions, position + 1), self._learned)
            self.step = native.NativeStep(step.blocks, step.ends, self.hollow.angles(wanted))
            self.step.threads = step.threads
            return self.step

    def is_in_place(self) -> bool:
        """Return whether nothing was hooked, exchanged or moved since `step_for` found the step to be right."""
        return (
            not any(self._hooks)
            and not self._model_vars["training"]
            and self._watch.is_in_place()
            and not self.steps[0].surroundings.changed
            and [held.get("config") for held in self._attentions] == self._attention_configs
            and all(values.get(_ATTENTION) is name for values, name in self._names)
            and not torch.is_grad_enabled()
            and not torch.is_autocast_enabled("cpu")
            and not torch.compiler.is_compiling()
            and not torch.jit.is_tracing()
        )

    def step_for(self, request: Request) -> native.NativeStep | None:
        """Return the step, having followed what may change, None where the model must run."""
        if request.number != self._request and not self._holds(request):
            return None
        return self.step if self.is_in_place() else None

    def _holds(self, request: Request) -> bool:
        self._request, model = 0, self._model()
        if model is None or type(model).forward is not self._forward:
            return False
        if any(self._hooks) or self._watch.is_hooked() or not all(step.is_current() for step in self.steps):
            return False
        with self._lock:
            if not self._surroundings.look() or not all(map(_has_its_values, self._configs)):
                return False
            moved = not self._watch.is_same()
            if moved and not self._watch.is_same_but(FOLLOWED, OF_THE_MODEL):
                return False
            if moved or self._versions != self._buffer_versions() or self._kernels != [s.kernel for s in self.steps]:
                try:
                    self.hollow = Hollow(model, self._blocks)
                    self._build(model, POSITIONS)
                except (Unexplained, ValueError, AttributeError, RuntimeError):  # weights that no longer fit
                    return False
                self.watch()
            self._read_attention()
        self._request = request.number
        return True


def _has_its_values(pair: tuple[dict[str, Any], dict[str, Any]]) -> bool:
    now, kept = pair
    return now == kept or differing(now, kept) <= {_ATTENTION}
