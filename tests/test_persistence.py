"""Optimised models are saved and loaded as stock models, in the vanilla layout, without hf_accel."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from catalogue import LOSSLESS, exact, example, fits
from comparison import optimised
from models import build, padded, prompt
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


def test_saved_models_load_as_stock(tmp_path: Path) -> None:
    """That the files are stock's, byte for byte, is part of every model's life in `test_contract.py`."""
    stock = build("llama")
    optimised(stock).save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(again), logits(stock))


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
