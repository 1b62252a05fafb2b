"""torch.compile of anything else in the process leaves native layers in use."""

from __future__ import annotations

import pytest
from comparison import optimised
from models import build
from torch import nn
from torch._dynamo import mutation_guard

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
