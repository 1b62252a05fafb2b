"""What a decoder layer consists of for a native call, sizes and tensors. No field names a model."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal

from torch import Tensor

from hf_accel.kernels.weights import PackedWeight

ACTIVATIONS = {"silu": 0, "gelu_tanh": 1, "gelu": 2, "relu": 3, "relu2": 4, "quick_gelu": 5}
NORM_KINDS = {"rms": 1, "rms_unit": 2, "rms_once": 3, "layer": 4, "layer_unit": 5}
NORM_EXTENTS = {"head": 0, "heads": 1, "row": 2}
ROTARIES = {"none": 0, "halves": 1, "pairs": 2, "pairs_of_halves": 3}
PARTS = {"layer": 0, "half": 1, "attention": 2}
MAX_PROJECTIONS = 4


@dataclass(frozen=True)
class Projection:
    """One linear map: weight [N, K], possibly a slice of rows of a fused or packed weight; bias [N] or None.

    A dense weight may lie transposed, as a view with strides (1, N or more) of a weight [K, N] (GPT-2's Conv1D).
    """

    weight: Tensor | PackedWeight
    bias: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Norm:
    """One norm; without a weight it multiplies by 1, and only those that subtract a mean may have a bias.

    kind "rms" multiplies the rounded x / rms by the weight (Llama). The others round once: "rms_unit" multiplies by
    1 + weight (Gemma), "rms_once" by the weight (OLMo2), "layer" subtracts the mean, multiplies by the weight and adds
    the bias (`nn.LayerNorm`), "layer_unit" so with 1 + weight, rounded (Nemotron).
    """

    kind: str
    eps: float
    weight: Tensor | None = None
    bias: Tensor | None = None


@dataclass(frozen=True)
class Heads:
    """Where heads lie in a projected row: head h = g * group + i begins at start + g * stride + i * step.

    There are kv_heads groups; a group has heads / kv_heads heads of q and of the gate, and one of k and of v.
    """

    start: int
    stride: int
    step: int


def heads_in_order(heads: int, kv_heads: int, head_dim: int) -> dict[str, Any]:
    """Return where q, k and v lie, as keywords of a BlockShape, if they follow one another, each with all its heads."""
    group = heads // kv_heads
    return {
        "q": Heads(0, group * head_dim, head_dim),
        "k": Heads(heads * head_dim, head_dim, head_dim),
        "v": Heads((heads + kv_heads) * head_dim, head_dim, head_dim),
    }


@dataclass(frozen=True, kw_only=True)
class BlockShape:
    """Sizes and constants of a layer: E, H, G, D and the inner size of the feed-forward part.

    activation: one of ACTIVATIONS; relu2 is relu(x)^2, quick_gelu x * sigmoid(1.702 x).
    scale, softcap: scores are multiplied by `scale`; `softcap` (None: off) then maps them to cap * tanh(score / cap).
    residual_scale: what a part of the layer gives is multiplied by it before it joins the residual; out_scale: the
        layer's result is.
    q, k, v, gate: where heads lie in the projected row. k and v None: keys and values of the call's tokens lie in the
        buffers already. v may be where k is: values are then what keys are before their norm and rotary. gate: what
        attention gives is multiplied by the sigmoid of it.
    is_parallel: the feed-forward part reads mlp_norm of the layer's input or, without such a norm, what attention
        reads, and the result is input + (attention + feed-forward).
    norm_extent: q_norm, k_norm and v_norm are of each head, "head" with one weight [D], "heads" with a weight per head
        [H, D] or [G, D]; or "row", over all heads of a row.
    rotary: "halves" turns x[i] and x[i + R / 2] of a head by cos[i] and cos[i + R / 2] (Llama), "pairs" x[2 i] and
        x[2 i + 1] by cos[2 i] (GPT-J, Cohere), "pairs_of_halves" by cos[i] (GLM); "none". rotary_size is R, of the
        first columns of a head; None: as many as cos has. rotates_once: it is rounded once and not at every operation.
    part: "layer"; "half", which ends with the norm before the feed-forward part; or "attention", which is o's product
        alone, without a residual.
    """

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    activation: str
    scale: float
    q: Heads
    k: Heads | None
    v: Heads | None
    gate: Heads | None = None
    softcap: float | None = None
    residual_scale: float = 1.0
    out_scale: float = 1.0
    is_parallel: bool = False
    norm_extent: Literal["head", "heads", "row"] = "head"
    norms_after_rotary: bool = False
    rotary: Literal["halves", "pairs", "pairs_of_halves", "none"] = "halves"
    rotary_size: int | None = None
    rotates_once: bool = False
    part: Literal["layer", "half", "attention"] = "layer"


@dataclass(frozen=True, kw_only=True)
class BlockWeights:
    """Tensors of a layer, all of one dtype on the CPU but sinks and slopes.

    projections: 1 to 4 products that read one input; their rows, one after the other, are the projected row. Without
    gate, `up` and `down` make a feed-forward part that is not gated. Without input_norm (mlp_norm) the part reads the
    residual as it is. Norms weigh [E]; q_norm, k_norm, v_norm as the shape's norm_extent says.
    sinks: [H], fp32 or of the dtype, a further score in each softmax that has no value. slopes: fp32 [H], times the
    column of a key, added to scores (ALiBi).
    """

    projections: tuple[Projection, ...]
    o: Projection
    up: Projection | None = None
    down: Projection | None = None
    gate: Projection | None = None
    input_norm: Norm | None = None
    mlp_norm: Norm | None = None
    attention_out_norm: Norm | None = None
    mlp_out_norm: Norm | None = None
    q_norm: Norm | None = None
    k_norm: Norm | None = None
    v_norm: Norm | None = None
    sinks: Tensor | None = None
    slopes: Tensor | None = None

    @property
    def products(self) -> dict[str, Projection]:
        """Every product by its name."""
        found = {f"projections[{i}]": projection for i, projection in enumerate(self.projections)}
        return found | {field.name: value for field in fields(self)
                        if isinstance(value := getattr(self, field.name), Projection)}  # fmt: skip

    @property
    def norms(self) -> dict[str, Norm]:
        """Every norm by its name."""
        return {field.name: value for field in fields(self) if isinstance(value := getattr(self, field.name), Norm)}

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by its name; of a packed weight its codes."""
        found: dict[str, Tensor | None] = {"sinks": self.sinks, "slopes": self.slopes}
        for name, product in self.products.items():
            weight = product.weight
            found |= {f"{name}.weight": weight if isinstance(weight, Tensor) else weight.codes}
            found |= {f"{name}.bias": product.bias}
        for name, norm in self.norms.items():
            found |= {f"{name}.weight": norm.weight, f"{name}.bias": norm.bias}
        return {name: tensor for name, tensor in found.items() if tensor is not None}
