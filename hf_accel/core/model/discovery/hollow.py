"""A copy of a model whose decoder layers hand on what they are given: what the model computes beside them shows.

Cost: a copy without tensors of its own, and a pass without layers for every 256 positions whose angles are asked for.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hf_accel.core.model.discovery.forms import BlockForm
from hf_accel.core.model.discovery.listening import bound, decoder_of
from hf_accel.core.model.discovery.readings import Unexplained
from hf_accel.core.model.shadow import twin

PIECE = 256  # positions of a pass


class Hollow:
    """A copy of a model whose layers return what they are given. Raises: Unexplained where it cannot be copied.

    blocks: path, class and form of every layer, in their order.
    """

    def __init__(self, model: Any, blocks: Sequence[tuple[str, type, BlockForm]]) -> None:
        self._forms = [form for _, _, form in blocks]
        self._lock = threading.Lock()
        self._given: list[tuple[Tensor, Any]] = []  # hidden states and angles of each layer that ran
        self.model = twin(model)
        if self.model is model:
            raise Unexplained("the model cannot be copied")
        for path, kind, form in blocks:
            layer: Any = self.model.get_submodule(path)
            layer._modules.clear()  # the copy keeps no weights of layers alive
            layer.forward = partial(self._hand_on, kind, form)

    def _hand_on(self, kind: type, form: BlockForm, *args: Any, **kwargs: Any) -> Any:
        arguments = bound(kind, args, kwargs)
        hidden = arguments[form.call.hidden]
        self._given.append((hidden, arguments.get("position_embeddings")))
        return (hidden, *[None] * (form.call.length - 1)) if form.call.length else hidden

    def run(self, module: Any, ids: Tensor, first: int) -> tuple[Any, list[tuple[Tensor, Any]]]:
        """Return what the copy, or its decoder, makes of tokens [1, T] from position `first` on, and layers get."""
        positions = torch.arange(first, first + ids.shape[1])[None]
        with self._lock, torch.no_grad():
            self._given.clear()
            try:
                outputs = module(input_ids=ids, position_ids=positions, use_cache=False)
            except Exception as error:  # whatever a model raises whose layers have no parts
                raise Unexplained("without its layers the model does not run") from error
            if len(self._given) != len(self._forms):
                raise Unexplained("the model does not run each of its layers once")
            return outputs, list(self._given)

    def angles(self, positions: int) -> list[tuple[Tensor, Tensor] | None]:
        """Return cos and sin [positions, R] of every layer, None for those without rotary."""
        if all(form.rotary == "none" for form in self._forms):
            return [None] * len(self._forms)
        pieces: list[list[tuple[Tensor, Tensor] | None]] = []
        for first in range(0, positions, PIECE):
            ids = torch.zeros((1, min(PIECE, positions - first)), dtype=torch.int64)
            pieces.append(self._piece(self.run(decoder_of(self.model), ids, first)[1]))
        joined: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}  # layers that share angles share tables
        found: list[tuple[Tensor, Tensor] | None] = []
        for parts in zip(*pieces):
            pairs = [part for part in parts if part is not None]
            key = tuple(map(id, pairs))
            if pairs and key not in joined:
                joined[key] = torch.cat([cos for cos, _ in pairs]), torch.cat([sin for _, sin in pairs])
            found.append(joined[key] if pairs else None)
        return found

    def _piece(self, given: list[tuple[Tensor, Any]]) -> list[tuple[Tensor, Tensor] | None]:
        made: dict[Any, tuple[Tensor, Tensor]] = {}
        found: list[tuple[Tensor, Tensor] | None] = []
        for form, (_, angles) in zip(self._forms, given, strict=True):
            if form.rotary == "none":
                found.append(None)
                continue
            key = id(angles), form.angles
            if key not in made:
                cos, sin = form.angles.of(angles)
                made[key] = cos[0].contiguous(), sin[0].contiguous()
            found.append(made[key])
        return found
