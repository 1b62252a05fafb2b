"""Routed experts in one native call against a twin in plain loops, for every instruction set this machine has."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from test_native_block import isa
from torch import Tensor

from hf_accel.core.model.experts import apply_gate
from hf_accel.kernels.native import Gate, NativeExperts
from hf_accel.kernels.weights import PackedWeight, dense_matrix
from hf_accel.ops.affine import Scheme, quantize

__all__ = ["isa"]  # the fixture
pytestmark = pytest.mark.native

CLAMPED = Gate("silu", alpha=1.702, limit=1.0)
# interleaved, transposed, gate, bits
LAYOUTS: dict[str, tuple[bool, bool, Gate, int | None]] = {
    "concatenated": (False, False, Gate("silu"), None),
    "interleaved, transposed, clamped": (True, True, CLAMPED, None),
    "interleaved": (True, False, Gate("gelu_tanh"), None),
    "transposed": (False, True, Gate("gelu", limit=0.5), None),
    "8 bits": (False, False, Gate("silu"), 8),
    "4 bits, clamped": (False, False, CLAMPED, 4),
    "3 bits": (True, False, Gate("relu"), 3),
}
# tokens, choices, experts, hidden, inner
SIZES = [(1, 2, 4, 64, 40), (3, 4, 9, 544, 72), (40, 2, 4, 96, 64), (70, 3, 5, 128, 48)]
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 2e-3}


class Layer:
    """Random experts: their weights as numbers, and the native call of them."""

    def __init__(self, layout: str, experts: int, hidden: int, inner: int, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)

        def random(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator)

        self.interleaved, transposed, self.gate, bits = LAYOUTS[layout]
        shapes = {"gate_up": (2 * inner, hidden), "down": (hidden, inner)}
        self.weights: dict[str, list[Tensor]] = {}
        self.biases = {name: [random(rows).to(dtype) for _ in range(experts)] for name, (rows, _) in shapes.items()}
        self.kept: list[Any] = []
        matrices: dict[str, list[bytes]] = {}
        for name, (rows, columns) in shapes.items():
            drawn = [(random(rows, columns) / columns**0.5).to(dtype) for _ in range(experts)]
            if bits is not None:
                scheme = Scheme(bits, None if columns % 32 else 32)
                packed = [PackedWeight.pack(quantize(weight, scheme)) for weight in drawn]
                self.kept += packed
                drawn = [weight.dequantize() for weight in packed]
                matrices[name] = [w.matrix(b) for w, b in zip(packed, self.biases[name], strict=True)]
            else:
                lying = [weight.T.contiguous() if transposed else weight for weight in drawn]
                self.kept += lying
                matrices[name] = [dense_matrix(w, b, transposed) for w, b in zip(lying, self.biases[name], strict=True)]
            self.weights[name] = drawn
        self.call = NativeExperts(
            dtype=dtype,
            hidden=hidden,
            inner=inner,
            gate=self.gate,
            interleaved=self.interleaved,
            transposed=transposed,
            **matrices,
        )
        self.hidden, self.experts, self.dtype = hidden, experts, dtype

    def drawn(self, tokens: int, choices: int, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
        """Return hidden states, ids, of which some stand for no expert, and weights."""
        generator = torch.Generator().manual_seed(seed)
        order = torch.rand(tokens, self.experts + 1, generator=generator).argsort(dim=1)
        hidden = torch.randn(tokens, self.hidden, generator=generator)
        weights = torch.rand(tokens, choices, generator=generator)
        return hidden.to(self.dtype), order[:, :choices], weights.to(self.dtype)

    def twin(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """Return the same in fp64, one token and one expert after the other."""
        output = torch.zeros(hidden.shape, dtype=torch.float64)
        for (token, choice), expert in zip(torch.cartesian_prod(*map(torch.arange, ids.shape)), ids.flatten()):
            if not 0 <= expert < self.experts:
                continue
            (up, down), (up_bias, down_bias) = (
                [kind[name][expert].double() for name in ("gate_up", "down")] for kind in (self.weights, self.biases)
            )
            both = up @ hidden[token].double() + up_bias
            parts = (both[::2], both[1::2]) if self.interleaved else both.chunk(2)
            output[token] += weights[token, choice].double() * (down @ apply_gate(self.gate, *parts) + down_bias)
        return output


@functools.cache
def layer(layout: str, experts: int, hidden: int, inner: int, dtype: torch.dtype) -> Layer:
    return Layer(layout, experts, hidden, inner, dtype)


def bound(layout: str, dtype: torch.dtype) -> float:
    bits = LAYOUTS[layout][3]
    rounded = {None: 0.0, 8: 2e-4, 4: 2e-2, 3: 2e-2}[bits]  # activations beside packed weights, too
    return max(rounded, BOUNDS[dtype])


def difference(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_experts_equal_their_twin(layout: str, dtype: torch.dtype, isa: str) -> None:
    for tokens, choices, *sizes in SIZES:
        experts = layer(layout, *sizes, dtype)
        given = experts.drawn(tokens, choices)
        assert difference(experts.call(*given), experts.twin(*given)) < bound(layout, dtype)


def test_weights_may_be_of_more_digits() -> None:
    experts = layer("concatenated", 4, 64, 40, torch.bfloat16)
    hidden, ids, _ = experts.drawn(5, 2)
    weights = torch.full((5, 2), 1 + 2**-12)  # one in bf16
    found = experts.call(hidden, ids, weights)
    assert difference(found, experts.twin(hidden, ids, weights)) < BOUNDS[torch.bfloat16]


def test_ids_out_of_range_are_no_expert() -> None:
    experts = layer("concatenated", 4, 64, 40, torch.float32)
    hidden, ids, weights = experts.drawn(6, 2)
    ids[:3] = torch.tensor([[4, -1], [2**40, 4], [-(2**40), 2**62]])
    found = experts.call(hidden, ids, weights)
    assert not found[:3].any()
    assert difference(found, experts.twin(hidden, ids, weights)) < 1e-5


def test_rows_are_counted() -> None:
    experts = Layer("concatenated", 4, 64, 40, torch.float32)
    for tokens in (1, 7, 70):
        before = experts.call.counts.clone()
        hidden, ids, weights = experts.drawn(tokens, 3)
        experts.call(hidden, ids, weights)
        expected = torch.bincount(ids[ids < 4], minlength=4)
        assert torch.equal(experts.call.counts - before, expected)
        experts.call(hidden, ids, weights, is_counted=False)
        assert torch.equal(experts.call.counts - before, expected)


@pytest.mark.parametrize("layout", ["concatenated", "4 bits, clamped", "transposed"])
def test_a_row_does_not_depend_on_the_others(layout: str, isa: str) -> None:
    experts = layer(layout, 9, 544, 72, torch.bfloat16)
    hidden, ids, weights = experts.drawn(33, 4)
    together = experts.call(hidden, ids, weights)
    if isa == "amx" and LAYOUTS[layout][3] is None:  # a single row has its products summed in another order there
        assert difference(experts.call(hidden[:1], ids[:1], weights[:1]), together[:1].double()) < 8e-3
        return
    for token in (0, 20):
        alone = experts.call(*(part[token : token + 1] for part in (hidden, ids, weights)))
        assert torch.equal(alone[0], together[token])


@pytest.mark.parametrize("layout", ["concatenated", "8 bits", "interleaved, transposed, clamped"])
def test_threads_change_nothing(layout: str) -> None:
    experts = layer(layout, 9, 544, 72, torch.bfloat16)
    given = experts.drawn(33, 4)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(experts.call(*given))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)


def test_blocks_of_tokens_change_nothing() -> None:
    """More tokens than are taken at once (32 MB of gate and up)."""
    experts = layer("4 bits, clamped", 5, 64, 2048, torch.bfloat16)
    hidden, ids, weights = experts.drawn(1200, 3)
    found = experts.call(hidden, ids, weights)
    last = experts.call(hidden[-7:], ids[-7:], weights[-7:])
    assert torch.equal(found[-7:], last)


def test_an_expert_can_be_exchanged() -> None:
    experts, others = (Layer("concatenated", 4, 64, 40, torch.float32) for _ in range(2))
    changed = others.weights["down"][2].mul_(-1)
    experts.call.set(2, *(dense_matrix(others.weights[n][2], others.biases[n][2]) for n in ("gate_up", "down")))
    experts.weights["down"][2] = changed
    given = experts.drawn(9, 2)
    assert difference(experts.call(*given), experts.twin(*given)) < 1e-5


def test_what_does_not_fit_is_refused() -> None:
    experts = layer("concatenated", 4, 64, 40, torch.bfloat16)
    hidden, ids, weights = experts.drawn(3, 2)
    for given in (
        (hidden.float(), ids, weights),
        (hidden[:, :-1], ids, weights),
        (hidden, ids.int(), weights),
        (hidden, ids, weights.half()),
        (hidden, ids[:2], weights),
        (hidden, ids, weights[:, :1]),
    ):
        with pytest.raises(ValueError, match=r"take hidden \[T, 64\]"):
            experts.call(*given)
    assert not experts.call(hidden[:0], ids[:0], weights[:0]).numel()
    assert not experts.call(hidden, ids[:, :0], weights[:, :0]).any()
