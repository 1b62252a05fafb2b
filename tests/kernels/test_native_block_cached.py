"""The native decoder layer over rows of codes against the layers of transformers, over the same codes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from block_twin import difference, inputs, random_block
from test_native_block import SMALL, isa
from test_native_block_stock import EXTRA, SIZES, native_twin
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from hf_accel.attention import held
from hf_accel.attention.names import NAME
from hf_accel.cache.codec import Codec
from hf_accel.cache.layers.growing import GrowingLayer
from hf_accel.core.drift import CACHE
from hf_accel.kernels import native
from hf_accel.kernels.native import NativeBlock
from hf_accel.ops import cached

__all__ = ["isa"]  # the fixture
pytestmark = pytest.mark.skipif(not native.is_available(), reason=native.status().reason)
# a last bit of a new key may send it to the next code, a step of 1/127 or 1/15 of its range at one position
TOLERANCES = {torch.float32: 1e-3, torch.float16: 5e-3, torch.bfloat16: 2e-2}
QUERIES = {8: 1e-3, 4: 2e-2}
KINDS = {"llama": 16, "qwen3": 64, "gemma2": 80, "phi3": 16, "gemma3_text": 128}


def stock_layer(kind: str, size: int, dtype: torch.dtype) -> tuple[Any, Any]:
    torch.manual_seed(1)
    config = AutoConfig.for_model(kind, **{**SIZES, **EXTRA[kind], "head_dim": size})
    config._attn_implementation = NAME
    model = AutoModelForCausalLM.from_config(config).to(dtype).eval()
    return model.model, config


def causal(tokens: int, positions: int) -> Tensor:
    return torch.ones(1, 1, tokens, positions, dtype=torch.bool).tril(positions - tokens)


@pytest.mark.parametrize("dtype", native.DTYPES, ids=str)
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_equals_the_layer_over_the_same_rows(
    isa: str, kind: str, bits: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the layer's attention is PyTorch's over decoded rows, so that queries are not rounded as ours are."""
    model, config = stock_layer(kind, KINDS[kind], dtype)
    layer = model.layers[0]
    block = native_twin(layer, config, kind)
    size, groups = block.shape.head_dim, block.shape.kv_heads
    for pads in ([0], [5, 0, 250]):
        cache: Any = DynamicCache()
        cache.layers = [GrowingLayer(0, Codec(bits))]
        past = 253
        cache.layers[0].update(*torch.randn(2, len(pads), groups, past, size).to(dtype))
        for tokens in (1, 2, 3, 4, 1):
            hidden = torch.randn(len(pads), tokens, config.hidden_size).to(dtype)
            arguments = (config.layer_types[0],) if kind == "gemma3_text" else ()
            cos, sin = model.rotary_emb(hidden, torch.arange(past, past + tokens)[None], *arguments)
            mask = None
            if len(pads) > 1 or tokens > 1:
                mask = causal(tokens, past + tokens).repeat(len(pads), 1, 1, 1)
                for row, pad in enumerate(pads):
                    mask[row, ..., :pad] = False
            ours, decoding = copy.deepcopy(cache.layers[0]), copy.deepcopy(cache)
            keys, values, at, first, *_ = ours.reserve(len(pads), tokens, groups, size, dtype, hidden.device)
            found = block(hidden, cos, sin, keys, values, at, first, mask, None, bits)
            ours.commit(tokens)
            for used in (cache, decoding):
                with monkeypatch.context() as patch:
                    if used is decoding:
                        patch.setattr(held, "MAX_QUERIES", 0)
                    output = layer(hidden, position_embeddings=(cos, sin), attention_mask=mask, **{CACHE: used})
                output = output[0] if isinstance(output, tuple) else output
                assert difference(found, output) < TOLERANCES[dtype] + (used is decoding) * QUERIES[bits]
            for name in ("keys", "values"):
                mine, theirs = getattr(ours, name), getattr(cache.layers[0], name)
                assert torch.equal(mine[:, :, :past], theirs[:, :, :past])
                assert difference(mine[:, :, past:], theirs[:, :, past:]) < (0.02 if bits == 8 else 0.1)
            past += tokens


def coded(arguments: dict[str, Any], block: NativeBlock, bits: int) -> dict[str, Any]:
    parts = {name: cached.encode(arguments[name], bits, is_key=name == "keys") for name in ("keys", "values")}
    return {**arguments, **parts, "bits": bits}


def cut(arguments: dict[str, Any], b: int, t: int | None = None) -> dict[str, Any]:
    """Return the arguments of sequence b, or of one token of it, over the same buffers."""
    at = slice(None) if t is None else slice(t, t + 1)
    part = {name: arguments[name][b : b + 1, at].contiguous() for name in ("hidden", "cos", "sin")}
    return part | {name: arguments[name][b : b + 1] for name in ("keys", "values")} | {"bits": arguments["bits"]}


@pytest.mark.parametrize("dtype", native.DTYPES, ids=str)
@pytest.mark.parametrize("bits", [8, 4])
def test_a_token_comes_out_the_same_in_any_batch(isa: str, bits: int, dtype: torch.dtype) -> None:
    block = random_block(SMALL, dtype, head_norms=True)
    for batch, tokens, past in ((1, 4, 0), (2, 5, 250), (4, 3, 513), (16, 1, 255)):
        together = coded(inputs(SMALL, dtype, batch, tokens, past), block, bits)
        alone = copy.deepcopy(together)
        found = block(**together)
        for b in range(batch):
            for t in range(tokens):
                assert torch.equal(block(**cut(alone, b, t), past=past + t)[0, 0], found[b, t])
        for name in ("keys", "values"):
            assert torch.equal(together[name], alone[name])


@pytest.mark.parametrize("dtype", native.DTYPES, ids=str)
@pytest.mark.parametrize("bits", [8, 4])
def test_rows_of_different_length(isa: str, bits: int, dtype: torch.dtype) -> None:
    """Behind a row's end lie bytes that read as NaN, and the mask says that they are visible."""
    block = random_block(SMALL, dtype)
    for tokens, pasts in ((1, [600, 3, 255, 256, 257]), (4, [254, 5, 253, 770]), (3, [0, 512])):
        together = coded(inputs(SMALL, dtype, len(pasts), tokens, max(pasts)), block, bits)
        for name in ("keys", "values"):
            for row, past in zip(together[name], pasts, strict=True):
                row[:, past:] = 255
        mask = torch.rand(len(pasts), 1, tokens, max(pasts) + tokens) < 0.7
        mask[..., 0] = True
        for row, past in zip(mask, pasts, strict=True):
            row[..., : past + tokens] &= causal(tokens, past + tokens)[0]
            row[..., past + tokens :] = True
        for given in (None, mask):
            ours, alone = copy.deepcopy(together), copy.deepcopy(together)
            found = block(**ours, row_past=torch.tensor(pasts), mask=given)
            for b, past in enumerate(pasts):
                own = None if given is None else given[b : b + 1, ..., : past + tokens]
                expected = block(**cut(alone, b), past=past, mask=own)
                assert expected.isfinite().all()
                assert torch.equal(found[b : b + 1], expected)
            for name in ("keys", "values"):
                assert torch.equal(ours[name], alone[name])
                for row, before, past in zip(ours[name], together[name], pasts, strict=True):
                    assert (row[:, past + tokens :] == 255).all()
                    assert torch.equal(row[:, :past], before[:, :past])
