"""Attention over keys and values as a cache holds them: codes, parts that come one after the other, positions given up.

Few queries read the codes natively, part by part; prompts, too, with a kernel of their own. Where that kernel cannot
be had, prompts decode a part at a time. Results of parts are merged by their softmax statistics (Milakov and
Gimelshein 2018, arXiv:1805.02867). Cost: what is held, read once.
"""

from __future__ import annotations

import torch

from hf_accel.core.calls.bands import band_of
from hf_accel.core.calls.held import Held
from hf_accel.kernels import native
from hf_accel.kernels.native.prompt import prompt_attention
from hf_accel.ops.attention import AttentionState, partial_attention

MAX_QUERIES = 16  # tokens per row up to which reading codes beats decoding them


def held_attention(
    query: torch.Tensor,
    held: Held,
    mask: torch.Tensor | None,
    scale: float | None,
    softcap: float | None = None,
    is_causal: bool | None = None,
) -> torch.Tensor:
    """Return attention [B, H, T, Dv] of query [B, H, T, D] over what `held` describes.

    mask: as transformers gives it, bool (true: visible) or a summand [B, 1, T, S]; None: causal over the last T.
    """
    tokens, size = query.shape[2], query.shape[3]
    scale = size**-0.5 if scale is None else scale
    if (output := _at_once(query, held, mask, scale, softcap, is_causal)) is not None:
        return output
    is_native = _is_native(query, held)
    few = tokens <= MAX_QUERIES and is_native
    is_causal = mask is None and held.visible is None and tokens > 1 and is_causal is not False
    if held.visible is not None:
        mask = _own_mask(held.visible, query.shape[1], tokens)
    elif is_causal and (few or not is_native):
        mask = _causal(tokens, held.shape[2], query.device)
    elif mask is not None and mask.dtype is not torch.bool:
        # a summand: 0 or the least number of the dtype
        mask = mask == 0
    if is_native and query.stride(3) != 1:
        query = query.contiguous()
    state: AttentionState | None = None
    at = 0
    for keys, values in held.parts():
        positions = keys.shape[2]
        if not positions:
            continue
        visible = None if mask is None else mask[..., at : at + positions]
        if few:
            state = native.attend(
                query, keys, values, held.sizes, scale=scale, softcap=softcap, mask=visible, bits=held.bits, state=state
            )
        elif is_native:
            part = native.prompt_state(
                query, keys, values, held.sizes, past=held.shape[2] - tokens - at, scale=scale, softcap=softcap,
                is_causal=is_causal, mask=visible, bits=held.bits,
            )  # fmt: skip
            state = part if state is None else state.merge(part)
        else:
            k, v = held.decoded((keys, values))
            state = partial_attention(query, k, v, visible, scale, softcap, state)
        at += positions
    if state is None:
        return query.new_zeros((*query.shape[:3], held.sizes[1]))
    output = state.result(query.dtype)
    if held.observe is not None:
        held.observe(query, scale)
    return output


def _at_once(
    query: torch.Tensor,
    held: Held,
    mask: torch.Tensor | None,
    scale: float,
    softcap: float | None,
    is_causal: bool | None,
) -> torch.Tensor | None:
    """Return attention [B, H, T, Dv] of a prompt over what lies in one piece; None where it does not so lie."""
    if query.shape[2] <= MAX_QUERIES or held.visible is not None or not _is_native(query, held):
        return None
    keys, values = next(held.parts())
    if keys.shape[2] != held.shape[2]:
        return None
    band = band_of(mask)
    if mask is not None and band is None and mask.dtype is not torch.bool:
        mask = mask == 0
    output = prompt_attention(
        query if query.stride(3) == 1 else query.contiguous(), keys, values, held.sizes, scale=scale, softcap=softcap,
        is_causal=band is not None or (mask is None and is_causal is not False),
        window=None if band is None else band.window, starts=None if band is None else band.starts_tensor,
        mask=None if band is not None else mask, bits=held.bits,
    ).transpose(1, 2)  # fmt: skip
    if held.observe is not None:
        held.observe(query, scale)
    return output


def _is_native(query: torch.Tensor, held: Held) -> bool:
    """Return whether the native kernels read what is held."""
    return (
        query.is_cpu
        and query.dtype in native.DTYPES
        and max(held.sizes) <= native.MAX_HEAD_DIM
        and (held.bits is not None or held.dtypes == (query.dtype, query.dtype))
        and native.is_available()
    )


def _causal(tokens: int, positions: int, device: torch.device) -> torch.Tensor:
    columns = torch.arange(positions, device=device)
    rows = torch.arange(positions - tokens, positions, device=device)
    return (columns <= rows[:, None])[None, None]


def _own_mask(visible: torch.Tensor, heads: int, tokens: int) -> torch.Tensor:
    """Return bool [B, H, T, S] for visible [B, G, S], whose last T columns are the new tokens."""
    groups, positions = visible.shape[1:]
    mask = visible.repeat_interleave(heads // groups, dim=1)[:, :, None]
    return mask & _causal(tokens, positions, visible.device) if tokens > 1 else mask
