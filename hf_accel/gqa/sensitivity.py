"""What errors in keys cost: how much of a head's output moves when its keys are off by a little, found by trying.

Each pair of numbers of every head is turned off its place in both directions of its plane by a small share of itself,
and the layer is run again. That sees the softmax, caps, norms and windows as they are, and weighs keys against values
in one unit, the square of the output. Cost: some D runs of one batch, for heads of D numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hf_accel.gqa.heads import Heads
from hf_accel.gqa.maps import KeyMaps
from hf_accel.gqa.running import RecordedCall, Runnable

SHARE = 0.1  # of keys by which they are off


@dataclass(frozen=True)
class KeyCosts:
    """What the output of each query head moves by when its keys are off by their own size, in fp64.

    pairs [P, H]: a pair of numbers at a time. free [H]: all numbers without position, turned by `mixing` [F, F].
    """

    pairs: Tensor
    free: Tensor
    mixing: Tensor


@torch.no_grad()
def key_costs(runnable: Runnable, call: RecordedCall, heads: Heads, maps: KeyMaps) -> KeyCosts:
    """Return what errors in the keys of a layer cost on the inputs of a recorded call; its own heads stand again."""
    sizes = heads.o.shape[1:]
    metric = (heads.o.permute(1, 2, 0) @ heads.o.permute(1, 0, 2)).double()  # [H, Dv, Dv]

    def attended() -> Tensor:
        with runnable.attended() as found:
            runnable.run(call, call.inputs)
        return found[0].flatten(0, -2).unflatten(-1, sizes).double()  # [B * T, H, Dv]

    def moved(change: Callable[[Tensor], Tensor]) -> Tensor:
        """Return by how much the output of each head [H] moves when keys [G, D, E] and biases [G, D] change."""
        bias = None if heads.k_bias is None else change(heads.k_bias.double().cpu()).to(heads.k_bias)
        runnable.write(replace(heads, k=change(heads.k.double().cpu()).to(heads.k), k_bias=bias))
        off = attended() - usual
        return torch.einsum("nhd,hde,nhe->h", off, metric, off).cpu() / len(off) / SHARE**2

    runnable.write(heads)
    usual = attended()
    pairs = torch.zeros(len(maps.pairs), sizes[0], dtype=torch.float64)
    for index, (real, imaginary) in enumerate(maps.pairs.tolist()):
        for turn in (1.0, 1j):

            def off(keys: Tensor, factor: complex = 1 + SHARE * turn, a: int = real, b: int = imaginary) -> Tensor:
                turned = torch.complex(keys[:, a], keys[:, b]) * factor
                keys = keys.clone()
                keys[:, a], keys[:, b] = turned.real, turned.imag
                return keys

            pairs[index] += moved(off) / 2
    count = len(maps.free)
    free = torch.zeros(sizes[0], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(count, count, generator=generator, dtype=torch.float64) / max(1, count) ** 0.5
    if count:

        def mixed(keys: Tensor) -> Tensor:
            keys, own = keys.clone(), keys[:, maps.free]
            keys[:, maps.free] = own + SHARE * torch.tensordot(mixing, own, ([1], [1])).transpose(0, 1)
            return keys

        free = moved(mixed)
    runnable.write(heads)
    return KeyCosts(pairs, free, mixing)
