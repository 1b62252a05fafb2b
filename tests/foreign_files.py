"""Checkpoints as packers of GPTQ, AutoRound and AWQ write them, restated from the formulas in loops over whole numbers.

Nothing here is taken from the package, so that its reader is measured against something else than its writer.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from quantized_files import wide
from safetensors.torch import save_file
from torch import Tensor

NIBBLES = (0, 2, 4, 6, 1, 3, 5, 7)  # AWQ: output column of each nibble
UP = "model.layers.0.mlp.up_proj"


def stream(values: list[int], bits: int) -> list[int]:
    """The 32-bit words of codes, the first in the lowest bits, as one large number cut into pieces."""
    number = sum(value << bits * index for index, value in enumerate(values))
    count = -(-len(values) * bits // 32)
    return [number >> 32 * word & 0xFFFFFFFF for word in range(count)]


def int32(rows: list[list[int]]) -> Tensor:
    return torch.tensor([[word - (1 << 32) if word >> 31 else word for word in row] for row in rows], dtype=torch.int32)


def transposed(rows: list[list[int]]) -> list[list[int]]:
    return [list(column) for column in zip(*rows, strict=True)]


def stored_zeros(zeros: list[int], bits: int, version: int) -> list[int]:
    """Words of zeros: version 1 has one less, at 3 bits in every field, else as one subtraction from every word."""
    if version == 2:
        return stream(zeros, bits)
    if bits == 3:
        return stream([(zero - 1) % 8 for zero in zeros], bits)
    ones = sum(1 << shift for shift in range(0, 32, bits))
    return [(word - ones) & 0xFFFFFFFF for word in stream(zeros, bits)]


def gptq(codes: list[list[int]], zeros: list[list[int]], scales: Tensor, bits: int, version: int) -> dict[str, Tensor]:
    """Tensors of codes [N][K], zeros [G][N] and scales [G, N]."""
    return {
        "qweight": int32(transposed([stream(row, bits) for row in codes])).contiguous(),
        "qzeros": int32([stored_zeros(row, bits, version) for row in zeros]),
        "scales": scales,
    }


def awq(codes: list[list[int]], zeros: list[list[int]], scales: Tensor) -> dict[str, Tensor]:
    def words(row: list[int]) -> list[int]:
        return stream([row[start + NIBBLES[i]] for start in range(0, len(row), 8) for i in range(8)], 4)

    by_column = transposed(codes)
    return {
        "qweight": int32([words(row) for row in by_column]),
        "qzeros": int32([words(row) for row in zeros]),
        "scales": scales,
    }


def gemv(codes: list[list[int]], zeros: list[list[int]], scales: Tensor, group: int) -> dict[str, Tensor]:
    """Rows by rows; zeros fill as many words as 128 columns per group would make whole, scales as many columns."""
    groups, multiple = len(zeros), {32: 4, 64: 2}.get(group, 1)
    width = -(-groups // 8)
    width = -(-width // multiple) * multiple
    padded = torch.zeros(scales.shape[1], 8 * width, dtype=scales.dtype)
    padded[:, :groups] = scales.T
    return {
        "qweight": int32([stream(row, 4) for row in codes]),
        "qzeros": int32([stream(row + [0] * (8 * width - groups), 4) for row in transposed(zeros)]),
        "scales": padded,
    }


class Written:
    """A folder of a llama with weights of this layout, and `weights`: name -> [N, K] in fp32, by the formula.

    layout: "v1", "v2", "awq" or "gemv"; index: the group of each column for K columns, None: adjacent; bits_of: name ->
    bits, None: as it is; symmetric: zeros in the middle; scales are of `scale_dtype`, and about half of them negative.
    """

    def __init__(
        self, folder: Path, layout: str, description: dict[str, Any], *, bits: int = 4, group: int = 32,
        symmetric: bool = True, index: Any = None, bits_of: Any = None, scale_dtype: torch.dtype = torch.float16,
        model: Any = None, file: str = "model.safetensors", beside: str = "", has_index: bool = True,
        experts: Any = (), architecture: str = "LlamaForCausalLM",
    ) -> None:  # fmt: skip
        self.folder, self.model = folder, wide(num_hidden_layers=1) if model is None else model
        self.layout, self.symmetric, self.scale_dtype, self.has_index = layout, symmetric, scale_dtype, has_index
        self.draw, self.weights = random.Random(5), {}
        self.tensors = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        for name, module in self.model.named_modules():
            if type(module) is torch.nn.Linear and name != "lm_head":
                own = bits if bits_of is None else bits_of(name)
                if own is not None:
                    self._quantize(name, module.weight.shape, own, group, index)
                    del self.tensors[f"{name}.weight"]
            elif hasattr(module, "gate_up_proj"):  # experts: files have each of their products by itself
                self._quantize_experts(name, module, bits, group, experts)
        folder.mkdir(exist_ok=True)
        save_file(self.tensors, folder / file, metadata={"format": "pt"})
        self.model.config.save_pretrained(folder)
        config = json.loads((folder / "config.json").read_text()) | {"architectures": [architecture]}
        if beside:
            (folder / beside).write_text(json.dumps(description))
        else:
            config["quantization_config"] = description
        (folder / "config.json").write_text(json.dumps(config))

    def _quantize_experts(self, name: str, module: Any, bits: int, group: int, names: Any) -> None:
        count, hidden, inner = module.down_proj.shape
        for expert in range(count):
            for part, shape in zip(names, ((inner, hidden), (inner, hidden), (hidden, inner)), strict=True):
                self._quantize(f"{name}.{expert}.{part}", shape, bits, group, None)
        for part in ("gate_up_proj", "down_proj"):
            del self.tensors[f"{name}.{part}"]

    def _quantize(self, name: str, shape: Any, bits: int, group: int, index: Any) -> None:
        rows, columns = shape
        size = columns if group == -1 else group
        groups, half = -(-columns // size), 1 << bits - 1
        codes = [self.draw.choices(range(2 * half), k=columns) for _ in range(rows)]
        middle = [half] if self.symmetric else range(2 * half)
        zeros = [self.draw.choices(middle, k=rows) for _ in range(groups)]
        signs = torch.tensor([self.draw.choices((-1, 1), k=rows) for _ in range(groups)])
        scales = signs * torch.rand(groups, rows, generator=torch.Generator().manual_seed(rows)) / half / 4 + 1e-3
        scales = scales.to(self.scale_dtype)
        group_of = [column // size for column in range(columns)] if index is None else index(columns)
        values = scales.tolist()
        weight = torch.tensor(
            [
                [values[group_of[k]][n] * (codes[n][k] - zeros[group_of[k]][n]) for k in range(columns)]
                for n in range(rows)
            ]
        )
        self.weights[name] = weight
        if self.layout == "awq":
            made = awq(codes, zeros, scales)
        elif self.layout == "gemv":
            made = gemv(codes, zeros, scales, size)
        else:
            made = gptq(codes, zeros, scales, bits, int(self.layout[1]))
            if self.has_index:
                made["g_idx"] = torch.tensor(group_of, dtype=torch.int32)
        self.tensors |= {f"{name}.{suffix}": tensor for suffix, tensor in made.items()}

    def edit(self, change: Any) -> None:
        """Change the tensors of the file."""
        change(self.tensors)
        save_file(self.tensors, self.folder / "model.safetensors", metadata={"format": "pt"})

    def plain(self) -> Any:
        """The model with the weights by the formula."""
        state = self.model.state_dict()
        self.model.load_state_dict(state | {f"{name}.weight": weight for name, weight in self.weights.items()})
        return self.model


def described(bits: int = 4, group: int = 32, **more: Any) -> dict[str, Any]:
    """What AutoGPTQ and GPTQModel write."""
    return {"quant_method": "gptq", "bits": bits, "group_size": group, "sym": True, "desc_act": False} | more


def shuffled(group: int, seed: int = 3) -> Any:
    """A group of each column, in an order of activations: groups of equal size, their columns anywhere."""

    def index(columns: int) -> list[int]:
        found = [column // group for column in range(columns)]
        random.Random(seed).shuffle(found)
        return found

    return index
