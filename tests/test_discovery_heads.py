"""Where heads lie and how they are turned and normed is found in what attention was called with, or nothing is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.cohere.modeling_cohere import rotate_half as rotate_pairs
from transformers.models.llama.modeling_llama import rotate_half

from hf_accel.core.model.discovery.forms import AngleForm
from hf_accel.core.model.discovery.heads import Angles, CalledNorm, HeadsForm, Projected, find_gate, find_heads, rotated
from hf_accel.core.model.discovery.norms import NormForm, described_norm
from hf_accel.core.model.discovery.readings import Unexplained
from hf_accel.kernels.native import Heads

B, T, H, G, D = 2, 5, 6, 2, 8
GROUP = H // G
F32 = torch.float32


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).double()


def projected(*parts: Tensor) -> Projected:
    """Return rows made of products' outputs [B, T, N]."""
    ends = [0]
    for part in parts:
        ends.append(ends[-1] + part.shape[-1])
    return Projected(torch.cat([part.flatten(0, 1) for part in parts], 1), tuple(zip(ends, ends[1:])))


def heads(rows: Tensor, count: int) -> Tensor:
    """Return [B, T, count * D] as [B, count, T, D]."""
    return rows.view(B, T, count, D).transpose(1, 2)


Q, K, V = randn(B, T, H * D, seed=1), randn(B, T, G * D, seed=2), randn(B, T, G * D, seed=3)
ANGLES = torch.cat([randn(B, T, D // 2, seed=4)] * 2, -1)


def angles(size: int = D) -> Angles:
    """Return angles as Llama has them: each twice, for the two halves of the columns that are turned."""
    part = torch.cat([ANGLES[..., : size // 2]] * 2, -1)
    return Angles(AngleForm(), part.cos(), part.sin())


def found(
    wanted: Tensor, rows: Projected, group: int = GROUP, norms: Sequence[CalledNorm] = (), **more: Any
) -> HeadsForm:
    return find_heads("its queries", wanted, rows, norms, more.pop("angles", ()), group, F32, **more)


def test_heads_of_separate_products() -> None:
    rows = projected(Q, K, V)
    assert found(heads(Q, H), rows).heads == Heads(0, GROUP * D, D)
    assert found(heads(K, G), rows, 1).heads == Heads(H * D, D, D)
    assert found(heads(V, G), rows, 1).heads == Heads((H + G) * D, D, D)


def test_heads_of_a_fused_product_head_by_head() -> None:
    """As of GPT-NeoX: q, k and v of a head lie together."""
    fused = randn(B, T, H * 3 * D)
    parts = fused.view(B, T, H, 3, D)
    for index in range(3):
        wanted = parts[..., index, :].transpose(1, 2)
        assert found(wanted, projected(fused), 1).heads == Heads(index * D, 3 * D, D)


def test_heads_of_a_fused_product_group_by_group() -> None:
    """As of Falcon: the queries of a group, then its key and value."""
    fused = randn(B, T, G * (GROUP + 2) * D)
    parts = fused.view(B, T, G, GROUP + 2, D)
    stride = (GROUP + 2) * D
    wanted = parts[..., :GROUP, :].flatten(2, 3).transpose(1, 2)
    assert found(wanted, projected(fused)).heads == Heads(0, stride, D)
    assert found(parts[..., GROUP, :].transpose(1, 2), projected(fused), 1).heads == Heads(GROUP * D, stride, D)


@pytest.mark.parametrize("order", [[0, 2, 1, 3, 4, 5], [0, 1, 2, 3, 5, 4]], ids=str)
def test_heads_in_no_regular_order_are_refused(order: list[int]) -> None:
    with pytest.raises(Unexplained, match="no regular order"):
        found(heads(Q, H)[:, order], projected(Q, K, V))


def test_groups_may_take_turns() -> None:
    """Query head h of group g at the place h * G + g."""
    wanted = heads(Q, H).unflatten(1, (GROUP, G)).transpose(1, 2).flatten(1, 2)
    assert found(wanted, projected(Q, K, V)).heads == Heads(0, D, G * D)


def turned(x: Tensor, style: str, size: int = D) -> Tensor:
    """Return heads [B, H, T, D] turned as transformers' models do it."""
    cos, sin = (t[:, None] for t in (angles(size).cos, angles(size).sin))
    part, rest = x[..., :size], x[..., size:]
    if style == "halves":
        done = part * cos + rotate_half(part) * sin
    elif style == "pairs":  # Cohere: an angle twice in a row
        cos, sin = (t[..., : size // 2].repeat_interleave(2, -1) for t in (cos, sin))
        done = part * cos + rotate_pairs(part) * sin
    else:
        raise AssertionError(style)
    return torch.cat([done, rest], -1)


@pytest.mark.parametrize("size", [D, D // 2])
def test_halves(size: int) -> None:
    form = found(turned(heads(Q, H), "halves", size), projected(Q, K, V), angles=[angles(size)])
    assert (form.rotary, form.rotary_size, form.heads) == ("halves", size, Heads(0, GROUP * D, D))


def test_pairs_by_angles_twice_in_a_row() -> None:
    one = angles()
    cos, sin = (t[..., : D // 2].repeat_interleave(2, -1) for t in (one.cos, one.sin))
    form = found(turned(heads(Q, H), "pairs"), projected(Q), angles=[Angles(AngleForm(), cos, sin)])
    assert form.rotary == "pairs"


def test_pairs_by_angles_in_two_halves() -> None:
    form = found(turned(heads(Q, H), "pairs"), projected(Q), angles=[angles()])
    assert form.rotary == "pairs_of_halves"


@pytest.mark.parametrize(
    "form,given",
    [
        (AngleForm(is_doubled=True), lambda cos, sin: (cos[..., : D // 2], sin[..., : D // 2])),
        (AngleForm(is_swapped=True), lambda cos, sin: (sin, cos)),
        (AngleForm(is_backwards=True), lambda cos, sin: (cos, -sin)),
        (
            AngleForm(is_doubled=True, is_swapped=True, is_backwards=True),
            lambda cos, sin: (-sin[..., :4], cos[..., :4]),
        ),
    ],
    ids=["doubled", "swapped", "backwards", "all"],
)
def test_how_angles_are_meant(form: AngleForm, given: Any) -> None:
    one = angles()
    cos, sin = form.of(given(one.cos, one.sin))
    torch.testing.assert_close((cos, sin), (one.cos, one.sin))
    assert not form.is_plain


def test_angles_by_axis() -> None:
    axes = (0, 0, 1, 2, 0, 0, 1, 2)
    given = randn(3, B, T, D).cos(), randn(3, B, T, D).sin()
    cos, sin = AngleForm(axes).of(given)
    for column, axis in enumerate(axes):
        assert torch.equal(cos[..., column], given[0][axis, ..., column])
        assert torch.equal(sin[..., column], given[1][axis, ..., column])


def test_a_rotary_that_nothing_explains_is_refused() -> None:
    wanted = turned(heads(Q, H), "halves") * 1.01
    with pytest.raises(Unexplained, match="nothing known explains its queries"):
        found(wanted, projected(Q), angles=[angles()])


def test_two_readings_are_refused() -> None:
    """At position 0 nothing is turned: every rotary explains that."""
    still = Angles(AngleForm(), torch.ones(B, T, D).double(), torch.zeros(B, T, D).double())
    with pytest.raises(Unexplained, match="readings explain its queries"):
        found(heads(Q, H), projected(Q), angles=[still])


def test_the_same_head_twice_is_refused() -> None:
    with pytest.raises(Unexplained, match="nothing known explains"):
        found(heads(Q, H), projected(Q, Q))


@pytest.mark.parametrize("factor", [0.25, 1.0])
def test_a_factor_of_queries(factor: float) -> None:
    assert found(heads(Q, H) * factor, projected(Q), factors=(1.0, 0.25)).factor == factor


class RMS(nn.Module):
    def __init__(self, *shape: int, seed: int = 0) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(1 + randn(*shape, seed=seed).float() / 4), 1e-5

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight


def called(path: str, module: nn.Module, given: Tensor) -> CalledNorm:
    return CalledNorm(described_norm(path, module, given.shape[-1]), module, given)


def norm_of(form: HeadsForm) -> NormForm:
    assert form.norm is not None
    return form.norm


@torch.no_grad()
def test_norms_of_heads_before_and_after_the_rotary() -> None:
    norm, x = RMS(D), heads(Q, H)
    form = found(turned(norm(x), "halves"), projected(Q, K), norms=[called("n", norm, x)], angles=[angles()])
    assert (norm_of(form).path, form.norm_extent, form.is_normed_after, form.rotary) == ("n", "head", False, "halves")
    once = turned(x, "halves")
    form = found(norm(once), projected(Q, K), norms=[called("n", norm, once)], angles=[angles()])
    assert (norm_of(form).path, form.is_normed_after, form.rotary) == ("n", True, "halves")


@torch.no_grad()
def test_a_norm_over_the_whole_row() -> None:
    norm = RMS(H * D)
    form = found(heads(norm(Q), H), projected(Q, K), norms=[called("n", norm, Q)])
    assert (norm_of(form).path, form.norm_extent) == ("n", "row")


@torch.no_grad()
def test_a_norm_with_weights_of_each_head() -> None:
    norm, x = RMS(H, D), Q.view(B, T, H, D)
    form = found(norm(x).transpose(1, 2), projected(Q, K), norms=[called("n", norm, x)])
    assert (norm_of(form).path, form.norm_extent) == ("n", "heads")


@torch.no_grad()
def test_equal_norms_are_told_apart_by_what_they_were_given() -> None:
    """At first all weights of a model are ones."""
    q_norm, k_norm = RMS(D), RMS(D)
    norms = [called("k", k_norm, heads(K, G)), called("q", q_norm, heads(Q, H))]
    assert norm_of(found(q_norm(heads(Q, H)), projected(Q, K), norms=norms)).path == "q"
    assert norm_of(found(k_norm(heads(K, G)), projected(Q, K), 1, norms=norms)).path == "k"


@torch.no_grad()
def test_a_norm_that_was_given_something_else_explains_nothing() -> None:
    norm = RMS(D)
    with pytest.raises(Unexplained, match="nothing known explains"):
        found(norm(heads(Q, H)), projected(Q), norms=[called("n", norm, heads(Q, H) + 1)])


def test_gates() -> None:
    """As of Qwen3-Next: a head's query and gate lie together."""
    fused, output = randn(B, T, H * 2 * D), randn(B, T, H, D, seed=5)
    gate = fused.view(B, T, H, 2, D)[..., 1, :]
    rows = projected(fused, K)
    given = (output * gate.sigmoid()).flatten(2)
    assert find_gate(output, given, rows, GROUP, F32) == Heads(D, GROUP * 2 * D, 2 * D)
    assert find_gate(output, output.flatten(2), rows, GROUP, F32) is None
    with pytest.raises(Unexplained, match="between attention and its output product"):
        find_gate(output, given * 1.01, rows, GROUP, F32)


def test_rotations_keep_lengths() -> None:
    one = angles()
    for style in ("halves", "pairs_of_halves"):
        x = heads(Q, H)
        made = rotated(style, x, one.cos[:, None], one.sin[:, None])
        torch.testing.assert_close(made.norm(dim=-1), x.norm(dim=-1))
