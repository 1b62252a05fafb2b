"""torch.compile of anything else in the process leaves native layers in use."""

from __future__ import annotations

import pytest
from comparison import optimised
from models import build
from torch import nn
from torch._dynamo import mutation_guard
from transformers.models.llama import modeling_llama

from hf_accel import DecoderBlockConfig


@pytest.mark.native
def test_layers_run_natively_after_something_else_was_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first compilation of a process writes into `nn.Module`, of which every layer is one."""
    layers = optimised(build("llama"), [DecoderBlockConfig()]).model.layers
    for name, value in {
        "___needs_generation_tag_patch": True,
        "__init__": nn.Module.__init__,
        "__setstate__": nn.Module.__setstate__,
    }.items():
        monkeypatch.setattr(nn.Module, name, value, raising=False)
    before = dict(vars(nn.Module))
    mutation_guard.install_generation_tagging_init()
    assert dict(vars(nn.Module)) != before
    assert all(layer.step.is_current() for layer in layers)


@pytest.mark.native
def test_globals_of_compiled_code_are_no_change(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile keeps what its code reads among the globals of the file that the code was made from."""
    layers = optimised(build("llama"), [DecoderBlockConfig()]).model.layers
    monkeypatch.setattr(modeling_llama, "__compiled_fn_1_8a82a088", print, raising=False)
    monkeypatch.setattr(modeling_llama, "__import_torch_dot__dynamo", nn, raising=False)
    monkeypatch.setattr(modeling_llama, "_140311703060944_c18", 0.5, raising=False)
    assert all(layer.step.is_current() for layer in layers)
    monkeypatch.setattr(modeling_llama, "rotate_half", nn.functional.relu)
    assert not any(layer.step.is_current() for layer in layers), "a function that forwards call is one"
