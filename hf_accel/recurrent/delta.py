"""The gated delta rule (qwen3_next, qwen3_5, olmo_hybrid), and the one with a decay per key (kimi_linear).

Projections say by their names what rows they give: q, k, v, z or g (the gate), b (beta) and a (the rate of decay), one
letter each, `in_proj_qkvz` those four. Rows of several may lie part after part or head after head; a gate of low rank
has two products.
"""

from __future__ import annotations

from itertools import product
from typing import Any

from torch import nn

from hf_accel.kernels import native
from hf_accel.kernels.native import Span
from hf_accel.recurrent.forms import Form, Sizes, depthwise, norms_of, others_of, width_of

TITLE = "gated delta rule"
_LETTERS = frozenset("qkvzgba")
_IGNORED = frozenset({"in", "proj"})


def _named_rows(children: dict[str, nn.Module]) -> dict[tuple[str, ...], str]:
    """Return chain of children -> the letters of what it gives."""
    found: dict[tuple[str, ...], str] = {}
    for name, child in children.items():
        parts = [part for part in name.split("_") if part not in _IGNORED]
        if width_of(child)[0] and len(parts) == 1 and set(parts[0]) <= _LETTERS:
            found[name,] = parts[0].replace("z", "g")
    low_rank = ("g_a_proj", "g_b_proj")
    if all(width_of(children.get(name))[0] for name in low_rank):
        found[low_rank] = "g"
    return found


def _spans(rows: dict[tuple[str, ...], str], counts: dict[str, int], groups: int) -> dict[str, Span]:
    """Return letter -> where its values are; groups: rows lie in so many groups that have some of each."""
    found: dict[str, Span] = {}
    for source, letters in enumerate(rows.values()):
        of_each = [counts[letter] // groups for letter in letters]
        for place, letter in enumerate(letters):
            stride = sum(of_each)
            found[letter] = Span(source, sum(of_each[:place]), counts[letter], of_each[place], stride)
    return found


def forms(module: Any, sizes: Sizes) -> list[Form]:
    """Return the readings of a mixer as a gated delta rule; none where it holds something else."""
    if sizes.state is None or len(sizes.state) != 3 or others_of(module) or getattr(module, "D", None) is not None:
        return []
    (channels, taps), (heads, keys, values) = sizes.conv, sizes.state
    inner = heads * values
    groups = (channels - inner) // (2 * keys)
    children = dict(module.named_children())
    rows = _named_rows(children)
    letters = "".join(rows.values())
    used = {name for chain in rows for name in chain} | {*depthwise(module)}
    decays = [n for n, child in children.items() if n not in used and getattr(child, "A_log", None) is not None]
    needed = "qkvgb" + ("" if decays else "a")
    outputs = [n for n, child in children.items() if n not in used and width_of(child)[0] == inner]
    norms = [n for n in children if n not in {*used, *outputs, *decays} and [*children[n].parameters()]]
    if sorted(letters) != sorted(needed) or (len(outputs), len(norms), len(decays) < 2) != (1, 1, True) or groups < 1:
        return []
    counts = {"q": groups * keys, "k": groups * keys, "v": inner, "g": inner, "b": heads, "a": heads}
    widths = {chain: sum(counts[letter] for letter in given) for chain, given in rows.items()}
    if any(width_of(children[chain[-1]])[1] != width for chain, width in widths.items()):
        return []
    if channels != inner + 2 * groups * keys or heads % groups:
        return []
    found = norms_of(children[norms[0]], values, (values,))

    def form(apart: int, beta_scale: float) -> Form:
        spans = _spans(rows, counts, apart)
        shape = native.MixerShape(
            kind="delta",
            parts=(spans["q"], spans["k"], spans["v"]),
            channels=channels,
            taps=taps,
            is_silu=True,
            heads=heads,
            groups=groups,
            key_dim=keys,
            value_dim=values,
            norm=found[0],
            beta_scale=beta_scale,
            gate=spans["g"],
            beta=spans["b"],
            rate=spans.get("a", Span(0, 0, heads)),
        )
        return Form(
            title=TITLE,
            shape=shape,
            inputs=tuple(rows),
            output=outputs[0],
            conv=depthwise(module)[0],
            norm=norms[0],
            decay=decays[0] if decays else None,
        )

    are_joined = any(len(given) > 1 for given in rows.values())
    layouts = (1, groups) if are_joined and groups > 1 else (1,)
    return [form(*reading) for reading in product(layouts, (1.0, 2.0)) if found]
