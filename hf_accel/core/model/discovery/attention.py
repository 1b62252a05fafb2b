"""The attention of a layer, put together again from what its modules gave and what attention was called with."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_accel.core.model.discovery.forms import AngleForm
from hf_accel.core.model.discovery.heads import (
    Angles,
    CalledNorm,
    HeadsForm,
    Projected,
    find_gate,
    find_heads,
    rotated,
)
from hf_accel.core.model.discovery.hearing import Heard
from hf_accel.core.model.discovery.listening import Call, Recorded
from hf_accel.core.model.discovery.norms import described_norm
from hf_accel.core.model.discovery.readings import Unexplained
from hf_accel.kernels.native import Heads


@dataclass(frozen=True)
class AttentionForm:
    """Where attention is, which calls of products make it, and how. read: what the projections read."""

    path: str
    heard: Heard
    projections: tuple[Call, ...]
    o: Call
    q: HeadsForm
    k: HeadsForm
    v: HeadsForm
    gate: Heads | None
    sinks: str | None
    rotates_once: bool

    @property
    def read(self) -> Tensor:
        return self.projections[0].given


def described_attention(record: Recorded, products: list[Call], dtype: torch.dtype) -> AttentionForm:
    """Return the attention of a layer. products: the calls of its products, in order.

    Raises: Unexplained.
    """
    if len(record.heard) != 1:
        raise Unexplained(f"it calls attention {len(record.heard)} times in transformers' way")
    heard = record.heard[0]
    if getattr(heard.module, "is_causal", True) is not True:
        raise Unexplained("its attention is not causal")
    if not _has_its_mask(record, heard):
        raise Unexplained("its attention is not given the mask that the layer is given")
    if heard.options:
        raise Unexplained(f"its attention is asked for {', '.join(sorted(heard.options))}")
    batch, heads, tokens, d = heard.query.shape
    kv_heads = heard.key.shape[1]
    if heard.key.shape != (batch, kv_heads, tokens, d) or heard.value.shape != heard.key.shape:
        raise Unexplained("its keys and values have other sizes than its queries, or it shares another layer's")
    path = next((name for name, module in record.layer.named_modules() if module is heard.module), "")
    inside = [call for call in products if call.path.startswith(f"{path}.")] if path else []
    if len(inside) < 2:
        raise Unexplained("its attention has no products of its own")
    *projections, o = inside
    read = projections[0].given
    if any(call.given.shape != read.shape or not torch.equal(call.given, read) for call in projections):
        raise Unexplained("its attention has products that follow one another")
    if len(projections) > 4:
        raise Unexplained("its attention has more than four products that read its input")
    projected = _projected(projections)
    if projected.rows.shape[1] % d:
        raise Unexplained("what its projections give is no whole number of heads")
    norms = _norms_within(record, path, {call.path for call in inside})
    angles = _angles(record, d)
    group = heads // kv_heads
    q = find_heads("its queries", heard.query, projected, norms, angles, group, dtype, _factors(heard))
    turning = [one for one in angles if one.form == q.angles]
    k = find_heads("its keys", heard.key, projected, norms, turning, 1, dtype)
    v = find_heads("its values", heard.value, projected, norms, (), 1, dtype)
    once = _rotates_once(heard.query, q, projected, turning, norms, dtype)
    gate = find_gate(heard.output, o.given, projected, group, dtype)
    _check_together(q, k, v, norms)
    return AttentionForm(path, heard, tuple(projections), o, q, k, v, gate, _sinks(heard), once)


def _has_its_mask(record: Recorded, heard: Heard) -> bool:
    """Return whether attention sees what the layer's mask shows, as it lies: a window of its own may be far away."""
    given = [value for value in record.arguments.values() if isinstance(value, Tensor) and value.dim() == 4]
    mask = heard.mask
    return mask is not None and any(mask.data_ptr() == t.data_ptr() and mask.shape == t.shape for t in given)


def _rotates_once(
    query: Tensor, q: HeadsForm, projected: Projected, angles: list[Angles], norms: list[CalledNorm], dtype: torch.dtype
) -> bool:
    """Return whether turning rounds its result alone and not each product: by what is nearer to the queries."""
    if not angles or q.rotary == "none" or q.is_normed_after or dtype in (torch.float32, torch.float64):
        return False
    batch, heads, tokens, d = query.shape
    rows = projected.rows.unfold(1, d, 1)
    slots = torch.stack([rows[:, place] for place in q.places], 1)
    norm = next((norm for norm in norms if q.norm is not None and norm.form.path == q.norm.path), None)
    if norm is not None and q.norm_extent == "head":
        slots = norm(slots).to(dtype).double()
    elif norm is not None:
        return False
    cos, sin = (t.expand(batch, *t.shape[1:]).reshape(batch * tokens, 1, -1) for t in (angles[0].cos, angles[0].sin))
    found = query.transpose(1, 2).reshape(batch * tokens, heads, d)
    once = rotated(q.rotary, slots, cos, sin).to(dtype)
    by_steps = rotated(q.rotary, slots.to(dtype), cos.to(dtype), sin.to(dtype))
    return bool((once == found).sum() > (by_steps == found).sum())


def _factors(heard: Heard) -> list[float]:
    """Return what queries may be multiplied with: 1, or a number that attention holds."""
    held = [value for value in vars(heard.module).values() if isinstance(value, float) and value > 0]
    return list(dict.fromkeys([1.0, heard.query.shape[-1] ** -0.5, *held]))


def _projected(projections: list[Call]) -> Projected:
    rows = [call.returned.double().flatten(0, 1) for call in projections]
    parts, start = [], 0
    for part in rows:
        parts.append((start, start + part.shape[1]))
        start += part.shape[1]
    return Projected(torch.cat(rows, 1), tuple(parts))


def _norms_within(record: Recorded, path: str, products: set[str]) -> list[CalledNorm]:
    """Return the norms inside attention; every module in it that changes what it is given must be one."""
    found = []
    for call in record.calls:
        if not call.path.startswith(f"{path}.") or any(f"{p}.".startswith(f"{call.path}.") for p in products):
            continue
        if call.given.shape == call.returned.shape and torch.equal(call.given, call.returned):
            continue  # dropout
        form = described_norm(call.path, call.module, call.given.shape[-1])
        found.append(CalledNorm(form, call.module, call.given))
    return found


def _angles(record: Recorded, d: int) -> list[Angles]:
    """Return the angles that a layer is given, in each way in which they can be meant."""
    given = record.arguments.get("position_embeddings")
    if not (isinstance(given, tuple) and len(given) == 2 and all(isinstance(t, Tensor) for t in given)):
        return []
    size, axes = given[0].shape[-1], None
    if given[0].dim() == 4:
        axes = _axes_of_columns(record, size, given[0].shape[0])
    doubled = (False, True) if 2 * size <= d else (False,)
    both = (False, True)
    forms = [AngleForm(axes, *ways) for ways in itertools.product(doubled, both, both)]
    return [Angles(form, *form.of(tuple(t.double() for t in given))) for form in forms]


def _axes_of_columns(record: Recorded, size: int, count: int) -> tuple[int, ...]:
    """Return the axis of each column as sections of a config say it: sections by turns, once for each half."""
    config = getattr(record.heard[0].module, "config", None)
    for name in ("rope_parameters", "rope_scaling"):
        sections = (getattr(config, name, None) or {}).get("mrope_section")
        if sections and 2 * sum(sections) == size:
            runs = [(i % count, length) for i, length in enumerate([*sections, *sections])]
            if len(sections) == count:
                return tuple(axis for axis, length in runs for _ in range(length))
    raise Unexplained("its positions have several axes, and its config does not say for which columns")


def _sinks(heard: Heard) -> str | None:
    if heard.sinks is None:
        return None
    for name, parameter in heard.module.named_parameters(recurse=False):
        if parameter.data_ptr() == heard.sinks.data_ptr() and parameter.numel() == heard.query.shape[1]:
            return name
    raise Unexplained("its attention has sinks that are no parameter of it")


def _check_together(q: HeadsForm, k: HeadsForm, v: HeadsForm, norms: list[CalledNorm]) -> None:
    used = {form.norm.path for form in (q, k, v) if form.norm is not None}
    idle = [norm.form.path for norm in norms if norm.form.path not in used]
    if idle:
        raise Unexplained(f"{idle[0]} norms something else than queries, keys and values")
    if (q.rotary, q.angles) != (k.rotary, k.angles):
        raise Unexplained("its queries are turned in another way than its keys")
    if (
        q.norm is not None
        and k.norm is not None
        and (q.norm_extent, q.is_normed_after) != (k.norm_extent, k.is_normed_after)
    ):
        raise Unexplained("its queries are normed in another way than its keys")
    if v.norm is not None and v.norm_extent != "head":
        raise Unexplained("its values are normed over more than a head")
