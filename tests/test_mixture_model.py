"""The trained mixture of the tests loads offline, knows Python, routes unevenly; its script makes such a folder."""

import importlib.util
import math
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_demo_model import UNSEEN, nats_per_token
from trained import MIXTURE, mixture_tokenizer, trained_mixture

from hf_accel.assets import demo_path, retrieval_path

SCRIPT = Path(__file__).parent.parent / "examples" / "train_mixture_model.py"
# Measured: 2.12 in fp32; guessing blindly costs ln 1536 = 7.34.
UNSEEN_BOUND_NATS = 2.3
EXPERTS = 16


@pytest.fixture(scope="module")
def model() -> Any:
    return trained_mixture()


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return mixture_tokenizer()(UNSEEN, return_tensors="pt")["input_ids"]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    spec = importlib.util.spec_from_file_location("train_mixture_model", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


def test_the_weights_of_all_trained_models_take_five_million_bytes_at_most_and_have_cards() -> None:
    folders = (demo_path(), retrieval_path(), MIXTURE)
    assert sum((folder / "model.safetensors").stat().st_size for folder in folders) <= 5_000_000
    assert all((folder / "README.md").stat().st_size > 0 for folder in folders)


def test_it_is_a_bf16_mixture_with_the_vocabulary_of_the_demo_model() -> None:
    model = trained_mixture(torch.bfloat16)
    assert model.config.architectures == ["Qwen3MoeForCausalLM"]
    assert {tensor.dtype for tensor in load_file(MIXTURE / "model.safetensors").values()} == {torch.bfloat16}
    assert (model.config.num_experts, model.config.num_experts_per_tok) == (EXPERTS, 4)
    assert model.config.vocab_size == len(mixture_tokenizer())
    assert model.generation_config.eos_token_id == mixture_tokenizer().eos_token_id


def test_it_predicts_unseen_python_far_better_than_chance_and_than_shuffled(model: Any, ids: torch.Tensor) -> None:
    loss = nats_per_token(model, ids)
    shuffled = ids[:, torch.randperm(ids.shape[1], generator=torch.Generator().manual_seed(0))]
    assert loss < UNSEEN_BOUND_NATS < 0.5 * math.log(model.config.vocab_size)
    assert nats_per_token(model, shuffled) > loss + 1.0


def test_routing_is_uneven_and_no_expert_of_the_model_is_dead(
    model: Any, ids: torch.Tensor, script: ModuleType
) -> None:
    counts = script.routing(model, ids[0], 10_000)
    assert counts.sum(1).tolist() == [4 * ids.shape[1]] * 3
    # measured: 5, 7 and 6, and 10, 13 and 13; even routing needs 8 and 15 of them
    assert all(script.needed(layer, 0.5) <= 7 for layer in counts)
    assert all(script.needed(layer, 0.9) <= 14 for layer in counts)
    assert script.needed(counts[0], 0.9) <= 11
    assert all((layer > 0).sum() >= EXPERTS - 2 for layer in counts)


def test_experts_that_carry_a_share_are_counted(script: ModuleType) -> None:
    counts = torch.tensor([50, 30, 15, 5])
    assert [script.needed(counts, share) for share in (0.5, 0.51, 0.8, 0.9, 0.95, 1.0)] == [1, 2, 2, 3, 3, 4]


def test_embeddings_begin_with_what_tells_words_apart(script: ModuleType) -> None:
    tokenizer = mixture_tokenizer()
    model = script.new_model(tokenizer)
    known = torch.randn(len(tokenizer), 192) * torch.linspace(2, 0.01, 192) + 5.0
    script.begin_with_words(model, known)
    begun = model.get_input_embeddings().weight
    found, expected = torch.cdist(begun[:200], begun[:200]), torch.cdist(known[:200], known[:200])
    assert torch.corrcoef(torch.stack([found.flatten(), expected.flatten()]))[0, 1] > 0.8
    assert model.lm_head.weight is begun


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
    assert len(re.findall(r"layer \d: \d+ of 16 experts carry 90% of the routing", done.stdout)) == 3
    shipped = {name: tensor.shape for name, tensor in load_file(MIXTURE / "model.safetensors").items()}
    assert {name: tensor.shape for name, tensor in load_file(out / "model.safetensors").items()} == shipped
