"""Prompts through the native decoder layer, in passes, against transformers' layers and against shorter calls."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from block_twin import changed, difference, inputs, random_block, twin
from test_native_block import SMALL, isa
from test_native_block_stock import EXTRA, ULPS, native_twin, stock_layer
from torch import Tensor
from transformers import DynamicCache

from hf_accel.core.drift import CACHE
from hf_accel.kernels import native
from hf_accel.kernels.native import NativeBlock
from hf_accel.kernels.weights import PackedWeight
from hf_accel.ops.affine import Scheme, quantize
from hf_accel.ops.cached import row_bytes

__all__ = ["isa"]  # the fixture
pytestmark = pytest.mark.skipif(not native.is_available(), reason=native.status().reason)
# 32 columns are what pairs of bf16 need to meet many rows at a time; 60 are none of them
WIDE = changed(SMALL, hidden=96, heads=4, kv_heads=2, head_dim=16, inner=160)
SIZES = [31, 32, 33, 64, 65, 129, 200]
# of fp32 the order of sums; in 16 bits a flipped rounding, and attention weights rounded before they are summed
TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}
# a last bit may send a rounded number to the next code: of what products read, of keys and of values
ROUNDED = {8: 1e-3, 4: 3e-2, 3: 3e-2}


def masked(batch: int, tokens: int, window: int | None = None) -> Tensor:
    """Causal [B, 1, T, T] with left padding of seven tokens a row more; a window hides what is further back."""
    mask = torch.ones(batch, 1, tokens, tokens, dtype=torch.bool).tril()
    for row in range(batch):
        mask[row, ..., : 7 * row] = False
    return mask if window is None else mask.triu(1 - window)


@pytest.mark.parametrize("dtype", native.DTYPES, ids=str)
@pytest.mark.parametrize("kind", [kind for kind in EXTRA if kind != "gemma2"])  # its eager masks are not of this form
@torch.no_grad()
def test_equals_the_layer_of_transformers(isa: str, kind: str, dtype: torch.dtype) -> None:
    model, config = stock_layer(kind, dtype)
    layer = model.layers[0]
    block = native_twin(layer, config, kind)
    d, g = block.shape.head_dim, block.shape.kv_heads
    for batch, tokens, mask in (
        (1, 33, None),
        (1, 150, None),
        (2, 75, masked(2, 75)),
        (3, 47, masked(3, 47, 20)),
        (1, 140, masked(1, 140, 9)),
    ):
        hidden = torch.randn(batch, tokens, config.hidden_size).to(dtype)
        arguments = (config.layer_types[0],) if kind == "gemma3_text" else ()
        cos, sin = model.rotary_emb(hidden, torch.arange(tokens)[None], *arguments)
        buffers = [torch.full((batch, g, tokens + 3, d), math.nan, dtype=dtype) for _ in range(2)]
        found = block(hidden, cos, sin, *buffers, 0, 0, mask)
        stock_mask = torch.ones(1, 1, tokens, tokens, dtype=torch.bool).tril() if mask is None else mask
        cache = DynamicCache()
        expected = layer(hidden, attention_mask=stock_mask, position_embeddings=(cos, sin), **{CACHE: cache})
        expected = expected[0] if isinstance(expected, tuple) else expected
        seen = torch.ones(batch, tokens, dtype=torch.bool) if mask is None else mask[:, 0].any(-1)
        assert found is not None
        assert difference(found[seen], expected[seen]) < ULPS[dtype], (batch, tokens)
        for mine, theirs in zip(buffers, (cache.layers[0].keys, cache.layers[0].values)):
            assert torch.allclose(mine[:, :, :tokens].double(), theirs.double(), rtol=0, atol=4 * ULPS[dtype])
            assert mine[:, :, tokens:].isnan().all()


def packed(block: NativeBlock, bits: int, as_they_are: tuple[str, ...] = ()) -> NativeBlock:
    """The same layer with weights of so many bits; as_they_are: names of parts that keep theirs."""
    scheme = Scheme(bits, None if bits == 8 else 32, symmetric=True)

    def pack(part: Any) -> Any:
        if isinstance(part, tuple):
            return tuple(map(pack, part))
        if not isinstance(part, native.Projection) or part.weight.shape[1] % 32:
            return part
        return replace(part, weight=PackedWeight.pack(quantize(part.weight, scheme)))

    parts = {name: part for name, part in vars(block.weights).items() if name not in as_they_are}
    return NativeBlock(block.shape, replace(block.weights, **{name: pack(part) for name, part in parts.items()}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bits, cached", [(None, None), (8, None), (4, None), (3, None), (None, 8), (None, 4), (4, 8)])
@torch.no_grad()
def test_equals_calls_of_a_few_rows(isa: str, bits: int | None, cached: int | None, dtype: torch.dtype) -> None:
    """At boundaries of groups, lanes and passes; what few rows give is compared with transformers elsewhere."""
    block = random_block(WIDE, dtype, bias=True, head_norms=True)
    block = block if bits is None else packed(block, bits)
    for tokens in SIZES:
        given = inputs(WIDE, dtype, 1, tokens, 3)
        if cached is not None:
            size = row_bytes(cached, WIDE.head_dim)
            shape = (*given["keys"].shape[:3], size)
            given |= {"keys": torch.zeros(shape, dtype=torch.uint8), "values": torch.zeros(shape, dtype=torch.uint8)}
            # the three positions before are a call of their own
            first = inputs(WIDE, dtype, 1, 3, 0)
            block(**(first | {"keys": given["keys"], "values": given["values"], "past": 0, "bits": cached}))
        few = {name: value.clone() if isinstance(value, Tensor) else value for name, value in given.items()}
        found = block(**given, bits=cached)
        parts = []
        for at in range(0, tokens, 16):
            some = {name: few[name][:, at : at + 16] for name in ("hidden", "cos", "sin")}
            some["hidden"] = some["hidden"].contiguous()
            parts.append(block(**(few | some | {"past": 3 + at}), bits=cached))
        tolerance = TOLERANCES[dtype] if bits is cached is None else ROUNDED[min(bits or 9, cached or 9)]
        assert difference(found, torch.cat(parts, 1)) < max(tolerance, TOLERANCES[dtype]), tokens
        if cached is None:
            for name in ("keys", "values"):
                assert difference(given[name][:, :, 3:], few[name][:, :, 3:]) < max(tolerance, TOLERANCES[dtype])


@pytest.mark.parametrize("as_they_are", ["up", "gate"])
@torch.no_grad()
def test_a_gate_of_few_bits_beside_weights_as_they_are(isa: str, as_they_are: str) -> None:
    """Results of both wait in one layout, beside more rows than packed weights share with others."""
    dense = random_block(WIDE, torch.float32)
    block = packed(dense, 4, (as_they_are,))
    given = inputs(WIDE, torch.float32, 1, 70, 3)
    few = {name: value.clone() if isinstance(value, Tensor) else value for name, value in given.items()}
    parts = []
    for at in range(0, 70, 16):
        some = {name: few[name][:, at : at + 16].contiguous() for name in ("hidden", "cos", "sin")}
        parts.append(block(**(few | some | {"past": 3 + at})))
    assert difference(block(**given), torch.cat(parts, 1)) < ROUNDED[4]


@torch.no_grad()
def test_many_rows_of_many_sequences(isa: str) -> None:
    """More sequences than rows in a pass, and a window's buffers whose first positions are out of sight."""
    block = random_block(WIDE, torch.float32, out_norms=True)
    for batch, tokens, past, first in ((130, 1, 2, 0), (45, 3, 6, 0), (40, 1, 9, 4)):
        given = inputs(WIDE, torch.float32, batch, tokens, past) | {"first": first}
        kept = {name: value.clone() if isinstance(value, Tensor) else value for name, value in given.items()}
        assert difference(block(**given), twin(block, **kept)) < TOLERANCES[torch.float32]


@torch.no_grad()
def test_a_mask_that_looks_ahead_has_its_way_or_there_is_no_result() -> None:
    block = random_block(WIDE, torch.float32)
    ahead = torch.ones(1, 1, 100, 100, dtype=torch.bool)
    given = inputs(WIDE, torch.float32, 1, 100, 0) | {"mask": ahead}
    kept = {name: value.clone() if isinstance(value, Tensor) else value for name, value in given.items()}
    assert difference(block(**given), twin(block, **kept)) < TOLERANCES[torch.float32]
    two_passes = inputs(WIDE, torch.float32, 1, 160, 0)
    mask = masked(1, 160)
    assert block(**two_passes, mask=mask) is not None
    mask[0, 0, 2, 159] = True
    assert block(**two_passes, mask=mask) is None


@torch.no_grad()
def test_what_only_few_rows_can_do_has_no_result_of_many() -> None:
    block = random_block(WIDE, torch.float32)
    for tokens, is_served in ((32, True), (33, False)):
        given = inputs(WIDE, torch.float32, 1, tokens, 0)
        additive = torch.zeros(1, 1, tokens, tokens).masked_fill(~masked(1, tokens), torch.finfo(torch.float32).min)
        assert (block(**given, mask=additive) is not None) is is_served
        assert (block(**given, row_past=torch.tensor([0])) is not None) is is_served


@torch.no_grad()
@pytest.mark.parametrize("tokens", [20, 40, 200])
def test_scores_that_are_not_finite_give_no_result(tokens: int) -> None:
    block = random_block(WIDE, torch.float32)
    given = inputs(WIDE, torch.float32, 1, tokens, 0)
    assert block(**given) is not None
    given["hidden"][0, tokens // 2, 0] = math.inf
    assert block(**given) is None


@torch.no_grad()
@pytest.mark.parametrize("tokens", [12, 40])
@pytest.mark.parametrize("scale", [3.0, 40.0])
def test_sharp_attention(isa: str, scale: float, tokens: int) -> None:
    """Scores so far apart that most weights are too small to show: they are left out, and nothing else is."""
    block = random_block(replace(WIDE, scale=scale), torch.float32)
    given = inputs(WIDE, torch.float32, 1, tokens, 2)
    kept = {name: value.clone() if isinstance(value, Tensor) else value for name, value in given.items()}
    assert difference(block(**given), twin(block, **kept)) < 1e-4
