"""Native decoder layers of all kinds of parts against a textbook twin, and refusals of what is no layer."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from block_cases import FIELDS, Build, Case, all_cases
from block_twin import block_shape, difference, inputs, random_block, twin
from torch import Tensor

from hf_accel.kernels import native
from hf_accel.kernels.native import Heads, NativeBlock, Norm, Projection
from hf_accel.ops import cached

pytestmark = pytest.mark.skipif(not native.is_available(), reason=native.status().reason)
# fp32 differs by the order of sums alone; in 16 bits a flipped rounding moves a value by one ulp of an intermediate
TOLERANCES = {torch.float32: 3e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
# activations are rounded, to 16 bits beside weights of 8 and to 8 beside weights of 4; then roundings flip by the many
ROUNDED = {"8 bits": 2e-3, "4 bits": 5e-2, "mixed": 5e-2}
PARTS = 4  # tests that share the cases
CASES = list(all_cases()) if native.is_available() else []


@pytest.fixture
def threads() -> Any:
    before, isa = torch.get_num_threads(), native.status().isa
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)
    native.set_isa(isa)


def tensors(found: Any) -> list[Tensor]:
    return list(found) if isinstance(found, tuple) else [found]


def check(case: Case, seed: int) -> None:
    native.set_isa(case["isa"])
    build = Build(case, seed)
    block = build.block()
    mine = build.call(block)
    theirs, before = copy.deepcopy(mine), copy.deepcopy(mine)
    found, expected = block(**mine), twin(block, **theirs)
    limit, rounded = TOLERANCES[case["dtype"]], ROUNDED.get(case["weights"])
    limit = limit if rounded is None else max(3 * limit, rounded)
    assert found is not None
    for ours, own in zip(tensors(found), tensors(expected), strict=True):
        assert difference(ours, own) < limit, f"{difference(ours, own)} of {limit}"
    for name in ("keys", "values"):
        assert difference(mine[name], theirs[name]) < limit
        untouched = (theirs[name] == before[name]).all(-1)  # nothing but the new positions is written
        assert torch.equal(mine[name][untouched], before[name][untouched])


@pytest.mark.parametrize("part", range(PARTS))
@torch.no_grad()
def test_layers_are_what_their_descriptions_say(threads: Any, part: int) -> None:
    assert {(name, case[name]) for case in CASES for name in FIELDS} == {(n, v) for n, vs in FIELDS.items() for v in vs}
    for seed, case in enumerate(CASES[part::PARTS]):
        check(case, seed)


@torch.no_grad()
def test_tokens_together_equal_tokens_one_by_one(threads: Any) -> None:
    """To the last bit, for any number of threads: what makes verification of drafts lossless."""
    for seed, case in enumerate([case for case in CASES if "prompt" in case["call"]][::2]):
        native.set_isa(case["isa"])
        build = Build(case | {"call": "rows apart"}, seed)
        block = build.block()
        arguments = build.call(block)
        single = copy.deepcopy(arguments)
        torch.set_num_threads(3)
        together = tensors(block(**arguments))
        torch.set_num_threads(1)
        for b, past in enumerate(arguments["row_past"].tolist()):
            for t in range(2):
                part = {name: single[name][b : b + 1] for name in ("keys", "values")}
                for name in ("hidden", "cos", "sin"):
                    part[name] = None if single[name] is None else single[name][b : b + 1, t : t + 1].contiguous()
                for alone, all_of_them in zip(tensors(block(**part, past=past + t)), together, strict=True):
                    assert torch.equal(alone[0, 0], all_of_them[b, t])
        assert torch.equal(arguments["keys"], single["keys"])


@torch.no_grad()
def test_rows_of_codes_are_read_as_the_values_they_stand_for(threads: Any) -> None:
    for seed, case in enumerate([case for case in CASES if case["call"] in ("tokens of two", "prompt")]):
        native.set_isa(case["isa"])
        build = Build(case | {"dtype": torch.float32, "weights": "dense"}, seed)
        block = build.block()
        plain = build.call(block)
        coded = copy.deepcopy(plain)
        for name in ("keys", "values"):
            coded[name] = cached.encode(plain[name], 8, is_key=name == "keys")
            plain[name] = cached.decode(coded[name], 8, build.head_dim, torch.float32, is_key=name == "keys")
        for ours, own in zip(tensors(block(**coded, bits=8)), tensors(block(**plain)), strict=True):
            assert difference(ours, own) < 3e-2, case  # new keys and values are rounded to codes, too


NORM = Norm(kind="rms", eps=1e-6)
MLP: dict[str, Any] = {"gate": None, "up": None, "down": None}
REFUSED: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"activation": "mish"}, {}, "activation 'mish' is not one of"),
    ({"rotary": "thirds"}, {}, "rotary 'thirds' is not one of"),
    ({"norm_extent": "all"}, {}, "norm_extent 'all' is not one of"),
    ({"part": "whole"}, {}, "part 'whole' is not one of"),
    ({"rotary_size": 7}, {}, "rotary_size is 7"),
    ({"k": None}, {}, "k and v, or neither"),
    ({"k": None, "v": None}, {"k_norm": NORM}, "no k_norm"),
    ({"part": "half"}, {}, "has no gate, up and down"),
    ({"part": "half"}, MLP | {"mlp_out_norm": NORM}, "no mlp_out_norm"),
    ({"part": "half", "is_parallel": True}, MLP, "a parallel layer has no part"),
    ({"part": "attention"}, MLP, "attention alone has no residual, so no mlp_norm"),
    ({"part": "attention", "out_scale": 0.5}, MLP | {"mlp_norm": None}, "so no scale of what joins it"),
    ({}, {"down": None}, "has up and down"),
    ({}, {"projections": ()}, "1 to 4 projections, got 0"),
    ({"q": Heads(1, 96, 32)}, {"projections": (Projection(torch.randn(192, 72)),)}, "beyond a projected row of 192"),
    ({"v": Heads(-1, 32, 32)}, {}, "beyond a projected row"),
    ({"gate": Heads(300, 96, 32)}, {}, "gate lies at"),
    ({"norm_extent": "row", "q": Heads(0, 32, 64)}, {"q_norm": NORM}, "do not lie side by side"),
    ({"norm_extent": "row", "norms_after_rotary": True}, {"q_norm": NORM}, "come before the rotary"),
    ({"norm_extent": "row", "v": Heads(192, 32, 32)}, {"k_norm": NORM}, "values are where keys are"),
    ({"softcap": 2.0}, {"slopes": torch.ones(6)}, "slopes go with no softcap"),
    ({}, {"slopes": torch.ones(6), "sinks": torch.ones(6)}, "slopes go with no softcap and no sinks"),
    ({}, {"slopes": torch.ones(6).half()}, "slopes has dtype"),
    ({}, {"sinks": torch.ones(5)}, "sinks has shape"),
    ({}, {"input_norm": replace(NORM, kind="batch")}, "the kind of input_norm, 'batch', is not one of"),
    ({}, {"input_norm": None, "q_norm": replace(NORM, kind="")}, "the kind of q_norm, '', is not one of"),
    ({}, {"input_norm": replace(NORM, bias=torch.ones(72))}, "input_norm has a bias"),
    ({"norm_extent": "heads"}, {"q_norm": replace(NORM, weight=torch.ones(32))}, "q_norm.weight has shape"),
    ({"norm_extent": "heads"}, {"q_norm": replace(NORM, weight=torch.ones(6, 64)[:, :32])}, "must be contiguous"),
]


@pytest.mark.parametrize("of_shape, of_weights, message", REFUSED, ids=[message for *_, message in REFUSED])
def test_what_is_no_layer_is_named(of_shape: dict[str, Any], of_weights: dict[str, Any], message: str) -> None:
    block = random_block(block_shape(), torch.float32)
    with pytest.raises(ValueError, match=message):
        NativeBlock(replace(block.shape, **of_shape), replace(block.weights, **of_weights))


@torch.no_grad()
def test_calls_whose_angles_do_not_fit_are_refused() -> None:
    block = random_block(block_shape(rotary_size=16), torch.float32)
    arguments = inputs(block.shape, torch.float32, 1, 1, 3)
    for size in (14, 0):
        with pytest.raises(ValueError, match=f"{size} angles"):
            block(**{**arguments, "cos": arguments["cos"][..., :size], "sin": arguments["sin"][..., :size]})
    with pytest.raises(ValueError, match="0 angles"):
        block(**{**arguments, "cos": None, "sin": None})
    assert block(**arguments) is not None
