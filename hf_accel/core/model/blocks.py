"""A decoder layer, part by part, from the style of its architecture and the layer itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import nn
from transformers import PreTrainedModel

from hf_accel.core.model.architectures import ACTIVATIONS, STYLES, Style
from hf_accel.kernels.weights import PackedProduct


@dataclass(frozen=True)
class LinearSlice:
    """A projection: rows [start, stop) of the product `module`, the child `name` of `parent`."""

    parent: nn.Module
    name: str
    start: int
    stop: int

    @property
    def module(self) -> nn.Module:
        return self.parent._modules[self.name]  # type: ignore[return-value]


@dataclass(frozen=True)
class DecoderBlock:
    """One pre-norm gated decoder layer, part by part.

    feed_forward: the module that follows attention where it is not gate, up and down, which are None then.
    """

    layer: nn.Module
    attention: nn.Module
    index: int
    q: LinearSlice
    k: LinearSlice
    v: LinearSlice
    o: LinearSlice
    gate: LinearSlice | None
    up: LinearSlice | None
    down: LinearSlice | None
    feed_forward: nn.Module | None
    input_norm: nn.Module
    mlp_norm: nn.Module
    attention_out_norm: nn.Module | None
    mlp_out_norm: nn.Module | None
    q_norm: nn.Module | None
    k_norm: nn.Module | None
    heads: int
    kv_heads: int
    head_dim: int
    activation: str
    norm_eps: float
    norm_style: Literal["llama", "gemma"]
    scale: float
    softcap: float | None
    norms_rows: bool
    residual_scale: float

    @property
    def modules(self) -> list[nn.Module]:
        """Every module inside the layer that computes something; not the layer itself, nor `feed_forward`."""
        others = set() if self.feed_forward is None else set(self.feed_forward.modules())
        return [module for module in self.layer.modules() if module is not self.layer and module not in others]


def described_blocks(model: PreTrainedModel) -> tuple[list[DecoderBlock], tuple[str, ...], str]:
    """Return the layers that are as described, sentences on those that are not, and why there is none at all."""
    config = model.config.get_text_config(decoder=True)
    style = STYLES.get(config.model_type)
    if style is None:
        return [], (), f"there is no description of a {config.model_type} decoder layer, so its layers run as they are"
    layers = [module for module in model.modules() if type(module).__name__ == style.layer_class]
    found, odd = [], []
    for index, layer in enumerate(layers):
        try:
            found.append(_block(layer, index, style, config))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            odd.append(f"layer {index} runs as it is: it is not as a {style.layer_class} is described ({error})")
    if not layers:
        return [], (), f"there is no {style.layer_class} in this model"
    if not found:
        return [], (), f"no {style.layer_class} of this model is as described, so they run as they are: {odd[0]}"
    return found, tuple(odd), ""


def _block(layer: nn.Module, index: int, style: Style, config: Any) -> DecoderBlock:
    parts, attention, mlp = layer._modules, layer.get_submodule("self_attn"), layer.get_submodule(style.feed_forward)
    head_dim = int(attention.head_dim)  # type: ignore[arg-type]
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    if attention.layer_idx != index:
        raise ValueError(f"layer {index} calls itself {attention.layer_idx}")
    if attention.is_causal is not True:
        raise ValueError("its attention is not causal")
    if getattr(config, "clip_qkv", None) is not None:
        raise ValueError("it clips queries, keys and values")
    q_rows, kv_rows, inner = heads * head_dim, kv_heads * head_dim, config.intermediate_size

    def rows(parent: nn.Module, name: str, start: int, stop: int) -> LinearSlice:
        if type(parent._modules[name]) is not nn.Linear and not isinstance(parent._modules[name], PackedProduct):
            kind = type(parent._modules[name])
            raise TypeError(f"{name} is a {kind.__module__}.{kind.__qualname__}, not a plain nn.Linear")
        return LinearSlice(parent, name, start, stop)

    if style.fused_qkv:
        bounds = (0, q_rows, q_rows + kv_rows, q_rows + 2 * kv_rows)
        q, k, v = (rows(attention, "qkv_proj", a, b) for a, b in zip(bounds, bounds[1:], strict=False))
    else:
        q = rows(attention, "q_proj", 0, q_rows)
        k, v = (rows(attention, name, 0, kv_rows) for name in ("k_proj", "v_proj"))
    gate = up = down = None
    is_mixture = style.mixture and "gate_proj" not in mlp._modules
    if style.fused_gate_up:
        gate, up = rows(mlp, "gate_up_proj", 0, inner), rows(mlp, "gate_up_proj", inner, 2 * inner)
    elif not is_mixture:
        gate, up = rows(mlp, "gate_proj", 0, inner), rows(mlp, "up_proj", 0, inner)
    if not is_mixture:
        down = rows(mlp, "down_proj", 0, config.hidden_size)
    sandwich = style.sandwich_norms
    norms: dict[str, Any] = {
        "input_norm": layer.get_submodule("input_layernorm"),
        "mlp_norm": layer.get_submodule("pre_feedforward_layernorm" if sandwich else "post_attention_layernorm"),
        "attention_out_norm": parts["post_attention_layernorm"] if sandwich else None,
        "mlp_out_norm": parts["post_feedforward_layernorm"] if sandwich else None,
        "q_norm": attention._modules["q_norm"] if style.qk_norm else None,
        "k_norm": attention._modules["k_norm"] if style.qk_norm else None,
    }
    epsilons = {_number(getattr(norm, style.norm_eps)) for norm in norms.values() if norm is not None}
    if len(epsilons) > 1:
        raise ValueError("its norms have different epsilons")
    softcap: Any = attention.attn_logit_softcapping if style.softcap else None
    return DecoderBlock(
        layer=layer,
        attention=attention,
        index=index,
        q=q,
        k=k,
        v=v,
        o=rows(attention, "o_proj", 0, config.hidden_size),
        gate=gate,
        up=up,
        down=down,
        feed_forward=mlp if is_mixture else None,
        **norms,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        activation=ACTIVATIONS[getattr(config, style.activation)],
        norm_eps=epsilons.pop(),
        norm_style=style.norm_style,
        scale=_number(attention.scaling),
        softcap=None if softcap is None else _number(softcap),
        norms_rows=style.qk_norm == "row",
        residual_scale=_number(getattr(layer, style.residual_scale)) if style.residual_scale else 1.0,
    )


def _number(value: Any) -> float:
    if not isinstance(value, (int, float)):  # a tensor could change in place
        raise TypeError(f"{value!r} is not a number")
    return float(value)
