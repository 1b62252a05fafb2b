"""The step that is captured: nothing of it depends on data or the host, and its buffers stay where they are."""

from __future__ import annotations

import gc
import random
from typing import Any

import pytest
import torch
from capturing import captures_here
from models import build, prompt
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

import hf_accel
from hf_accel import AttentionConfig, CompilationConfig, DecodingConfig
from hf_accel.compilation import runner, slots, trace
from hf_accel.compilation.caches import starts_of, use_slot
from hf_accel.compilation.slots import Slot, Slots, capacity_for
from hf_accel.compilation.step import StaticStep
from hf_accel.core.calls.call import Request
from hf_accel.core.calls.doors import Door
from hf_accel.core.calls.hosting import host_of
from hf_accel.core.drift import CACHE

MODELS = ["llama", "qwen3", "gemma3", "gpt2", "gpt_neox", "deepseek_v3", "mixtral"]
CPU = torch.device("cpu")
# what asks the device for a value, or has as many results as the data say
ASKING = {"_local_scalar_dense", "item", "nonzero", "is_nonzero", "masked_select", "unique", "equal"}


class NothingAsked(TorchDispatchMode):
    """Fails where an operation would have to wait for a device, or leaves it."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in ASKING, f"{name} waits for the device"
        self.count += 1
        return func(*args, **(kwargs or {}))


def begun(name: str, rows: int, tokens: int, bits: int | None = None) -> StaticStep:
    """Return a step of a model whose slot holds a prompt."""
    model = build(name)
    if "grouped_mm" in model.get_experts_implementation().values():
        model.set_experts_implementation("batched_mm")  # as transformers itself decodes on CUDA devices
    hf_accel.optimize(model, AttentionConfig())
    slot = Slot(rows, 64, bits, CPU)
    cache: Any = DynamicCache(config=model.config.get_text_config(decoder=True))
    use_slot(cache, slot)
    with torch.no_grad():
        model(prompt(rows), use_cache=True, **{CACHE: cache})
    slot.set_lengths([11] * rows)
    step = StaticStep(model, slot, tokens)
    step.ids.copy_(prompt(rows, tokens, seed=5))
    step.positions.copy_(11 + step.ahead)
    return step


@pytest.mark.parametrize("tokens", [1, 4])
@pytest.mark.parametrize("name", MODELS)
def test_a_step_runs_without_data(name: str, tokens: int) -> None:
    """On fake tensors, and with real ones without an operation that waits for the device."""
    step = begun(name, 2, tokens)
    trace.run_on_fakes(step.model, step.slot, tokens)
    with torch.no_grad(), NothingAsked() as mode:
        step.run_and_advance()
    assert mode.count > 30
    assert step.slot.fill.lengths.tolist() == [11 + tokens] * 2


def test_a_step_is_one_graph() -> None:
    """torch.export takes it whole: no break, no guard on data. Its inputs are the buffers and the tokens."""
    from torch.fx.experimental.proxy_tensor import make_fx

    step = begun("llama", 1, 1)
    with torch.no_grad():
        graph = make_fx(lambda ids: step.run().logits, tracing_mode="fake", _allow_non_fake_inputs=True)(step.ids)
        expected = step.run().logits
        assert torch.equal(graph(step.ids), expected)
    names = {node.target.overloadpacket.__name__ for node in graph.graph.nodes if node.op == "call_function"
             and hasattr(node.target, "overloadpacket")}  # fmt: skip
    assert not names & ASKING
    assert "index_copy_" in names


def asks_for_a_value(model: Any) -> None:
    forward = model.model.norm.forward
    model.model.norm.forward = lambda x: forward(x) if x.sum() < 1e30 else x


def has_a_size_of_data(model: Any) -> None:
    forward = model.model.norm.forward
    model.model.norm.forward = lambda x: forward(x) + 0 * x[x > 0].sum()


def asks_for_the_length(model: Any) -> None:
    forward = model.model.layers[1].forward

    def run(*args: Any, **kwargs: Any) -> Any:
        kwargs[CACHE].get_seq_length()
        return forward(*args, **kwargs)

    model.model.layers[1].forward = run


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (asks_for_a_value, "waits for the device"),
        (has_a_size_of_data, "depends on data"),
        (asks_for_the_length, "asks the cache for its length"),
    ],
    ids=["value", "size", "length"],
)
def test_what_cannot_be_captured_is_refused_with_a_reason(change: Any, reason: str) -> None:
    model = build("llama")
    change(model)
    with captures_here(), pytest.raises(hf_accel.UnsupportedModelError, match=reason):
        hf_accel.optimize(model, CompilationConfig())
    assert host_of(model) is None


def wrong_from_the_third_on(model: Any) -> None:
    """A model that counts the calls of its norm does not do the same in every step."""
    forward, calls = model.model.norm.forward, []

    def run(x: Any) -> Any:
        calls.append(1)
        return forward(x) * (1 + 0.3 * len(calls))

    model.model.norm.forward = run


def test_a_step_that_gives_other_logits_is_refused() -> None:
    model = build("llama")
    wrong_from_the_third_on(model)
    with captures_here(), pytest.raises(hf_accel.UnsupportedModelError, match="other logits"):
        hf_accel.optimize(model, CompilationConfig())


def addresses(slot: Slot, recorded: Any) -> list[int]:
    step = recorded.step
    tensors = [*slot.buffers(), slot.fill.lengths, slot.fill.starts, step.ids, step.positions, step.ahead]
    return [tensor.data_ptr() for tensor in tensors]


def test_buffers_keep_their_addresses_over_a_thousand_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "PAYS_BACK", 0)
    model = build("qwen2")
    with captures_here() as kind:
        hf_accel.optimize(model, [DecodingConfig(), CompilationConfig()])
    host: Any = host_of(model)
    before = kind.captured
    found = set()
    for call in range(20):
        model.generate(prompt(tokens=4 + call), max_new_tokens=52, do_sample=False)
        (slot,) = host.doors[Door.NEW_CACHE].slots._slots.values()
        (recorded,) = slot.graphs.values()
        found.add(tuple(addresses(slot, recorded)))
    assert hf_accel.report(model).to_dict()["compilation"]["replays"] == 20 * 51
    assert len(found) == 1
    assert kind.captured - before == 1


def test_fifty_prompt_lengths_are_few_captures() -> None:
    lengths = random.Random(0).sample(range(1, 20_000), 50)
    assert len({capacity_for(length + 128) for length in lengths}) <= 6
    for tokens in (1, 240, 241, 4080, 4081, 8176, 8177, 100_000):
        assert tokens + 16 <= capacity_for(tokens) <= max(256, 4 * (tokens + 16))


def test_a_slot_has_one_owner() -> None:
    found = Slots(CPU)
    requests = [Request() for _ in range(3)]
    caches: list[Any] = [DynamicCache() for _ in range(3)]
    first = found.take(caches[0], requests[0], 2, 100, None, None)
    assert first is not None
    assert found.take(caches[1], requests[1], 1, 100, None, None) is None, "captures share their memory"
    del requests[0]
    gc.collect()
    assert found.take(caches[1], requests[0], 2, 120, None, torch.tensor([0, 3])) is first
    assert first.fill.starts.tolist() == [0, 3]
    caches.pop(1)
    gc.collect()
    assert found.take(caches[1], requests[1], 2, 500, 8, None) is not first


def test_slots_are_not_kept_without_end() -> None:
    found = Slots(CPU)
    for rows in range(1, 20):
        cache, request = DynamicCache(), Request()
        slot = found.take(cache, request, rows, 10, None, None)
        assert slot is not None
        slot.layer(0, None, torch.zeros(rows, 2, 0, 4), torch.zeros(rows, 2, 0, 4))
    assert len(found._slots) == slots.MOST
    assert found.bytes == sum(2 * rows * 2 * 256 * 4 * 4 for rows in range(12, 20))
    found.free_others(slot)
    assert found.bytes == slot.bytes


@pytest.mark.parametrize(
    ("mask", "rows", "starts"),
    [
        (None, 2, None),
        ([[1, 1, 1]], 1, None),
        ([[0, 1, 1], [1, 1, 1]], 2, [1, 0]),
        ([[0, 1, 1], [0, 0, 1]], 4, [1, 1, 2, 2]),
        ([[1, 1, 0]], 1, "hides more"),
        ([[0, 0, 0], [1, 1, 1]], 2, [3, 0]),
        ([[1, 0, 1]], 1, "hides more"),
        ([[[[1]]]], 1, "not one of padding"),
    ],
)
def test_masks_of_padding_are_where_rows_start(mask: Any, rows: int, starts: Any) -> None:
    found, reason = starts_of(None if mask is None else torch.tensor(mask), rows)
    if isinstance(starts, str):
        assert starts in str(reason)
    else:
        assert (found if found is None else found.tolist(), reason) == (starts, None)
