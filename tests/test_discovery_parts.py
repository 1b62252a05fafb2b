"""Norms and activations are known by what they compute: every kind, its epsilon and weights; a lookalike is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.activations import ACT2FN
from transformers.models.cohere.modeling_cohere import CohereLayerNorm
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

from hf_accel.core.model.discovery.activations import ACTIVATIONS, described_activation
from hf_accel.core.model.discovery.norms import described_norm, normed
from hf_accel.core.model.discovery.readings import Unexplained, the_best, the_only

SIZE = 24


def random(module: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Fill what a norm holds, so that a weight that is left out shows."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) + 0.5)
    return module.to(dtype)


class Norm(nn.Module):
    """A norm of a model's own: without the names that libraries use."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor], shape: tuple[int, ...] = (SIZE,)) -> None:
        super().__init__()
        self.gain, self.function = nn.Parameter(torch.zeros(shape)), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.gain)


def rms(x: Tensor, gain: Tensor, eps: float = 1e-6) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * gain


KINDS: dict[str, tuple[Callable[[], nn.Module], torch.dtype, tuple[Any, ...]]] = {
    "llama": (lambda: LlamaRMSNorm(SIZE, eps=1e-5), torch.bfloat16, ("rms", 1e-5, "weight", None)),
    "olmo2": (lambda: Olmo2RMSNorm(SIZE, eps=1e-6), torch.bfloat16, ("rms_once", 1e-6, "weight", None)),
    "gemma": (lambda: Gemma2RMSNorm(SIZE, eps=1e-6), torch.bfloat16, ("rms_unit", 1e-6, "weight", None)),
    "cohere": (lambda: CohereLayerNorm(SIZE, eps=1e-5), torch.float32, ("layer", 1e-5, "weight", None)),
    "torch's": (lambda: nn.LayerNorm(SIZE, eps=1e-5), torch.float32, ("layer", 1e-5, "weight", "bias")),
    "without a bias": (lambda: nn.LayerNorm(SIZE, 1e-5, bias=False), torch.float32, ("layer", 1e-5, "weight", None)),
    "without weights": (
        lambda: nn.LayerNorm(SIZE, 1e-5, elementwise_affine=False), torch.float32, ("layer", 1e-5, None, None),
    ),
    "torch's rms": (lambda: nn.RMSNorm(SIZE, eps=1e-6), torch.float32, ("rms", 1e-6, "weight", None)),
    "of its own": (lambda: Norm(rms), torch.float32, ("rms", 1e-6, "gain", None)),
    "a large epsilon": (lambda: LlamaRMSNorm(SIZE, eps=0.05), torch.float32, ("rms", 0.05, "weight", None)),
}  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_norm(name: str) -> None:
    make, dtype, expected = KINDS[name]
    found = described_norm("norm", random(make(), dtype), SIZE)
    assert (found.kind, found.eps, found.weight, found.bias) == expected


def test_weights_of_each_head() -> None:
    found = described_norm("norm", random(Norm(rms, (3, 8))), 8)
    assert (found.kind, found.shape, found.size) == ("rms", (3, 8), 24)


LOOKALIKES: dict[str, nn.Module] = {
    "by the largest value": Norm(lambda x, gain: x / x.abs().amax(-1, keepdim=True) * gain),
    "by the length": Norm(lambda x, gain: functional.normalize(x, dim=-1) * gain),
    "epsilon outside the root": Norm(lambda x, gain: x / (x.square().mean(-1, keepdim=True).sqrt() + 1e-3) * gain),
    "over a part of the row": Norm(lambda x, gain: rms(x, gain) * x.square().mean().sqrt()),
    "clamped": Norm(lambda x, gain: rms(x, gain).clamp(-1, 1)),
    "two weights": nn.Bilinear(SIZE, SIZE, SIZE),
    "an activation": nn.Tanh(),
    "nothing": nn.Identity(),
    "with a module in it": nn.Sequential(nn.LayerNorm(SIZE)),
}


@pytest.mark.parametrize("name", LOOKALIKES)
def test_a_lookalike_is_refused(name: str) -> None:
    with pytest.raises(Unexplained, match="is no norm"):
        described_norm("norm", random(LOOKALIKES[name]), SIZE)


@pytest.mark.parametrize("kind", ["rms", "rms_unit", "layer"])
def test_what_norms_compute(kind: str) -> None:
    x, weight, bias = torch.randn(3, SIZE).double(), torch.randn(SIZE).double(), torch.randn(SIZE).double()
    if kind == "layer":
        expected = functional.layer_norm(x, (SIZE,), weight, bias, 1e-5)
    else:
        expected = functional.rms_norm(x, (SIZE,), weight + (kind == "rms_unit"), 1e-5) + bias
    torch.testing.assert_close(normed(kind, 1e-5, x, weight, bias), expected)


@pytest.mark.parametrize(
    "module,name",
    [
        (nn.SiLU(), "silu"),
        (nn.GELU(), "gelu"),
        (nn.GELU(approximate="tanh"), "gelu_tanh"),
        (nn.ReLU(), "relu"),
        (ACT2FN["gelu_new"], "gelu_tanh"),
        (ACT2FN["gelu_fast"], "gelu_tanh"),
        (ACT2FN["gelu_pytorch_tanh"], "gelu_tanh"),
        (ACT2FN["quick_gelu"], "quick_gelu"),
        (ACT2FN["relu2"], "relu2"),
        (ACT2FN["laplace"], None),
        (nn.Tanh(), None),
        (nn.Softmax(-1), None),
        (nn.Linear(3, 3), None),
        (nn.LeakyReLU(1e-3), None),
        (nn.Hardswish(), None),
    ],
    ids=str,
)
def test_activations(module: nn.Module, name: str | None) -> None:
    assert described_activation(module) == name
    assert name is None or name in ACTIVATIONS


@pytest.mark.parametrize(
    "errors,chosen",
    [((0.01, 0.04), None), ((0.01, 0.05), 0), ((0.05, 0.01), 1), ((0.0, 0.0), None), ((0.0, 1e-9), None)],
)
def test_a_reading_that_is_clearly_better(errors: tuple[float, float], chosen: int | None) -> None:
    readings = [(error, index) for index, error in enumerate(errors)]
    if chosen is not None:
        assert the_best(readings, "it") == chosen
        return
    with pytest.raises(Unexplained, match="2 readings explain it"):
        the_best(readings, "it")


def test_one_reading_and_no_other() -> None:
    assert the_only(iter([3]), "it") == 3
    with pytest.raises(Unexplained, match="nothing known explains it"):
        the_only([], "it")
    with pytest.raises(Unexplained, match="2 readings explain it"):
        the_only([1, 2], "it")
