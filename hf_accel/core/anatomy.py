"""The anatomy of a model: where its parts are. The only file that knows architectures.

A decoder layer is described only for the architectures in `STYLES`; patchers check by running that a description
holds, so a table entry that a new transformers release makes wrong costs speed, never correctness.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_accel.core.contracts import PackedProduct
from hf_accel.core.support import check_supported, unwrap

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu": "gelu",
    "relu": "relu",
}


@dataclass(frozen=True)
class Style:
    """How one architecture spells a pre-norm gated decoder layer."""

    layer_class: str
    norm_style: Literal["llama", "gemma"] = "llama"
    norm_eps: str = "variance_epsilon"
    fused_qkv: bool = False
    fused_gate_up: bool = False
    qk_norm: bool = False
    sandwich_norms: bool = False
    softcap: bool = False
    activation: str = "hidden_act"


STYLES = {
    "llama": Style("LlamaDecoderLayer"),
    "mistral": Style("MistralDecoderLayer"),
    "qwen2": Style("Qwen2DecoderLayer"),
    "qwen3": Style("Qwen3DecoderLayer", qk_norm=True),
    "phi3": Style("Phi3DecoderLayer", fused_qkv=True, fused_gate_up=True),
    "gemma2": Style(
        "Gemma2DecoderLayer",
        norm_style="gemma",
        norm_eps="eps",
        sandwich_norms=True,
        softcap=True,
        activation="hidden_activation",
    ),
    "gemma3_text": Style(
        "Gemma3DecoderLayer",
        norm_style="gemma",
        norm_eps="eps",
        qk_norm=True,
        sandwich_norms=True,
        activation="hidden_activation",
    ),
}


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
    """One pre-norm gated decoder layer, part by part."""

    layer: nn.Module
    attention: nn.Module
    index: int
    q: LinearSlice
    k: LinearSlice
    v: LinearSlice
    o: LinearSlice
    gate: LinearSlice
    up: LinearSlice
    down: LinearSlice
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

    @property
    def modules(self) -> list[nn.Module]:
        """Every module inside the layer that computes something, the layer itself excluded."""
        return [module for module in self.layer.modules() if module is not self.layer]


@dataclass(frozen=True)
class Siblings:
    """Projections of one parent that read the same input: q/k/v, or gate/up."""

    parent: nn.Module
    names: tuple[str, ...]


SIBLING_NAMES = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


@dataclass
class Anatomy:
    """A causal language model as the patchers see it."""

    PRODUCTS: ClassVar[tuple[type, ...]] = (nn.Linear, Conv1D)  # exactly these; subclasses compute something else

    model: Any  # a PreTrainedModel; its methods are typed too loosely to be checked
    device: torch.device
    dtype: torch.dtype
    blocks: list[DecoderBlock] = field(default_factory=list)
    blocks_missing: str = ""  # why none is described
    odd_layers: tuple[str, ...] = ()  # sentences on layers that are not as described, beside those that are
    # what was made of a weight, or found out about a layer, once, while steps are applied again and again to be timed;
    # by the weight, which copies of the model share; None: nothing is kept
    prepared: WeakIdKeyDictionary | None = None

    draft_model: Any = None  # a smaller model with the same tokenizer, if the user has one
    progress: Callable[[], None] | None = None  # called after each part of a step that takes long

    @staticmethod
    def of(model: Any) -> Anatomy:
        """Describe `model`, looking through PEFT wrappers and pipelines.

        Raises:
            UnsupportedModelError: it cannot generate text token by token, is split over devices or not in memory.
        """
        unwrapped = unwrap(model)
        check_supported(unwrapped)
        parameter = next(unwrapped.parameters())
        anatomy = Anatomy(unwrapped, parameter.device, unwrapped.dtype)
        anatomy.blocks, anatomy.odd_layers, anatomy.blocks_missing = _blocks(unwrapped)
        return anatomy

    def keep_prepared(self) -> None:
        """Keep from now on what steps make of weights and find out about layers."""
        self.prepared = WeakIdKeyDictionary()

    def prepared_for(self, module: nn.Module) -> dict[Any, Any]:
        """Return what is kept for a module, by its first weight; a dictionary of no use where nothing is kept."""
        weight = next(module.parameters(), None)
        if self.prepared is None or weight is None:
            return {}
        found: dict[Any, Any] = self.prepared.setdefault(weight, {})
        return found

    @property
    def weight_bytes(self) -> int:
        """Bytes of all parameters and packed weights, tied ones counted once."""
        return self._bytes(self.model.modules())

    @property
    def read_bytes(self) -> int:
        """Bytes of weights that a token reads: all but a table of embeddings that is not the head's weight, too."""
        table, head = self.model.get_input_embeddings(), self.model.get_output_embeddings()
        total = self._bytes(self.model.modules())
        own = self._bytes([table])
        both = self._bytes([table, head]) if head is not None else 0
        is_tied = head is not None and both < own + self._bytes([head])
        return total if is_tied or head is None else total - own

    @staticmethod
    def _bytes(modules: Any) -> int:
        tensors: dict[int, torch.Tensor] = {}
        for module in modules:
            found = [p for p in module._parameters.values() if p is not None]
            if isinstance(module, PackedProduct) and isinstance(module, nn.Module):
                found += [b for b in module._buffers.values() if b is not None]
            tensors |= {id(tensor): tensor for tensor in found}
        return sum(t.numel() * t.element_size() for t in tensors.values())

    @property
    def architecture(self) -> str:
        return str(self.model.config.model_type)

    def products(self) -> list[nn.Module]:
        """Modules that are exactly `nn.Linear` or GPT-2's `Conv1D`."""
        return [module for module in self.model.modules() if type(module) in self.PRODUCTS]

    def siblings(self) -> list[Siblings]:
        """Groups of plain `nn.Linear` without adapters that read one input."""
        found = []
        for parent in self.model.modules():
            for names in SIBLING_NAMES:
                children = [parent._modules.get(name) for name in names]
                if all(type(child) is nn.Linear for child in children):
                    found.append(Siblings(parent, names))
        return found

    def stacked_experts(self) -> int:
        """How many modules hold the weights of several experts as one 3-D parameter."""
        return sum(map(holds_experts, self.model.modules()))


def holds_experts(module: nn.Module) -> bool:
    """Return whether `module` holds the weights of several experts in 3-D parameters, in whatever layout.

    Convolutions and tables of positions have three dimensions, too: a module of experts knows how many it has.
    """
    counts = {getattr(module, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts")}
    is_named = "expert" in type(module).__name__.lower()
    return any(p.dim() == 3 and (is_named or p.shape[0] in counts) for p in module.parameters(recurse=False))


def _blocks(model: PreTrainedModel) -> tuple[list[DecoderBlock], tuple[str, ...], str]:
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
    parts, attention, mlp = layer._modules, layer.get_submodule("self_attn"), layer.get_submodule("mlp")
    head_dim = int(attention.head_dim)  # type: ignore[arg-type]
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    if attention.layer_idx != index:
        raise ValueError(f"layer {index} calls itself {attention.layer_idx}")
    if attention.is_causal is not True:
        raise ValueError("its attention is not causal")
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
    if style.fused_gate_up:
        gate, up = rows(mlp, "gate_up_proj", 0, inner), rows(mlp, "gate_up_proj", inner, 2 * inner)
    else:
        gate, up = rows(mlp, "gate_proj", 0, inner), rows(mlp, "up_proj", 0, inner)
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
        down=rows(mlp, "down_proj", 0, config.hidden_size),
        **norms,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        activation=ACTIVATIONS[getattr(config, style.activation)],
        norm_eps=epsilons.pop(),
        norm_style=style.norm_style,
        scale=_number(attention.scaling),
        softcap=None if softcap is None else _number(softcap),
    )


def _number(value: Any) -> float:
    if not isinstance(value, (int, float)):  # a tensor could change in place
        raise TypeError(f"{value!r} is not a number")
    return float(value)
