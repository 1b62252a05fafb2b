"""Random calls of every native entry, all operands in guarded memory: odd sizes, gaps between rows, every dtype."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from guarding import Pages
from torch import Tensor

from hf_accel.kernels import native
from hf_accel.kernels.native import BlockShape, BlockWeights, NativeBlock, Norm, Projection, heads_in_order
from hf_accel.kernels.native.block_weights import ACTIVATIONS, NORM_KINDS
from hf_accel.kernels.packed import packed_linear
from hf_accel.kernels.weights import PackedWeight
from hf_accel.ops import cached
from hf_accel.ops.affine import Scheme, quantize

WIDTHS = [1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 33, 47, 63, 64, 65, 96, 127, 128, 255, 257, 300, 511, 513, 1000, 1025]
HEIGHTS = [1, 2, 3, 5, 7, 15, 16, 17, 31, 33, 59, 60, 61, 64, 65, 121, 130]
ROWS = [1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 15, 16, 17, 20, 31, 32, 33, 40, 64, 257]
HEAD_SIZES = [2, 4, 8, 10, 16, 18, 20, 32, 34, 48, 64, 66, 80, 96, 100, 128, 192, 256]
LENGTHS = [1, 2, 3, 5, 15, 16, 17, 100, 255, 256, 257, 300, 513]
SCHEMES = {
    "packed8": Scheme(8), "packed4": Scheme(4, 32), "packed4 with zeros": Scheme(4, 32, False),
    "packed3": Scheme(3, 32), "packed3 with zeros": Scheme(3, 32, False),
    "packed2": Scheme(2, 32), "packed2 with zeros": Scheme(2, 32, False),
}  # fmt: skip


@dataclass
class Case:
    """One native call: what it is, for the message; and `run`, which returns what it computed."""

    kind: str
    dtype: torch.dtype
    title: str
    run: Callable[[], Tensor]


class Cases:
    """Draws cases; the same seed gives the same ones."""

    def __init__(self, seed: int, pages: Pages) -> None:
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.pages = pages

    def draw(self, kind: str) -> Case:
        self.pages.clear()
        self.pages.at_front = self.random.random() < 0.3
        self.dtype = self.random.choice(native.DTYPES)
        self.gap = self.random.choice([0, 0, 1, 7])
        title, run = getattr(self, "_" + kind.split()[0].rstrip("2348"))(kind)
        where = "behind a guard" if self.pages.at_front else "before a guard"
        return Case(kind, self.dtype, f"{kind} {str(self.dtype)[6:]} gap {self.gap} {where}: {title}", run)

    def _random(self, *size: int) -> Tensor:
        return torch.randn(*size, generator=self.generator).to(self.dtype)

    def _sizes(self, most_rows: int = 257) -> tuple[int, int, int]:
        pick = self.random.choice
        return pick([m for m in ROWS if m <= most_rows]), pick(WIDTHS), pick(HEIGHTS)

    def _bias(self, n: int) -> Any:
        return self.pages.put(self._random(n)) if self.random.random() < 0.5 else None

    def _linear(self, kind: str) -> tuple[str, Callable[[], Tensor]]:
        m, k, n = self._sizes()
        x, w, b = self.pages.put(self._random(m, k)), self.pages.put(self._random(n, k), self.gap), self._bias(n)
        return f"[{m}, {k}] by [{n}, {k}]", lambda: native.linear(x, w, b)

    def _transposed(self, kind: str) -> tuple[str, Callable[[], Tensor]]:
        m, k, n = self._sizes(native.MAX_ROWS)
        x, w, b = self.pages.put(self._random(m, k)), self.pages.put(self._random(k, n), self.gap), self._bias(n)
        return f"[{m}, {k}] by [{k}, {n}]", lambda: native.linear(x, w, b, transposed=True)

    def _group(self, kind: str) -> tuple[str, Callable[[], Tensor]]:
        m, k, _ = self._sizes(native.MAX_ROWS)
        heights = self.random.choices(HEIGHTS, k=self.random.randint(1, 4))
        x, biases = self.pages.put(self._random(m, k)), [self._bias(n) for n in heights]
        weights = [self.pages.put(self._random(n, k), self.gap) for n in heights]
        return f"[{m}, {k}] by {heights}", lambda: torch.cat(native.linear_group(x, weights, biases), -1)

    def _weight(self, n: int, k: int, scheme: Scheme) -> PackedWeight:
        scales = self.random.choice([torch.bfloat16, torch.float32])
        made = PackedWeight.pack(quantize(torch.randn(n, k, generator=self.generator), scheme, scales))
        made.codes, made.scales = self.pages.put(made.codes), self.pages.put(made.scales)
        made.offsets = self.pages.put(made.offsets)
        return made

    def _packed(self, kind: str) -> tuple[str, Callable[[], Tensor]]:
        m, k, n = self._sizes()
        scheme = SCHEMES[kind]
        k = k if scheme.group_size is None else -(-k // 32) * 32
        x, weight, b = self.pages.put(self._random(m, k)), self._weight(n, k, scheme), self._bias(n)
        return f"[{m}, {k}] by [{n}, {k}]", lambda: packed_linear(x, weight, b)

    def _rows(self, states: Tensor, bits: int | None, is_key: bool) -> Tensor:
        made = states if bits is None else cached.encode(states, bits, is_key=is_key)
        return self.pages.put(made, self.gap)  # type: ignore[no-any-return]

    def _attend(self, kind: str) -> tuple[str, Callable[[], Tensor]]:
        pick, bits = self.random.choice, {"8": 8, "4": 4}.get(kind[-1])
        b, g, t, s, d = pick([1, 2]), pick([1, 2, 3]), pick([1, 2, 5]), pick(LENGTHS), pick(HEAD_SIZES)
        h = g * pick([1, 2, 3, 8])
        query = self.pages.put(self._random(b, h, t, d), self.gap)
        parts = [[self._rows(self._random(b, g, s, d), bits, is_key) for is_key in (True, False)] for _ in range(2)]
        masks = [self._mask(pick([1, b]), pick([1, h]), t, s) for _ in parts]

        def run() -> Tensor:
            state = None
            for (keys, values), mask in zip(parts, masks):
                state = native.attend(
                    query, keys, values, (d, d), scale=d**-0.5, mask=mask, bits=bits, softcap=None, state=state
                )
            return state.values / state.sum[..., None]  # type: ignore[union-attr]

        return f"[{b}, {h}, {t}, {d}] over [{b}, {g}, {s}], twice", run

    def _mask(self, b: int, h: int, t: int, s: int) -> Any:
        if self.random.random() < 0.5:
            return None
        seen = torch.rand(b, h, t, s, generator=self.generator) < 0.7
        seen[..., 0] = True
        return self.pages.put(seen, self.gap)

    def _encode(self, kind: str) -> tuple[str, Callable[[], Tensor]]:
        pick, bits = self.random.choice, int(kind[-1])
        b, g, t, d = pick([1, 2]), pick([1, 2, 3]), pick([1, 2, 5, 64]), pick(HEAD_SIZES)
        states, is_key = self.pages.put(self._random(b, g, t, d), self.gap), pick([True, False])
        rows = self.pages.put(torch.zeros(b, g, t, cached.row_bytes(bits, d), dtype=torch.uint8), self.gap)

        def run() -> Tensor:
            native.encode(states, bits, rows, is_key=is_key)
            return rows.clone()

        return f"[{b}, {g}, {t}, {d}] keys: {is_key}", run

    def _block(self, kind: str) -> tuple[str, Callable[[], Tensor]]:
        pick, bits = self.random.choice, {"8": 8, "4": 4}.get(kind[-1])
        heads, kv_heads, d = pick([2, 4, 8]), pick([1, 2]), pick([2, 10, 16, 34, 64, 80])
        shape = BlockShape(
            hidden=pick([37, 72, 96, 130]), heads=heads, kv_heads=kv_heads, head_dim=d, inner=pick([23, 100, 257]),
            activation=pick(list(ACTIVATIONS)), scale=0.2, softcap=pick([None, 5.0]),
            norms_after_rotary=pick([False, True]), is_parallel=pick([False, True]),
            rotary=pick(["halves", "pairs", "pairs_of_halves"]), **heads_in_order(heads, kv_heads, d),
        )  # fmt: skip
        batch, tokens = pick([(1, 1), (1, 5), (2, 1), (3, 2), (16, 1), (1, 16), (4, 8)])
        past, room = pick([0, 3, 255, 256, 300]), pick([0, 0, 5])
        first = pick([0, past // 2])
        length = past + tokens - first
        e, put, kind = shape.hidden, self.pages.put, pick(list(NORM_KINDS))

        def projection(n: int, k: int) -> Projection:
            if packs:
                return Projection(self._weight(n, k, packed_as if k % 32 == 0 else SCHEMES["packed8"]), self._bias(n))
            if self.random.random() < 0.2:
                return Projection(put(self._random(k, n) * 0.2, self.gap).T, self._bias(n))
            return Projection(put(self._random(n, k) * 0.2, self.gap), self._bias(n))

        packs, has_norms = self.random.random() < 0.3, self.random.random() < 0.5
        packed_as = SCHEMES[pick(list(SCHEMES))]
        q, kv = shape.heads * d, shape.kv_heads * d
        extra = {"attention_out_norm": e, "mlp_out_norm": e, "q_norm": d, "k_norm": d} if has_norms else {}
        extra |= {"input_norm": e, "mlp_norm": e}
        block = NativeBlock(shape, BlockWeights(
            projections=(projection(q, e), projection(kv, e), projection(kv, e)), o=projection(e, q),
            gate=pick([None, projection(shape.inner, e)]), up=projection(shape.inner, e),
            down=projection(e, shape.inner),
            slopes=None if shape.softcap else pick([None, put(self._random(heads).float())]),
            **{name: Norm(kind=kind, eps=1e-6, weight=put(self._random(size))) for name, size in extra.items()},
        ))  # fmt: skip
        hidden = put(self._random(batch, tokens, e))
        angles = torch.rand(pick([1, batch]), tokens, d // 2, generator=self.generator).mul(6).repeat(1, 1, 2)
        cos, sin = put(angles.cos().to(self.dtype)), put(angles.sin().to(self.dtype))
        states = [self._random(batch, shape.kv_heads, past + tokens + room, d) for _ in range(2)]
        keys, values = (self._rows(x, bits, is_key) for x, is_key in zip(states, (True, False)))
        originals = keys.clone(), values.clone()
        mask = self._mask(pick([1, batch]), 1, tokens, length)
        if mask is not None and pick([True, False]):
            mask = put(
                torch.zeros(mask.shape, dtype=self.dtype).masked_fill(~mask, torch.finfo(self.dtype).min), self.gap
            )
        pasts = put(torch.randint(first, past + 1, (batch,), generator=self.generator)) if pick([True, False]) else None

        def run() -> Tensor:
            keys.copy_(originals[0])
            values.copy_(originals[1])
            return block(hidden, cos, sin, keys, values, past, first, mask, pasts, bits)

        rows = None if pasts is None else pasts.tolist()
        return f"{batch} x {tokens} at {past} from {first}, rows at {rows}, mask {mask is not None}, {shape}", run


KINDS = [
    "linear", "transposed", "group", *SCHEMES, "attend", "attend8", "attend4", "encode8", "encode4",
    "block", "block8", "block4",
]  # fmt: skip
