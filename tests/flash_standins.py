"""Modules that stand for the packages of FlashAttention: their signatures, computed by the tiled reference.

What they prove is how the packages are called; not what they compute, nor how fast.
"""

from __future__ import annotations

import importlib.machinery
import sys
from types import ModuleType
from typing import Any

import pytest
import torch

from hf_accel.attention import flash_packages
from hf_accel.attention.registry import KERNELS
from hf_accel.ops.tiled import tiled_attention

Window = tuple[Any, Any]


def _batched(q, k, v, scale, causal, window, softcap, sinks):
    """Attention of [B, T, H, D] over [B, S, G, D]; causal masks end in the lower right corner."""
    left, right = window
    assert causal or left in (-1, None), "windows of ours are causal"
    assert right in (-1, None, 0)
    output, lse = tiled_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), scale=scale, is_causal=causal,
        window=None if left in (-1, None) else left + 1, softcap=softcap or None, sinks=sinks,
    )  # fmt: skip
    return output.transpose(1, 2), lse


def _ragged(q, k, v, ends_q, ends_k, scale, causal, window, softcap, sinks):
    """The same of rows one after the other, [n, H, D]."""
    assert ends_q.dtype is ends_k.dtype is torch.int32
    assert (int(ends_q[-1]), int(ends_k[-1])) == (len(q), len(k))
    parts = []
    for b in range(len(ends_q) - 1):
        own_q, own_k = slice(int(ends_q[b]), int(ends_q[b + 1])), slice(int(ends_k[b]), int(ends_k[b + 1]))
        states = q[own_q][None], k[own_k][None], v[own_k][None]
        parts.append(_batched(*states, scale, causal, window, softcap, sinks)[0][0])
    return torch.cat(parts)


class Two:
    """flash-attn 2."""

    module = "flash_attn"

    @staticmethod
    def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
                        alibi_slopes=None, deterministic=False, return_attn_probs=False):  # fmt: skip
        return _batched(q, k, v, softmax_scale, causal, window_size, softcap, None)[0]

    @staticmethod
    def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
                               softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
                               deterministic=False, return_attn_probs=False, block_table=None):  # fmt: skip
        assert max_seqlen_q == int(cu_seqlens_q.diff().max())
        assert max_seqlen_k == int(cu_seqlens_k.diff().max())
        return _ragged(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal, window_size, softcap, None)


class Three:
    """flash-attn 3, a release whose functions return the log-sum-exp beside the output."""

    module = "flash_attn_interface"

    @staticmethod
    def flash_attn_func(q, k, v, softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None,
                        v_descale=None, window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1,
                        pack_gqa=None, deterministic=False, sm_margin=0):  # fmt: skip
        return _batched(q, k, v, softmax_scale, causal, window_size, softcap, None)

    @staticmethod
    def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None,
                               seqused_k=None, softmax_scale=None, causal=False, qv=None, q_descale=None,
                               k_descale=None, v_descale=None, window_size=(-1, -1), attention_chunk=0, softcap=0.0,
                               num_splits=1, pack_gqa=None, deterministic=False, sm_margin=0):  # fmt: skip
        return _ragged(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal, window_size, softcap, None), None


class Four:
    """flash-attn 4: sinks in bf16, no lengths to be told."""

    module = "flash_attn.cute"

    @staticmethod
    def flash_attn_func(q, k, v, softmax_scale=None, causal=False, window_size=(None, None), learnable_sink=None,
                        softcap=0.0, num_splits=1, pack_gqa=None):  # fmt: skip
        assert learnable_sink is None or learnable_sink.dtype is torch.bfloat16
        return _batched(q, k, v, softmax_scale, causal, window_size, softcap, learnable_sink)

    @staticmethod
    def flash_attn_varlen_func(q, k, v, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None,
                               page_table=None, softmax_scale=None, causal=False, window_size=(None, None),
                               learnable_sink=None, softcap=0.0, num_splits=1, pack_gqa=None):  # fmt: skip
        found = _ragged(
            q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal, window_size, softcap, learnable_sink
        )
        return found, None


STANDINS = {"flash2": Two, "flash3": Three, "flash4": Four}


def install(patch: pytest.MonkeyPatch, name: str) -> Any:
    """Put the package of a back end in place, for this machine's device; return the stand-in."""
    standin = STANDINS[name]
    for dotted in ("flash_attn", standin.module):
        module = ModuleType(dotted)
        module.__spec__ = importlib.machinery.ModuleSpec(dotted, None)
        module.__path__ = []  # type: ignore[attr-defined]
        patch.setitem(sys.modules, dotted, module)
    sys.modules[standin.module].__dict__.update(vars(standin))
    patch.setattr(KERNELS[name], "devices", ("cpu",))
    flash_packages.parameters.cache_clear()
    return standin


def operator(q, k, v, ends_q, ends_k, most_q, most_k, dropout, causal, debug, *, scale=None, window_size_left=None,
             window_size_right=None):  # fmt: skip
    """torch's `aten::_flash_attention_forward`: returns the output first."""
    window = (window_size_left, window_size_right)
    if ends_q is None:
        assert (most_q, most_k) == (q.shape[1], k.shape[1])
        return [_batched(q, k, v, scale, causal, window, None, None)[0]]
    assert (most_q, most_k) == (int(ends_q.diff().max()), int(ends_k.diff().max()))
    return [_ragged(q, k, v, ends_q, ends_k, scale, causal, window, None, None)]
