"""Optimised models are saved and loaded as stock models, in the vanilla layout, without hf_accel."""

from __future__ import annotations

import io
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from catalogue import LOSSLESS, exact, example, fits
from comparison import optimised
from models import NAMES, build, padded, prompt
from safetensors import safe_open
from transformers import AutoModelForCausalLM

import hf_accel

EVERY = [*[type(config).__name__ for config in LOSSLESS], "exact"]


def patched_by(name: str, stock: Any) -> Any:
    configs = exact(stock) if name == "exact" else [example(name)]
    if not all(fits(config, stock) for config in configs):
        pytest.skip(f"{name} does not fit this model")
    return optimised(stock, configs)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**padded([9, 20])).logits


def torch_saved(model: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("model_name", NAMES)
@pytest.mark.parametrize("name", EVERY)
def test_pickles_are_stock_models(name: str, model_name: str) -> None:
    stock = build(model_name)
    model = patched_by(name, stock)
    for again in (pickle.loads(pickle.dumps(model)), torch_saved(model)):
        assert [type(module) for module in again.modules()] == [type(module) for module in stock.modules()]
        assert again.config._attn_implementation == stock.config._attn_implementation
        assert torch.equal(logits(again), logits(stock))


@pytest.mark.parametrize("model_name", NAMES)
@pytest.mark.parametrize("name", EVERY)
def test_save_pretrained_writes_the_vanilla_layout(name: str, model_name: str, tmp_path: Path) -> None:
    stock = build(model_name)
    model = patched_by(name, stock)
    stock.save_pretrained(tmp_path / "stock")
    model.save_pretrained(tmp_path / "patched")
    written = []
    for folder in ("stock", "patched"):
        with safe_open(tmp_path / folder / "model.safetensors", "pt") as file:
            written.append({key: file.get_tensor(key) for key in sorted(file.keys())})
        written.append(json.loads((tmp_path / folder / "config.json").read_text()))
    assert written[0].keys() == written[2].keys()
    assert all(torch.equal(written[0][key], written[2][key]) for key in written[0])
    assert written[1] == written[3]
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "patched").eval()
    assert torch.equal(logits(again), logits(stock))
    sizes = [(tmp_path / folder / "model.safetensors").stat().st_size for folder in ("stock", "patched")]
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("name", EVERY)
def test_state_dicts_are_vanilla_and_go_both_ways(name: str) -> None:
    stock = build("qwen2")
    model = patched_by(name, stock)
    assert list(model.state_dict()) == list(stock.state_dict())
    other = build("qwen2")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other), logits(stock))
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    plain = io.BytesIO()
    torch.save(stock.state_dict(), plain)
    assert len(buffer.getvalue()) < 1.1 * len(plain.getvalue())


def test_a_saved_model_loads_where_hf_accel_is_not_installed(tmp_path: Path) -> None:
    stock = build("llama")
    torch.save(optimised(stock), tmp_path / "model.pt")
    torch.save(stock.generate(prompt(), max_new_tokens=8, do_sample=False), tmp_path / "text.pt")
    script = (
        "import sys; sys.modules['hf_accel'] = None\n"
        "import torch\n"
        f"model = torch.load({str(tmp_path / 'model.pt')!r}, weights_only=False)\n"
        f"text = torch.load({str(tmp_path / 'text.pt')!r})\n"
        "found = model.generate(text[:, :11], max_new_tokens=8, do_sample=False)\n"
        "sys.exit(0 if torch.equal(found, text) else 'another text')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_loaded_copy_can_be_optimised_again() -> None:
    again = torch_saved(optimised(build("llama")))
    with pytest.raises(hf_accel.ConflictError):
        hf_accel.restore(again)
    hf_accel.optimize(again, exact(again))
    hf_accel.restore(again)
    assert torch.equal(logits(again), logits(build("llama")))
