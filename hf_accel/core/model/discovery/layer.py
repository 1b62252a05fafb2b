"""A decoder layer around its attention: norms, what joins the residual in which order, the feed-forward part."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_accel.core.model.discovery.activations import ACTIVATIONS, described_activation
from hf_accel.core.model.discovery.attention import AttentionForm, described_attention
from hf_accel.core.model.discovery.calling import described_call
from hf_accel.core.model.discovery.forms import BlockForm, Rows
from hf_accel.core.model.discovery.listening import Call, Recorded
from hf_accel.core.model.discovery.norms import NormForm, described_norm, is_leaf
from hf_accel.core.model.discovery.readings import Unexplained, agrees, the_best, the_only
from hf_accel.kernels.weights import PackedProduct


def described_layer(record: Recorded, dtype: torch.dtype) -> BlockForm:
    """Return what a layer is made of, as its record explains it.

    Raises: Unexplained.
    """
    return _Layer(record, dtype).form()


def is_product(module: nn.Module) -> bool:
    """Return whether a module is a product of its input with one weight, by what it holds."""
    if isinstance(module, PackedProduct):
        return True
    return isinstance(module, (nn.Linear, Conv1D)) and is_leaf(module) and set(module._parameters) == {"weight", "bias"}


@dataclass(frozen=True)
class _FeedForward:
    """read, gives: the values it reads, at a place of memory, and gives."""

    read: Tensor
    read_at: int
    gives: Tensor
    activation: str = "silu"
    gate: Rows | None = None
    up: Rows | None = None
    down: str | None = None
    module: str | None = None


# the norms after and before the feed-forward part, residual scale, output scale, is parallel
_Structure = tuple[NormForm | None, NormForm | None, float, float, bool]


class _Layer:
    def __init__(self, record: Recorded, dtype: torch.dtype) -> None:
        self.record, self.dtype = record, dtype
        self.products = self._products()
        self.attention: AttentionForm = described_attention(record, self.products, dtype)
        self.norms = self._norms()

    def same(self, found: Tensor, expected: Tensor) -> bool:
        return found.shape == expected.shape and agrees(found, expected, self.dtype)

    def _products(self) -> list[Call]:
        """Return the calls of products; a class of a model's own counts where it computed a plain product."""
        found = []
        for call in self.record.calls:
            module: Any = call.module
            if is_product(module):
                is_known = type(module) in (nn.Linear, Conv1D) or isinstance(module, PackedProduct)
                if is_known or self.same(call.returned, nn.functional.linear(call.given, module.weight, module.bias)):
                    found.append(call)
        if len({call.path for call in found}) != len(found):
            raise Unexplained("it calls a product twice")
        return found

    def _norms(self) -> list[tuple[NormForm, Call]]:
        """Return the norms outside attention, which read and give whole rows of the hidden size."""
        hidden, found = self.record.given.shape, []
        for call in self.record.calls:
            is_inside = call.path == self.attention.path or call.path.startswith(f"{self.attention.path}.")
            if is_inside or not is_leaf(call.module) or is_product(call.module) or call.given.shape != hidden:
                continue
            if call.returned.shape != hidden or torch.equal(call.given, call.returned):
                continue  # dropout, an identity
            try:
                found.append((described_norm(call.path, call.module, hidden[-1]), call))
            except Unexplained:
                continue  # an activation, or what a module of experts has
        return found

    def input_norm(self) -> NormForm | None:
        """Return the norm between the layer's input and what attention reads; None: it reads the input as it is."""
        read, place = self.attention.read, self.attention.projections[0].given_at
        if torch.equal(read, self.record.given):
            return None
        found = [
            n for n in self.norms if torch.equal(n[1].given, self.record.given) and torch.equal(n[1].returned, read)
        ]
        if len(found) > 1:  # norms of equal weights, as in a model that was not trained
            found = [(form, call) for form, call in found if call.returned_at == place]
        return the_only((form for form, _ in found), "what its attention reads")

    def norm_after(self, value: Tensor) -> tuple[NormForm | None, Tensor]:
        """Return the norm that reads `value`, which a part of the layer gives, and what it makes of it."""
        for form, call in self.norms:
            if torch.equal(call.given, value):
                return form, call.returned
        return None, value

    def form(self) -> BlockForm:
        record, attention = self.record, self.attention
        x = record.given
        names: dict[str, NormForm | None] = {"input": self.input_norm()}
        names["attention_out"], attended = self.norm_after(attention.o.returned)
        part, structure = self._around(x, attended)
        names["mlp_out"], names["mlp"], scale, out_scale, is_parallel = structure
        if part.module is not None and is_parallel:
            raise Unexplained("a module that is no plain feed-forward part runs beside its attention")
        apart = None if part.module is None else record.layer.get_submodule(part.module)
        if any(apart not in running for running in record.clamps):
            raise Unexplained("it clamps values")
        names |= {"q": attention.q.norm, "k": attention.k.norm, "v": attention.v.norm}
        self._check_nothing_is_left(part, [form.path for form in names.values() if form is not None])
        heads = attention.q if attention.q.norm is not None else attention.k
        heard = attention.heard
        return BlockForm(
            attention=attention.path,
            index=self._index(),
            call=described_call(record),
            projections=tuple(call.path for call in attention.projections),
            o=attention.o.path,
            gate=part.gate,
            up=part.up,
            down=part.down,
            feed_forward=part.module,
            norms={name: form for name, form in names.items() if form is not None},
            heads=heard.query.shape[1],
            kv_heads=heard.key.shape[1],
            head_dim=heard.query.shape[3],
            q=attention.q.heads,
            k=attention.k.heads,
            v=attention.v.heads,
            output_gate=attention.gate,
            norm_extent=heads.norm_extent if heads.norm is not None else "head",
            norms_after_rotary=heads.is_normed_after,
            rotary=attention.q.rotary,
            rotary_size=attention.q.rotary_size,
            rotates_once=attention.rotates_once,
            angles=attention.q.angles,
            activation=part.activation,
            scale=heard.scale * attention.q.factor,
            softcap=heard.softcap,
            sinks=attention.sinks,
            residual_scale=scale,
            out_scale=out_scale,
            is_parallel=is_parallel,
        )

    def _check_nothing_is_left(self, part: _FeedForward, norms: list[str]) -> None:
        """Raise Unexplained for weights of what ran that nothing takes into account: they may be zeros only today."""
        attention = self.attention
        rows = [rows.path for rows in (part.gate, part.up) if rows is not None]
        used = {*norms, *rows, part.down, attention.o.path, *(call.path for call in attention.projections)}
        ran = {"", *(call.path for call in self.record.calls)}
        for path, module in self.record.layer.named_modules():
            if path not in ran or path in used or f"{path}.".startswith(f"{part.module}."):
                continue
            for name, parameter in module._parameters.items():
                if parameter is not None and (path, name) != (attention.path, attention.sinks):
                    raise Unexplained(f"{path}.{name}".lstrip(".") + " is a weight of which nothing is known")

    def _structures(self, x: Tensor, attended: Tensor, part: _FeedForward) -> Iterator[tuple[float, _Structure]]:
        """Yield what explains the layer's output with this feed-forward part, and the share of it that is left.

        Sums are made in the layer's own dtype: beside a large residual what joins it is less than what rounding is.
        """
        norm_after, fed = self.norm_after(part.gives)
        out = self.record.returned
        for norm, is_parallel, read in self._read_by(part):
            for scale in self._numbers():
                a, f = (t if scale == 1.0 else t * scale for t in (attended, fed))
                between = x + a
                left = 0.0 if is_parallel else _different(between, read)
                sums = [x + (a + f), between + f, (x + f) + a] if is_parallel else [between + f]
                for out_scale in self._numbers():
                    made = sums if out_scale == 1.0 else [total * out_scale for total in sums]
                    if (is_parallel or self.same(between, read)) and self.same(made[0], out):
                        error = max(left, min(_different(total, out) for total in made))
                        yield error, (norm_after, norm, scale, out_scale, is_parallel)

    def _read_by(self, part: _FeedForward) -> Iterator[tuple[NormForm | None, bool, Tensor]]:
        """Yield the norm before the feed-forward part, whether it reads the layer's input, and what it reads.

        The input is told from its sum with what attention gives by where it lay: these may be equal.
        """
        at, attention = self.record.given_at, self.attention.projections[0]
        if part.read_at == attention.given_at:
            yield None, True, attention.given
            return
        found = [(form, call) for form, call in self.norms if torch.equal(call.returned, part.read)]
        if len(found) > 1:
            found = [(form, call) for form, call in found if call.returned_at == part.read_at]
        for form, call in found:
            yield form, call.given_at == at and torch.equal(call.given, self.record.given), call.given
        if not found:
            yield None, part.read_at == at and torch.equal(part.read, self.record.given), part.read

    def _numbers(self) -> list[float]:
        """Return the factors that the layer could apply: 1, and the numbers that it holds."""
        layer = self.record.layer
        held = [value for value in vars(layer).values() if isinstance(value, float)]
        held += [float(b) for b in layer._buffers.values() if b is not None and b.numel() == 1]
        return list(dict.fromkeys([1.0, *held]))

    def _around(self, x: Tensor, attended: Tensor) -> tuple[_FeedForward, _Structure]:
        """Return the feed-forward part, and how it joins the residual: a plain one, or else a module as it is."""
        inside = f"{self.attention.path}."
        others = [call for call in self.products if not call.path.startswith(inside)]
        for parts in (self._plain_feed_forwards(others), self._modules()):
            found = [(e, (part, found)) for part in parts for e, found in self._structures(x, attended, part)]
            if found:
                return the_best(found, "what joins its residual")
        raise Unexplained("nothing known explains what joins its residual")

    def _modules(self) -> Iterator[_FeedForward]:
        hidden = self.record.given.shape
        for call in self.record.calls:
            is_apart = "." not in call.path and call.path != self.attention.path.partition(".")[0]
            if is_apart and call.given.shape == call.returned.shape == hidden and not is_leaf(call.module):
                yield _FeedForward(call.given, call.given_at, call.returned, module=call.path)

    def _plain_feed_forwards(self, calls: list[Call]) -> Iterator[_FeedForward]:
        if not 2 <= len(calls) <= 3:
            return
        *ups, down = calls
        read, hidden = ups[0].given, self.record.given.shape
        if read.shape != hidden or down.returned.shape != hidden or not all(self.same(c.given, read) for c in ups):
            return
        inner, names = down.given.shape[-1], self._activations()
        values = [Rows(call.path, 0, call.returned.shape[-1]) for call in ups]
        if len(ups) == 1 and ups[0].returned.shape[-1] == 2 * inner:
            values = [Rows(ups[0].path, 0, inner), Rows(ups[0].path, inner, 2 * inner)]
        outputs = {call.path: call.returned.double() for call in ups}
        parts = [outputs[v.path][..., v.start : v.stop] for v in values]
        for name in names:
            act = ACTIVATIONS[name]
            if len(parts) == 1:
                pairs: list[tuple[int | None, int]] = [(None, 0)]
            else:
                pairs = [(0, 1), (1, 0)]
            for gate, up in pairs:
                made = act(parts[up]) if gate is None else act(parts[gate]) * parts[up]
                if self.same(made, down.given.double()):
                    yield _FeedForward(
                        read,
                        ups[0].given_at,
                        down.returned,
                        name,
                        None if gate is None else values[gate],
                        values[up],
                        down.path,
                    )

    def _activations(self) -> list[str]:
        """Return the activations of the modules that the layer called, or all known ones where it called none."""
        inside = f"{self.attention.path}."
        named = set()
        for call in self.record.calls:
            if call.path.startswith(inside) or not is_leaf(call.module) or is_product(call.module):
                continue
            if any(True for _ in call.module.parameters()) or torch.equal(call.given, call.returned):
                continue
            name = described_activation(call.module)
            if name is not None:
                named.add(name)
        return sorted(named) or list(ACTIVATIONS)

    def _index(self) -> int:
        index = getattr(self.attention.heard.module, "layer_idx", None)
        if not isinstance(index, int):
            raise Unexplained("its attention does not say which layer of the cache is its own")
        return index


def _different(one: Tensor, other: Tensor) -> float:
    """Return the share of elements in which two tensors differ."""
    return float((one != other).double().mean())
