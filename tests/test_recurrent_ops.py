"""The twins of recurrent mixers' tokens against the functions that transformers' models call."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers.models.falcon_h1.modeling_falcon_h1 import FalconH1RMSNormGated
from transformers.models.granitemoehybrid import modeling_granitemoehybrid as granite
from transformers.models.kimi_linear import modeling_kimi_linear as kimi
from transformers.models.mamba import modeling_mamba as mamba
from transformers.models.qwen3_next import modeling_qwen3_next as qwen

from hf_accel.ops.recurrent import GatedNorm, convolved, delta_step, gated_norm, scan_step, ssd_step


def drawn(*sizes: int) -> Tensor:
    return torch.randn(*sizes)


def close(found: Tensor, expected: Tensor) -> bool:
    return torch.allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("activation", [None, "silu"])
def test_a_convolution_is_what_models_call(activation: str | None) -> None:
    x, state, weight, bias = drawn(2, 6), drawn(2, 6, 4), drawn(6, 4), drawn(6)
    value, after = convolved(x, state, weight, bias, is_silu=activation is not None)
    expected = qwen.causal_conv1d_update(x[..., None], state, weight, bias, activation)
    assert close(value, expected[..., 0])
    assert torch.equal(after, state)  # which was moved in place


def test_the_delta_rule_is_what_models_call() -> None:
    q, k, v = drawn(2, 2, 8), drawn(2, 2, 8), drawn(2, 4, 5)
    g, beta, state = -torch.rand(2, 4), torch.rand(2, 4), drawn(2, 4, 8, 5)
    value, after = delta_step(q, k, v, g, beta, state)
    rows = [part[:, None] for part in (q, k, v, g, beta)]
    found = qwen.torch_recurrent_gated_delta_rule(*rows, state, True, use_qk_l2norm_in_kernel=True)
    assert close(value, found[0][:, 0])
    assert close(after, found[1])


def test_the_delta_rule_with_a_decay_per_key_is_what_models_call() -> None:
    q, k, v = drawn(2, 4, 8), drawn(2, 4, 8), drawn(2, 4, 8)
    g, beta, state = -torch.rand(2, 4, 8), torch.rand(2, 4), drawn(2, 4, 8, 8)
    value, after = delta_step(q, k, v, g, beta, state)
    rows = [part[:, None] for part in (q, k, v, g, beta)]
    found = kimi.recurrent_kimi_delta_attention(*rows, state, True, use_qk_l2norm_in_kernel=True)
    assert close(value, found[0][:, 0])
    assert close(after, found[1])


def test_mamba2_is_what_models_call() -> None:
    x, dt, a_log, d = drawn(2, 4, 5), drawn(2, 4), drawn(4), drawn(4)
    b, c, state = drawn(2, 2, 6), drawn(2, 2, 6), drawn(2, 4, 5, 6)
    value, after = ssd_step(x, dt, a_log, b, c, d, state)
    a = -a_log.exp()[:, None, None].expand(-1, 5, 6)
    found = granite.mamba2_selective_state_update(
        state, x, dt[..., None].expand(-1, -1, 5), a, b, c, d[:, None].expand(-1, 5), dt_softplus=True
    )
    assert close(value, found)
    assert close(after, state)  # which was moved in place


def test_a_scan_is_what_models_call() -> None:
    x, dt, gate, a_log, d = drawn(2, 7), drawn(2, 7), drawn(2, 7), drawn(7, 6), drawn(7)
    b, c, state = drawn(2, 6), drawn(2, 6), drawn(2, 7, 6)
    value, after = scan_step(x, dt, a_log, b, c, d, gate, state)
    found = mamba.mamba_selective_state_update(state, x, dt, -a_log.exp(), b, c, d, z=gate, dt_softplus=True)
    assert close(value, found)
    assert close(after, state)  # which was moved in place


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_norms_are_those_of_models_to_the_last_bit(dtype: torch.dtype) -> None:
    norms = {
        GatedNorm(8, 1e-6): qwen.Qwen3NextRMSNormGated(8, eps=1e-6),
        GatedNorm(8, 1e-6, rounds_once=True, is_sigmoid=True): kimi.KimiLinearRMSNormGated(8, eps=1e-6),
        GatedNorm(4, 1e-5, gates_first=True): granite.GraniteMoeHybridRMSNormGated(8, 4, eps=1e-5),
        GatedNorm(2, 1e-5, rounds_once=True): FalconH1RMSNormGated(8, eps=1e-5, n_groups=4),
        GatedNorm(8, 1e-5, True, True): FalconH1RMSNormGated(8, eps=1e-5, norm_before_gate=False),
    }
    x, gate = drawn(5, 8).to(dtype), drawn(5, 8).to(dtype)
    for norm, module in norms.items():
        torch.nn.init.normal_(module.weight)
        module.to(dtype)
        assert torch.equal(gated_norm(x, gate, module.weight, norm), module(x, gate))
