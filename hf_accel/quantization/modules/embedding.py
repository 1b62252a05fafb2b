"""Token embeddings stored in few bits; tied to a packed head, both are one set of codes.

A lookup gathers a row of codes out of the interleaved layout: some microseconds per token, and the memory of the
original embedding (a fifth of a small model) is given back.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from hf_accel.kernels.layout import gathered
from hf_accel.kernels.weights import LANES, PackedWeight, scale_values
from hf_accel.ops import fp4
from hf_accel.quantization.modules.linear import SealedWeight

TABLE_BITS = (8, 4)


class QuantizedEmbedding(nn.Embedding):
    """Embedding [V, E] from codes of 8 or 4 bits or of MXFP4; `packed` may be the weight of the head.

    embed_scale: what the original multiplies its rows by; None: nothing.
    """

    codes: Tensor
    scales: Tensor
    offsets: Tensor | None
    embed_scale: Tensor | None
    # empty: casting the model casts it, too, and so it has the dtype in which embeddings are wanted. A parameter,
    # because transformers asks a model's parameters for its device, and there may be no others
    like: nn.Parameter

    @property
    def dtype(self) -> torch.dtype:
        return self.like.dtype

    def __init__(self, packed: PackedWeight, original: nn.Embedding) -> None:
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim = packed.rows, packed.columns
        self.padding_idx = original.padding_idx
        self.scheme = packed.scheme
        like = torch.empty(0, dtype=original.weight.dtype, device=packed.codes.device)
        self.like = nn.Parameter(like, requires_grad=False)
        self.register_buffer("codes", packed.codes)
        self.register_buffer("scales", packed.scales)
        self.register_buffer("offsets", packed.offsets)
        self.register_buffer("embed_scale", factor_of(original), persistent=False)

    @property
    def packed(self) -> PackedWeight:
        return PackedWeight(self.scheme, self.num_embeddings, self.embedding_dim, self.codes, self.scales, self.offsets)

    @property
    def weight(self) -> SealedWeight:  # type: ignore[override]
        return SealedWeight(self.packed, self.dtype)

    def forward(self, input: Tensor) -> Tensor:
        block, lane = input // LANES, input % LANES
        codes = gathered(self.codes, block, lane, self.scheme.bits)[..., : self.embedding_dim]  # [..., E]
        if self.scheme.code_book:
            codes = fp4.codes((codes + 8).view(torch.uint8))
        scales = scale_values(self.scales[block, :, lane])  # [..., groups]
        values = codes.float().unflatten(-1, (scales.shape[-1], -1)) * scales[..., None]
        if self.offsets is not None:
            values = values + scale_values(self.offsets[block, :, lane])[..., None]
        found = values.flatten(-2).to(self.dtype)
        return found if self.embed_scale is None else found * self.embed_scale.to(found.dtype)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, bits={self.scheme.bits}"


def factor_of(table: nn.Embedding) -> Tensor | None:
    """Return what a table multiplies its rows by, a tensor of one number; None: nothing.

    Raises:
        ValueError: running it on a small table shows that it does something else.
    """
    if type(table) is nn.Embedding:
        return None
    factor = getattr(table, "embed_scale", None)
    probe = copy.copy(table)
    device = factor.device if isinstance(factor, Tensor) else None
    probe._parameters = {"weight": nn.Parameter(torch.randn(3, 4, device=device), requires_grad=False)}
    probe.padding_idx = None
    ids = torch.tensor([2, 0], device=device)
    if (
        isinstance(factor, Tensor)
        and factor.numel() == 1
        and torch.equal(probe(ids), probe.weight[ids] * factor.float())
    ):
        return factor.detach().clone()
    raise ValueError(f"a {type(table).__name__} does more than look rows up and multiply them by a number")
