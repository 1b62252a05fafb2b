"""Grouped attention against a textbook twin with loops, and its place in transformers' registries."""

from __future__ import annotations

import math

import pytest
import torch
from comparison import assert_equal_calls, optimised
from models import build, padded
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import hf_accel
from hf_accel import AttentionConfig
from hf_accel.attention.grouped import MAX_QUERIES, grouped_attention_forward
from hf_accel.attention.names import EAGER_NAME, NAME
from hf_accel.cache.probing import layer_shapes
from hf_accel.core.model.back_ends import BACK_ENDS
from hf_accel.ops.attention import grouped_attention


def textbook(query, key, value, mask=None, scale=None):
    """Attention by the definition, one query of one head at a time, in float64."""
    batch, heads, tokens, size = query.shape
    ratio = heads // key.shape[1]
    output = torch.zeros(batch, heads, tokens, value.shape[3], dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            for t in range(tokens):
                scores = []
                for s in range(key.shape[2]):
                    score = float(query[b, h, t].double() @ key[b, h // ratio, s].double())
                    score *= scale if scale is not None else 1 / math.sqrt(size)
                    if mask is not None:
                        entry = mask[b if mask.shape[0] > 1 else 0, h if mask.shape[1] > 1 else 0, t, s]
                        score = score + float(entry) if mask.dtype != torch.bool else (score if entry else -math.inf)
                    scores.append(score)
                weights = torch.softmax(torch.tensor(scores, dtype=torch.float64), 0)
                output[b, h, t] = weights @ value[b, h // ratio].double()
    return output


def states(heads: int, groups: int, tokens: int, past: int, value_size: int = 6, dtype=torch.float64):
    generator = torch.Generator().manual_seed(heads * 100 + groups * 10 + tokens)
    make = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)  # noqa: E731
    return make(2, heads, tokens, 6), make(2, groups, past, 6), make(2, groups, past, value_size)


MASKS = ["none", "bool", "additive", "one row", "per head"]


def mask_of(kind: str, heads: int, tokens: int, past: int) -> torch.Tensor | None:
    generator = torch.Generator().manual_seed(7)
    if kind == "none":
        return None
    rows, columns = (1 if kind == "one row" else 2), (heads if kind == "per head" else 1)
    mask = torch.rand(rows, columns, tokens, past, generator=generator) > 0.4
    mask[..., 0] = True
    return torch.where(mask, 0.0, -2.5).double() if kind == "additive" else mask


@pytest.mark.parametrize("heads,groups", [(1, 1), (2, 1), (4, 2), (6, 2), (8, 1), (6, 3), (4, 4), (7, 1)])
@pytest.mark.parametrize("tokens", [1, 2, 5])
@pytest.mark.parametrize("kind", MASKS)
def test_equal_to_the_textbook(heads: int, groups: int, tokens: int, kind: str) -> None:
    query, key, value = states(heads, groups, tokens, past=9)
    mask = mask_of(kind, heads, tokens, 9)
    found = grouped_attention(query, key, value, mask)
    torch.testing.assert_close(found, textbook(query, key, value, mask), atol=1e-12, rtol=1e-12)
    found = grouped_attention(query, key, value, mask, scale=0.3)
    torch.testing.assert_close(found, textbook(query, key, value, mask, 0.3), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("dtype,bound", [(torch.float32, 1e-6), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
def test_rounding_of_smaller_dtypes(dtype: torch.dtype, bound: float) -> None:
    query, key, value = states(6, 2, 3, 40, dtype=dtype)
    expected = textbook(query, key, value)
    found = grouped_attention(query, key, value).double()
    assert float((found - expected).norm() / expected.norm()) < bound


def test_values_of_another_size() -> None:
    query, key, value = states(4, 2, 3, 9, value_size=10)
    torch.testing.assert_close(grouped_attention(query, key, value), textbook(query, key, value))


def test_uneven_heads_are_refused() -> None:
    query, key, value = states(6, 2, 1, 9)
    with pytest.raises(ValueError, match="5 query heads cannot share 2"):
        grouped_attention(query[:, :5], key, value)


def test_views_of_a_larger_buffer() -> None:
    query, key, value = states(6, 2, 2, 40)
    found = grouped_attention(query, key[:, :, 3:17], value[:, :, 3:17])
    torch.testing.assert_close(found, textbook(query, key[:, :, 3:17], value[:, :, 3:17]))


def test_in_both_registries() -> None:
    """Registered as attention only, transformers would pass no mask and padded batches would be wrong."""
    assert AttentionInterface._global_mapping[NAME] is grouped_attention_forward
    arguments = {"batch_size": 2, "q_length": 3, "kv_length": 5, "q_offset": 2, "kv_offset": 0}
    masks = [make(**arguments) for make in (AttentionMaskInterface._global_mapping[NAME], sdpa_mask)]
    assert masks[0] is not None
    assert torch.equal(*masks)
    assert not any(word in NAME for word in ("flash", "sdpa", "flex", "/", "|"))


@pytest.mark.parametrize("name", ["eager", "sdpa", NAME], ids=str)
def test_the_list_of_back_ends_says_what_they_read(name: str) -> None:
    model = build("llama")
    if name is NAME:
        hf_accel.optimize(model, [AttentionConfig()])
    else:
        model.set_attn_implementation(name)
    assert {shape.reads_held for shape in layer_shapes(model)} == {BACK_ENDS[name].reads_held}
    assert list(BACK_ENDS) == ["eager", "sdpa", NAME, EAGER_NAME]


class Largest(TorchDispatchMode):
    """Notes the largest tensor that any operator returns, in elements."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor) and not tensor._is_view():
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("tokens", [1, 3, MAX_QUERIES])
@pytest.mark.parametrize("masked", [False, True])
def test_keys_and_values_are_never_expanded(tokens: int, masked: bool) -> None:
    past = 4096
    query = torch.randn(2, 16, tokens, 32)
    key, value = torch.randn(2, 2, past, 32), torch.randn(2, 2, past, 32)
    mask = torch.ones(2, 1, tokens, past, dtype=torch.bool) if masked or tokens > 1 else None
    module = torch.nn.Module()
    module.num_key_value_groups, module.is_causal = 8, True
    expanded = 2 * 16 * past * 32
    with Largest() as largest:
        found, weights = grouped_attention_forward(module, query, key, value, mask, scaling=0.2)
    assert weights is None
    assert found.shape == (2, tokens, 16, 32)
    assert found.is_contiguous()
    # scores of every head and query, and the mask repeated for the heads of a group, are the most there is
    assert largest.elements <= max(2 * 16 * tokens * past, key.numel())
    assert largest.elements < expanded or tokens == MAX_QUERIES


def test_against_transformers_own_attention() -> None:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    module = torch.nn.Module()
    module.num_key_value_groups, module.is_causal = 3, True
    for tokens in (1, 2, MAX_QUERIES, MAX_QUERIES + 1, 40):
        for past in (tokens, 50):
            query, key, value = states(6, 2, tokens, past, dtype=torch.float32)
            for kind in ("none", "bool", "per head"):
                mask = mask_of(kind, 6, tokens, past)
                if mask is None and past != tokens and tokens > 1:
                    continue  # transformers always passes a mask there
                expected, _ = sdpa_attention_forward(module, query, key, value, mask, scaling=0.4)
                found, _ = grouped_attention_forward(module, query, key, value, mask, scaling=0.4)
                torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_rows_that_see_nothing_are_stocks() -> None:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    module = torch.nn.Module()
    module.num_key_value_groups, module.is_causal = 3, True
    query, key, value = states(6, 2, 3, 9, dtype=torch.float32)
    mask = torch.ones(2, 1, 3, 9, dtype=torch.bool)
    mask[0, :, 1] = False
    expected, _ = sdpa_attention_forward(module, query, key, value, mask)
    found, _ = grouped_attention_forward(module, query, key, value, mask)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5, equal_nan=True)


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3", "gemma3", "bitnet"])
def test_padded_batches_and_verification_steps(name: str) -> None:
    stock = build(name)
    patched = optimised(stock, [AttentionConfig()])
    assert_equal_calls(stock, patched, lambda model: model.generate(**padded([2, 12, 7]), max_new_tokens=20))
    call = lambda model: model.generate(padded([12])["input_ids"], prompt_lookup_num_tokens=3, max_new_tokens=30)  # noqa: E731
    assert_equal_calls(stock, patched, call)


def test_models_that_ask_for_its_name_find_sdpa() -> None:
    """Some choose the form of their masks by it; registries tell it from sdpa."""
    model = hf_accel.optimize(build("llama"), [AttentionConfig()])
    name = model.config._attn_implementation
    assert name == "sdpa"
    assert name in ("eager", "sdpa")
    assert "sdpa" == name  # noqa: SIM300
    assert not name != "sdpa"  # noqa: SIM202
    assert name != "eager"
    assert ALL_ATTENTION_FUNCTIONS[name] is not ALL_ATTENTION_FUNCTIONS["sdpa"]
    assert str(name) == "hfaccel_grouped"


def test_an_attention_chosen_later_outlives_restore() -> None:
    model = build("llama")
    hf_accel.optimize(model, [AttentionConfig()])
    model.set_attn_implementation("eager")
    hf_accel.restore(model)
    assert model.config._attn_implementation == "eager"


def test_a_model_made_from_the_config_of_an_optimised_one_is_stock_after_restore() -> None:
    model = build("llama")
    hf_accel.optimize(model, [AttentionConfig()])
    made = type(model)(model.config)
    hf_accel.restore(model)
    for name in (made.config._attn_implementation, model.config._attn_implementation):
        assert type(name) is str
        assert name == "sdpa"
