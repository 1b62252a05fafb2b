"""Whether a model still reads what it was calibrated on: a textbook, trained weights, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from fingerprint import changes, fingerprint
from models import build, prompt
from test_calibrating_resume import Killed, killing
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_accel
from hf_accel import ConfigError, ConflictError, GPTQConfig, UnsupportedModelError, calibration_drift
from hf_accel.assets import demo_path
from hf_accel.quantization.calibrating.powers import distance, distances_within, ends_of

CONFIG = GPTQConfig(bits=4, group_size=32, head=None)
PROSE = """The river had risen in the night, and by the morning the lower meadow was a lake on which nothing moved. She
walked along the dike as far as the old mill, where two men were already at work with sandbags, and asked them whether
anyone had seen the dog. Nobody had. It was the third time since the autumn that it had run away, and every time it came
back from another direction, hungry and content, as if it had been somewhere that could not be told. """


def code(start: int, end: int) -> str:
    """Return a part of Python source that is on every machine."""
    folder = Path(json.__file__).parent
    text = "".join((folder / name).read_text() for name in ("decoder.py", "encoder.py", "scanner.py", "__init__.py"))
    return text[start:end]


def words() -> Any:
    return AutoTokenizer.from_pretrained(demo_path())


@pytest.fixture(name="calibrated", scope="module")
def _calibrated() -> Any:
    model = AutoModelForCausalLM.from_pretrained(demo_path(), dtype=torch.float32).eval()
    return hf_accel.optimize(model, [CONFIG], calibration=code(0, 16000), tokenizer=words())


def test_other_text_is_told_from_text_of_the_kind(calibrated: Any) -> None:
    alike = calibration_drift(calibrated, code(16000, 30000), words())
    other = calibration_drift(calibrated, PROSE * 8, words())
    assert not alike.is_other, str(alike)
    assert alike.ratio < 1.7
    assert other.is_other, str(other)
    assert other.ratio > 2 * alike.ratio
    assert "text of the same kind" in str(alike)
    assert "text of another kind: calibrate on text like this" in str(other)
    assert json.loads(json.dumps(other.to_dict())) == other.to_dict()


def test_distances_are_those_of_a_textbook() -> None:
    """The divergence of normal distributions by integrals over a grid, channel by channel."""
    one, two = torch.tensor([1.0, 4.0, 0.25]), torch.tensor([2.0, 3.0, 0.25])
    x = torch.linspace(-40, 40, 400_001, dtype=torch.float64)

    def density(variance: float) -> Tensor:
        return (-x.square() / (2 * variance)).exp() / math.sqrt(2 * math.pi * variance)

    expected = 0.0
    for variance, other in zip(one.tolist(), two.tolist(), strict=True):
        p, q = density(variance).clamp(min=1e-300), density(other).clamp(min=1e-300)
        expected += float(torch.trapezoid((p - q) * (p / q).log(), x)) / 2
    assert distance(one, two) == pytest.approx(expected / 3, rel=1e-4)
    assert distance(two, one) == pytest.approx(distance(one, two))
    assert distance(one, one) == 0
    assert math.isfinite(distance(torch.tensor([1.0, 0.0]), torch.tensor([1.0, 1.0])))
    parts = torch.stack([one, two, two + 1])
    assert distances_within(parts)[2] == pytest.approx(distance((one + two) / 2, two + 1))


def test_parts_of_a_text() -> None:
    assert ends_of(1) == []
    assert ends_of(2) == [1, 2]
    assert ends_of(20) == [2, 5, 7, 10, 12, 15, 17, 20]


@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt2"])
@pytest.mark.parametrize("scaling", [None, "awq"])
def test_powers_are_what_the_parts_of_the_text_give(name: str, scaling: str | None) -> None:
    model, text = build(name), prompt(20, 48)
    reads: dict[str, list[Tensor]] = {}
    config = GPTQConfig(bits=8, head=None, scaling=scaling)
    hf_accel.optimize(model, [config], calibration=text)
    section = hf_accel.report(model).gptq
    assert (section.part_rows, section.row_tokens) == (2, 48)
    for path in section.powers:
        module = model.get_submodule(path)
        module.register_forward_pre_hook(
            lambda m, args, path=path: reads.setdefault(path, []).append(args[0].flatten(0, -2))
        )
    with torch.no_grad():
        for row in text[:2]:  # the first part; in 8 bits it is read nearly as the original read it
            model(row[None], use_cache=False)
    assert len(section.powers) >= 4 * model.config.num_hidden_layers
    for path, powers in section.powers.items():
        found = torch.cat(reads[path]).square().mean(dim=0)
        assert powers.shape == (8, len(found))
        share = 0.5 if "experts" in path else 0.05  # a token may go to another expert
        assert float((powers[0] - found).norm()) < share * float(found.norm()), path


def test_nothing_is_left_behind_and_no_hook_of_the_user_fires() -> None:
    model, fired = build("llama"), []
    hf_accel.optimize(model, [CONFIG, hf_accel.DecoderBlockConfig()], calibration=prompt(10, 48))
    model.model.layers[0].register_forward_hook(lambda *_: fired.append(1))
    before = fingerprint(model)
    assert calibration_drift(model, prompt(10, 48, seed=5)).tokens == 480
    assert not changes(before, fingerprint(model))
    assert not fired


def test_a_run_that_is_interrupted_knows_all_of_it(tmp_path: Path) -> None:
    config = GPTQConfig(bits=3, group_size=32, head=None, folder=str(tmp_path))

    def powers(progress: Any = None) -> dict[str, Tensor]:
        model = build("llama")
        hf_accel.optimize(model, [config], calibration=prompt(12, 48), progress=progress)
        return hf_accel.report(model).gptq.powers

    with pytest.raises(Killed):
        powers(killing(20))
    resumed = powers()
    for file in tmp_path.iterdir():
        file.unlink()
    whole = powers()
    assert resumed.keys() == whole.keys()
    assert all(torch.equal(resumed[path], whole[path]) for path in whole)


def test_what_cannot_be_compared_is_refused() -> None:
    model = build("llama")
    with pytest.raises(ConflictError, match="is not optimised"):
        calibration_drift(model, prompt(4, 48))
    hf_accel.optimize(model, [hf_accel.WeightOnlyConfig(bits=8)])
    with pytest.raises(UnsupportedModelError, match="not known what this LlamaForCausalLM was calibrated on"):
        calibration_drift(model, prompt(4, 48))
    hf_accel.restore(model)
    hf_accel.optimize(model, [CONFIG], calibration=prompt(1, 160))
    with pytest.raises(UnsupportedModelError, match="a text of two rows or more"):
        calibration_drift(model, prompt(4, 48))
    hf_accel.restore(model)
    hf_accel.optimize(model, [CONFIG], calibration=prompt(20, 48))
    with pytest.raises(ConfigError, match="text has 48 tokens; 96 or more"):
        calibration_drift(model, prompt(1, 48))
    with pytest.raises(ConfigError, match="give the tokenizer"):
        calibration_drift(model, "some text")
    with pytest.raises(ConflictError, match="is not optimised"):
        calibration_drift("no model", prompt(1, 48))
