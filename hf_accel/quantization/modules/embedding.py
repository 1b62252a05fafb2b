"""Token embeddings stored in 8 bits; tied to an 8-bit head, both are one set of codes.

A lookup gathers a row of codes out of the interleaved layout: some microseconds per token, and the memory of the
original embedding (a fifth of a small model) is given back.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hf_accel.kernels.weights import LANES, PackedWeight, scale_values
from hf_accel.quantization.modules.linear import SealedWeight


class QuantizedEmbedding(nn.Embedding):
    """Embedding [V, E] from 8-bit codes; `packed` may be the weight of the head."""

    codes: Tensor
    scales: Tensor
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
        self.like = nn.Parameter(torch.empty(0, dtype=original.weight.dtype), requires_grad=False)
        self.register_buffer("codes", packed.codes)
        self.register_buffer("scales", packed.scales)

    @property
    def packed(self) -> PackedWeight:
        return PackedWeight(self.scheme, self.num_embeddings, self.embedding_dim, self.codes, self.scales)

    @property
    def weight(self) -> SealedWeight:  # type: ignore[override]
        return SealedWeight(self.packed, self.dtype)

    def forward(self, input: Tensor) -> Tensor:
        block, lane = input // LANES, input % LANES
        codes = self.codes[block, :, lane].flatten(-2)[..., : self.embedding_dim]  # [..., E]
        bits = self.scales[block, 0, lane]
        return (codes.float() * scale_values(bits)[..., None]).to(self.dtype)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, bits={self.scheme.bits}"
