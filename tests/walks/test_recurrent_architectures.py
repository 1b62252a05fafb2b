"""Every architecture of the installed transformers that keeps states of mixers: which run natively, with stock's text.

The table in docs/recurrent.md is what is found here. Nothing here knows the architectures: they are those whose files
ask a cache for a convolution's state.
"""

from __future__ import annotations

import importlib
import re
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from architectures import CannotBuild, architectures, tiny
from models import padded, prompt
from transformers.models.auto.configuration_auto import model_type_to_module_name

import hf_accel
from hf_accel.recurrent import patcher
from hf_accel.recurrent.mixers import TITLES, mixers_of
from hf_accel.recurrent.step import NativeMixer

PAGE = Path(__file__).parents[2] / "docs" / "recurrent.md"
OTHERS = "none that is known"


def types() -> list[str]:
    """Return the model types whose files ask a cache for a convolution's state."""
    names = {model_type: model_type_to_module_name(model_type) for model_type in architectures()}
    modules = {name: importlib.import_module(f"transformers.models.{name}") for name in set(names.values())}
    files = {name: Path(str(module.__file__)).with_name(f"modeling_{name}.py") for name, module in modules.items()}
    asking = {name for name, file in files.items() if file.exists() and "get_conv_state" in file.read_text()}
    return sorted(model_type for model_type, name in names.items() if name in asking)


def documented() -> dict[str, set[str]]:
    """Return kind of mixer -> architectures, as the page has them."""
    rows = re.findall(r"^\| ([^|]+) \| ([a-z0-9_, ]+) \|", PAGE.read_text(), re.MULTILINE)
    return {kind: set(names.split(", ")) for kind, names in rows if kind in (*TITLES, OTHERS)}


@pytest.mark.slow
@pytest.mark.native
def test_the_table_is_what_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patcher, "share_of_time", lambda mixer, form: 0.0)
    found: dict[str, set[str]] = defaultdict(set)
    built = set()
    for model_type in types():
        try:
            model = tiny(model_type)
        except CannotBuild:
            continue
        if not mixers_of(model):
            continue
        built.add(model_type)
        calls = [{"input_ids": prompt()}, padded([5, 11, 3])]
        before = [model.generate(**call, max_new_tokens=24, do_sample=False) for call in calls]
        try:
            hf_accel.optimize(model, [hf_accel.RecurrentStepConfig()])
        except hf_accel.VerificationError:
            found[OTHERS].add(model_type)
            continue
        steps = [module.step for module in model.modules() if isinstance(module, NativeMixer)]
        for title in {step.form.title for step in steps}:
            found[title].add(model_type)
        after = [model.generate(**call, max_new_tokens=24, do_sample=False) for call in calls]
        assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True)), model_type
    assert found == {kind: names & built for kind, names in documented().items()}
    assert set.union(*documented().values()) - built <= set(types())
