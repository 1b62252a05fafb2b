"""The contract of every optimisation on every tiny model: nothing changes before, everything comes back after."""

from __future__ import annotations

import copy
import functools
import gc
import io
import json
import pickle
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from catalogue import CATALOGUE, LOSSLESS, exact, example, fits
from comparison import assert_equal_calls, optimised
from fingerprint import changes, fingerprint
from models import FEW, NAMES, build, on_models, padded, prompt, stock
from transformers import AttentionInterface, AttentionMaskInterface

import hf_accel
from hf_accel.core.calls.hosting import host_of
from hf_accel.core.config import Config
from hf_accel.core.drift import CACHE
from hf_accel.core.steps.patcher import Fidelity, Patcher
from hf_accel.core.steps.setting import Setting

CONFIGS = [type(config).__name__ for config in CATALOGUE]
EVERY = [*CONFIGS, "exact"]
PAIRS = list(combinations(CATALOGUE, 2))


def chosen(name: str, model) -> list[Config]:
    """Return the configs called `name`; skips where the patcher itself says that they do not fit the model."""
    if name == "exact":
        return exact(model)
    config = example(name)
    if not fits(config, model):
        pytest.skip(f"refused with a reason: {Patcher.for_config(config).obstacles(Setting.of(model))[0]}")
    return [config]


def is_lossy(name: str) -> bool:
    return name != "exact" and example(name) not in LOSSLESS


def logits(model, ids: torch.Tensor | None = None) -> torch.Tensor:
    """Return the logits of a prefill [2, T, V]: more rows than any path of ours serves, and a mask."""
    batch = padded([9, 20]) if ids is None else {"input_ids": ids}
    with torch.no_grad():
        return model(**batch).logits


def greedy(model, **inputs: torch.Tensor) -> torch.Tensor:
    arguments = inputs or {"input_ids": prompt(), "attention_mask": torch.ones_like(prompt())}
    return model.generate(**arguments, max_new_tokens=14, do_sample=False)


def test_every_registered_config_is_in_the_catalogue() -> None:
    ours = {config for config in Patcher.registry if config.__module__.startswith("hf_accel.")}
    for missing in ours - {type(config) for config in CATALOGUE}:
        pytest.fail(f"Add a line to CATALOGUE in tests/catalogue.py: {missing.__name__}(...)")
    assert ours == {type(config) for config in CATALOGUE}


@pytest.mark.parametrize("name", CONFIGS)
def test_config_survives_json(name: str) -> None:
    config = example(name)
    again = Config.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert type(again) is type(config)
    assert hash(again) == hash(config)
    assert type(config).from_dict(config.to_dict()) == config


@pytest.mark.parametrize("model_name", NAMES)
@pytest.mark.parametrize("name", CONFIGS)
def test_obstacles_change_nothing_and_are_sentences(name: str, model_name: str) -> None:
    model = build(model_name)
    before = fingerprint(model)
    found = Patcher.for_config(example(name)).obstacles(Setting.of(model))
    assert not changes(before, fingerprint(model))
    for sentence in found:
        assert len(sentence.split()) > 3, f"no sentence for a user: {sentence!r}"
    assert found == Patcher.for_config(example(name)).obstacles(Setting.of(model))


# "exact" is all lossless steps but those that claim the place of another
@pytest.mark.parametrize("name,model_name", on_models(EVERY, ["exact", "WeightOnlyConfig", "SpeculativeConfig"]))
def test_a_life_from_optimize_to_restore(name: str, model_name: str, tmp_path: Path) -> None:
    """One model is optimised, used, copied, pickled, saved and restored, beside one that shares its config."""
    model = build(model_name)
    configs = chosen(name, model)
    text, files = greedy(model), saved(model, tmp_path / "stock")
    other = sharing_config_and_weights(model)
    before, bits, others = fingerprint(model), logits(model), (logits(other), fingerprint(other))
    interfaces = dict(AttentionInterface._global_mapping), dict(AttentionMaskInterface._global_mapping)

    assert hf_accel.optimize(model, configs) is model
    optimised_text = greedy(model)
    if all(Patcher.for_config(config).fidelity is Fidelity.EXACT for config in configs):
        assert torch.equal(optimised_text, text), "the optimised text differs in fp32"
    check_padded_rows(model, rows_of(model) if is_lossy(name) else rows_of_stock(model_name))

    assert not changes(others[1], fingerprint(other)), "a model that shares its config is another one"
    assert torch.equal(logits(other), others[0])
    assert interfaces == (AttentionInterface._global_mapping, AttentionMaskInterface._global_mapping)
    with pytest.raises(hf_accel.ConflictError):
        hf_accel.report(other)

    if is_lossy(name):  # a copy has the weights the model has now
        check_deep_copy(model, optimised_text, logits(model), None)
    else:
        check_deep_copy(model, text, bits, stock(model_name))
        check_pickles(model, bits, stock(model_name))
        found = saved(model, tmp_path / "optimised")
        assert {name for name in files.keys() | found.keys() if files.get(name) != found.get(name)} == set()
    if name == "exact":  # once for each model: walking through all objects takes longer than the rest of a life
        gc.collect()
    assert torch.equal(greedy(model), optimised_text), "what was done to copies disturbed the original"

    hf_accel.restore(model)
    assert not changes(before, fingerprint(model))
    assert torch.equal(logits(model), bits)
    assert torch.equal(greedy(model), text)
    assert host_of(model) is None


def sharing_config_and_weights(model: Any) -> Any:
    """Return a second model of the same config object and generation settings, with equal weights of its own."""
    other = type(model)(model.config).eval()
    other.generation_config = model.generation_config
    with torch.no_grad():
        for mine, theirs in zip(other.parameters(), model.parameters(), strict=True):
            mine.copy_(theirs)
    for mine, theirs in zip(other.buffers(), model.buffers(), strict=True):
        mine.copy_(theirs)
    assert other.config is model.config
    return other


LENGTHS = [4, 11, 7]


def rows_of(model: Any) -> list[torch.Tensor]:
    """Return what a model continues each row of a padded batch with when the row is alone."""
    ids = padded(LENGTHS)["input_ids"]
    alone = [ids[row : row + 1, -length:] for row, length in enumerate(LENGTHS)]
    return [greedy(model, input_ids=row, attention_mask=torch.ones_like(row))[0, row.shape[1] :] for row in alone]


@functools.cache
def rows_of_stock(model_name: str) -> list[torch.Tensor]:
    rows = rows_of(stock(model_name))
    check_padded_rows(stock(model_name), rows)  # else change the lengths
    return rows


def check_padded_rows(model: Any, rows: list[torch.Tensor]) -> None:
    """Left-padded rows continue as rows alone do."""
    assert torch.equal(greedy(model, **padded(LENGTHS))[:, max(LENGTHS) :], torch.stack(rows))


def check_copy(copied: Any, bits: torch.Tensor, stock: Any) -> None:
    assert [type(module) for module in copied.modules()] == [type(module) for module in stock.modules()]
    assert copied.config._attn_implementation == stock.config._attn_implementation
    assert torch.equal(logits(copied), bits)


def check_deep_copy(model: Any, text: torch.Tensor, bits: torch.Tensor, stock: Any) -> None:
    """A deep copy writes `text`, of the classes of `stock` if there is one; wiping it does not reach the original."""
    twin = copy.deepcopy(model)
    if stock is not None:
        check_copy(twin, bits, stock)
    assert type(twin).__module__.startswith("transformers.")
    assert torch.equal(greedy(twin), text)
    assert torch.equal(logits(twin), bits)
    with torch.no_grad():
        for tensor in (*twin.parameters(), *twin.buffers()):
            tensor.zero_()


def check_pickles(model: Any, bits: torch.Tensor, stock: Any) -> None:
    """Pickles and torch's files hold stock models."""
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for again in (pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)):
        check_copy(again, bits, stock)


def saved(model: Any, folder: Path) -> dict[str, bytes]:
    """Return the files that `save_pretrained` writes."""
    model.save_pretrained(folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("model_name", FEW)
@pytest.mark.parametrize("name", EVERY)
def test_an_error_in_mid_patch_leaves_nothing(name: str, model_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(model_name)
    configs = chosen(name, model)
    greedy(model)
    before, bits = fingerprint(model), logits(model)
    last = type(Patcher.for_config(configs[-1]))
    patch = last.patch

    def breaks(self, setting, host):
        patch(self, setting, host)
        raise RuntimeError("planted")

    monkeypatch.setattr(last, "patch", breaks)
    with pytest.raises(hf_accel.UnsupportedModelError, match="planted") as raised:
        hf_accel.optimize(model, configs)
    assert isinstance(raised.value.__cause__, RuntimeError)
    assert not changes(before, fingerprint(model))
    assert torch.equal(logits(model), bits)
    monkeypatch.undo()
    hf_accel.optimize(model, configs)
    hf_accel.restore(model)
    assert not changes(before, fingerprint(model))


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: "+".join(type(c).__name__ for c in pair))
@pytest.mark.parametrize("model_name", FEW)
def test_pairs_compose_or_conflict(pair: tuple[Config, Config], model_name: str) -> None:
    model = build(model_name)
    text = greedy(model)
    before, bits = fingerprint(model), logits(model)
    places = [Patcher.for_config(config).occupies for config in pair]
    if places[0] == places[1]:
        with pytest.raises(hf_accel.ConflictError, match=r"Keep one"):
            hf_accel.optimize(model, pair)
    elif not all(fits(config, model) for config in pair):
        with pytest.raises(hf_accel.UnsupportedModelError):
            hf_accel.optimize(model, pair)
    else:
        lossy = [config for config in pair if config not in LOSSLESS]
        if lossy:
            with hf_accel.optimized(model, lossy):
                text = greedy(model)
        hf_accel.optimize(model, pair[::-1])
        assert torch.equal(greedy(model), text)
        hf_accel.restore(model)
    assert not changes(before, fingerprint(model))
    assert torch.equal(logits(model), bits)


@pytest.mark.parametrize("model_name", NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_of_a_step_in_half_precision(model_name: str, dtype: torch.dtype) -> None:
    """A decoding step after a prefill differs from stock's by rounding only, in padded batches too."""
    stock = build(model_name, dtype)
    patched = optimised(stock)
    reference = build(model_name)
    batch = padded([5, 9])
    errors = {}
    for name, model in {"stock": stock, "patched": patched}.items():
        steps = []
        for twin in (model, reference):
            out = twin.generate(
                **batch, max_new_tokens=1, min_new_tokens=1, output_logits=True, return_dict_in_generate=True
            )
            with torch.no_grad():
                more = torch.cat([batch["attention_mask"], torch.ones(2, 1, dtype=torch.long)], dim=1)
                positions = (more.cumsum(-1) - 1)[:, -1:]
                ids = batch["input_ids"][:, -1:]
                step = twin(ids, attention_mask=more, position_ids=positions, **{CACHE: out[CACHE]})
            steps.append(step.logits[:, -1].double())
        errors[name] = float((steps[0] - steps[1]).norm() / steps[1].norm())
    assert errors["patched"] <= 1.5 * errors["stock"] + 2e-3, errors


@pytest.mark.gpu
@pytest.mark.parametrize("model_name", NAMES)
def test_greedy_and_padded_batches_on_a_gpu(model_name: str) -> None:
    stock = build(model_name).cuda()
    patched = optimised(stock)
    batch = {name: tensor.cuda() for name, tensor in padded([4, 11, 7]).items()}
    assert_equal_calls(stock, patched, lambda model: greedy(model, **batch))
    assert_equal_calls(stock, patched, lambda model: greedy(model, input_ids=batch["input_ids"][1:2]))
    hf_accel.restore(patched)
    assert torch.equal(logits(patched.cpu()), logits(stock.cpu()))
