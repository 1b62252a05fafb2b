"""The demo model loads offline, has learned Python, generates repeatably; its training script makes such a folder."""

import importlib.util
import logging
import math
import re
import subprocess
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import typer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

from hf_accel.assets import demo_path

FOLDER = demo_path()
SCRIPT = Path(__file__).parent.parent / "examples" / "train_demo_model.py"
PROMPT = "def fibonacci(n):\n"
# Measured with the shipped weights: 1.356 in bf16 and in fp32; guessing blindly costs ln 1536 = 7.34.
UNSEEN_BOUND_NATS = 1.5
# Written for this test, so it is in no training set.
UNSEEN = '''class Ledger:
    """Keep a list of amounts and report their sum."""

    def __init__(self, name, amounts=None):
        self.name = name
        if amounts is None:
            amounts = []
        self._amounts = list(amounts)

    def add(self, amount):
        """Add an amount to the ledger."""
        if not isinstance(amount, int):
            raise TypeError("amount must be an integer, not %r" % type(amount))
        self._amounts.append(amount)

    def __len__(self):
        return len(self._amounts)

    def __repr__(self):
        return "%s(%r)" % (self.__class__.__name__, self.name)
'''


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(FOLDER, local_files_only=True)


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(FOLDER, local_files_only=True).eval()


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_demo_model", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, script)  # Its dataclass looks its own module up.
    spec.loader.exec_module(script)
    return script


def nats_per_token(model: Any, ids: torch.Tensor) -> float:
    with torch.inference_mode():
        return model(input_ids=ids, labels=ids).loss.item()


def greedy(model: Any, tokenizer: Any, new_tokens: int, prompt: str = PROMPT) -> list[int]:
    inputs = tokenizer(prompt, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=new_tokens)
    return output[0, inputs["input_ids"].shape[1] :].tolist()


def test_the_folder_fits_in_four_million_bytes_and_has_its_card() -> None:
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) <= 4_000_000
    assert (FOLDER / "README.md").stat().st_size > 0


def test_it_is_a_bf16_llama_with_grouped_heads_and_tied_embeddings(model: Any, tokenizer: Any) -> None:
    assert model.config.architectures == ["LlamaForCausalLM"]
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    assert model.config.num_attention_heads > model.config.num_key_value_heads > 1
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert model.config.vocab_size == len(tokenizer)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id != tokenizer.pad_token_id
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id
    assert model.generation_config.do_sample is False


@pytest.mark.parametrize("text", [UNSEEN, "\tnaïve = '∑ 🙂'\r\n\x00 ", PROMPT])
def test_any_text_survives_the_tokenizer(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_it_predicts_unseen_python_far_better_than_chance_and_better_than_shuffled(model: Any, tokenizer: Any) -> None:
    ids = tokenizer(UNSEEN, return_tensors="pt")["input_ids"]
    loss = nats_per_token(model, ids)
    shuffled = ids[:, torch.randperm(ids.shape[1], generator=torch.Generator().manual_seed(0))]
    assert loss < UNSEEN_BOUND_NATS
    assert loss < 0.5 * math.log(len(tokenizer))
    assert nats_per_token(model, shuffled) > loss + 2.0


def test_greedy_text_is_the_same_each_time_and_long_enough_to_measure(model: Any, tokenizer: Any) -> None:
    ids = greedy(model, tokenizer, 160)
    assert ids == greedy(model, tokenizer, 160)
    assert len(ids) == 160, "the end token came early"
    assert "\n    " in tokenizer.decode(ids)


@pytest.mark.parametrize("prompt", [PROMPT, "import os\n\nclass Reader:\n"])
def test_greedy_text_does_not_loop_in_its_first_lines(model: Any, tokenizer: Any, prompt: str) -> None:
    # Measured: 15 and 25 different tokens, 62 % and 85 % new runs of four. The model does loop later, as small ones do;
    # one that repeats a word or a short line from the start has under 20 % new runs.
    ids = greedy(model, tokenizer, 64, prompt)
    runs = [tuple(ids[start : start + 4]) for start in range(len(ids) - 3)]
    assert len(set(ids)) >= 12
    assert len(set(runs)) >= 0.45 * len(runs)


def test_loading_and_generating_warn_of_nothing(caplog: pytest.LogCaptureFixture) -> None:
    transformers_logging.enable_propagation()
    warning_once: Any = type(transformers_logging.get_logger()).warning_once
    warning_once.cache_clear()  # Else a warning of an earlier test is not seen.
    try:
        with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
            warnings.simplefilter("error")
            tokenizer: Any = AutoTokenizer.from_pretrained(FOLDER, local_files_only=True)
            model: Any = AutoModelForCausalLM.from_pretrained(FOLDER, local_files_only=True)
            greedy(model, tokenizer, 2)
            batch = tokenizer([PROMPT, "import os\n\nclass"], padding=True, return_tensors="pt")
            model.generate(**batch, max_new_tokens=2)
    finally:
        transformers_logging.disable_propagation()
    assert [record.getMessage() for record in caplog.records] == []


def test_the_training_script_makes_a_folder_that_loads(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.mkdir()
    for number in range(3):
        (text / f"ledger_{number}.py").write_text(UNSEEN.replace("amount", f"amount_{number}") * 4)
    out = tmp_path / "model"
    options = ["--out", out, "--text", text, "--steps", 2, "--held-out-tokens", 200]
    done = subprocess.run([sys.executable, SCRIPT, *map(str, options)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert re.search(r"held out: \d+\.\d+ nats per token over 199 tokens", done.stdout)
    assert [path.name for path in tmp_path.iterdir() if "checkpoint" in path.name] == []
    tokenizer = AutoTokenizer.from_pretrained(out, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(out, local_files_only=True)
    assert len(greedy(model, tokenizer, 3)) == 3
    shipped = {name: tensor.shape[1:] for name, tensor in load_file(FOLDER / "model.safetensors").items()}
    assert {name: tensor.shape[1:] for name, tensor in load_file(out / "model.safetensors").items()} == shipped


@pytest.mark.parametrize("window_tokens", [4, 5, 24, 256])
def test_stutters_score_only_the_text_that_truly_follows(script: ModuleType, window_tokens: int) -> None:
    generator = torch.Generator().manual_seed(0)
    windows = torch.arange(window_tokens).repeat(200, 1)  # Counting up: what follows any token is that token plus one.
    inputs, targets = script.with_stutters(windows, 1.0, generator)
    assert inputs.shape == targets.shape == (200, window_tokens - 1)
    scored = targets != script.IGNORED_TARGET
    assert torch.equal(targets[scored], inputs[scored] + 1)
    assert (inputs.diff() < 1).any(dim=1).all(), "a row without a repeated piece"
    plain, following = script.with_stutters(windows, 0.0, generator)
    assert torch.equal(plain, windows[:, :-1])
    assert torch.equal(following, windows[:, 1:])


def test_an_interrupted_run_continues_to_the_same_weights(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "BATCH_TOKENS", 512)
    tokenizer = script.train_tokenizer([UNSEEN])
    ids = script.encode(tokenizer, [UNSEEN] * 4)

    def run(checkpoint: Path, seed: int = 0) -> tuple[LlamaForCausalLM, int]:
        torch.manual_seed(seed)
        model = script.new_model(tokenizer)
        return model, script.train(model, ids, 1.0, 5, seed, checkpoint).step

    whole, _ = run(tmp_path / "whole.pt")
    with monkeypatch.context() as broken:
        losses = iter([script.mean_loss] * 3)
        broken.setattr(script, "SECONDS_BETWEEN_CHECKPOINTS", 0.0)
        broken.setattr(script, "mean_loss", lambda *given: next(losses)(*given))
        with pytest.raises(StopIteration):
            run(tmp_path / "broken.pt")
    continued, steps = run(tmp_path / "broken.pt")
    assert steps == 5
    assert next(losses, None) is None
    for (name, expected), (_, found) in zip(whole.named_parameters(), continued.named_parameters(), strict=True):
        assert torch.equal(expected, found), name
    with pytest.raises(typer.BadParameter, match="another seed"):
        run(tmp_path / "broken.pt", seed=1)
