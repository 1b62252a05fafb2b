"""Rows of different lengths one after the other: where their tokens lie in a padded batch, and where each row ends."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn import functional

from hf_accel.core.calls.bands import Band


class Ragged(NamedTuple):
    """Where the tokens of padded rows lie in a flat batch, and where each row ends in what is packed of them."""

    queries: torch.Tensor
    columns: torch.Tensor
    query_ends: torch.Tensor
    column_ends: torch.Tensor
    most_queries: int
    most_columns: int


def ragged_rows(band: Band, device: torch.device) -> Ragged:
    """Return the rows of a band, found out once for all layers of a pass."""
    if Ragged not in band.kept:
        past = band.positions - band.tokens
        columns = [band.positions - start for start in band.starts]
        queries = [min(band.tokens, band.positions - max(past, start)) for start in band.starts]

        def flat(width: int, lengths: list[int]) -> torch.Tensor:
            ends = [torch.arange((b + 1) * width - n, (b + 1) * width) for b, n in enumerate(lengths)]
            return torch.cat(ends).to(device)

        def sums(lengths: list[int]) -> torch.Tensor:
            return functional.pad(torch.tensor(lengths).cumsum(0), (1, 0)).to(device, torch.int32)

        band.kept[Ragged] = Ragged(
            flat(band.tokens, queries), flat(band.positions, columns), sums(queries), sums(columns),
            max(queries), max(columns),
        )  # fmt: skip
    return band.kept[Ragged]  # type: ignore[no-any-return]


def packed(states: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Return the tokens `index` of states [B, T, H, D], [n, H, D]."""
    return states.reshape(-1, *states.shape[2:]).index_select(0, index)
