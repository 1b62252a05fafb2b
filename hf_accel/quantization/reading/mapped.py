"""What a model with packed weights is made of, as data and tensors, and the same model again on mapped tensors.

Its config is that of the folder; the data say which modules are packed, in which scheme, and whether what the config
ties was untied. Cost: the model's empty skeleton.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from torch import Tensor, nn

from hf_accel.core.journal import Journal
from hf_accel.errors import CheckpointError
from hf_accel.kernels.weights import PackedWeight
from hf_accel.ops.affine import Scheme
from hf_accel.quantization.files.inventory import OWN_TENSORS
from hf_accel.quantization.files.rebuilding import skeleton
from hf_accel.quantization.files.seal import Seal
from hf_accel.quantization.modules.embedding import QuantizedEmbedding
from hf_accel.quantization.modules.experts import PRODUCTS, QuantizedExperts
from hf_accel.quantization.modules.linear import QuantizedLinear
from hf_accel.quantization.patcher import untie
from hf_accel.quantization.reading.pack import Pack


def described(model: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return what `rebuilt` needs of a model that was read in few bits: JSON values, and its tensors by name."""
    packed: dict[str, Any] = {}
    experts: dict[str, int] = {}
    for path, module in model.named_modules():
        if isinstance(module, (QuantizedLinear, QuantizedEmbedding)):
            weight = module.packed
            packed[path] = [weight.rows, weight.columns, asdict(weight.scheme)]
        elif isinstance(module, QuantizedExperts):
            experts[path] = module.num_experts
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    is_tied = bool(getattr(model.config.get_text_config(), "tie_word_embeddings", False))
    return {"packed": packed, "experts": experts, "is_tied": is_tied, "frozen": frozen}, _tensors(model)


def rebuilt(config: Any, about: dict[str, Any], pack: Pack) -> Any:
    """Return a model of this config whose tensors are those of the pack, in evaluation mode.

    Raises:
        CheckpointError: the pack is of another model.
    """
    model = skeleton(config, config.dtype)
    modules = dict(model.named_modules())
    inner = {
        f"{path}.{part}.{i}" for path, count in about["experts"].items() for part in PRODUCTS for i in range(count)
    }
    made: dict[str, Any] = {}
    for path, (rows, columns, scheme) in about["packed"].items():
        offsets = pack.tensor(f"{path}.offsets") if f"{path}.offsets" in pack.names else None
        tensors = pack.tensor(f"{path}.codes"), pack.tensor(f"{path}.scales"), offsets
        weight = PackedWeight(Scheme(**scheme), rows, columns, *tensors)
        original = modules.get(path)
        if original is None and path not in inner:
            raise CheckpointError(f"{pack.path} packs {path}, which the model of config.json does not have. Delete it.")
        if isinstance(original, nn.Embedding):
            made[path] = QuantizedEmbedding(weight, original)
        else:
            bias = pack.tensor(f"{path}.bias") if f"{path}.bias" in pack.names else None
            made[path] = QuantizedLinear(weight, bias, config.dtype)
    for path, module in made.items():
        if path not in inner:
            _put(model, path, module)
    for path, count in about["experts"].items():
        gate_up, down = ([made[f"{path}.{part}.{index}"] for index in range(count)] for part in PRODUCTS)
        _put(model, path, QuantizedExperts(gate_up, down, modules[path]))
    if not about["is_tied"]:
        untie(model, Journal())
    _fill(model, pack, made, set(about["frozen"]))
    model.hf_quantizer = Seal()
    return model.eval()


def _put(model: Any, path: str, module: nn.Module) -> None:
    parent, _, leaf = path.rpartition(".")
    model.get_submodule(parent)._modules[leaf] = module


def _fill(model: Any, pack: Pack, made: dict[str, Any], frozen: set[str]) -> None:
    """Put every tensor that is not packed in its place: what models compute when they are built, too."""
    own = {f"{path}.{tensor}" for path in made for tensor in (*OWN_TENSORS, "bias")}
    for name in _tensors(model).keys() - own:
        owner, _, leaf = name.rpartition(".")
        module, value = model.get_submodule(owner), pack.tensor(name)
        if leaf in module._parameters:
            module._parameters[leaf] = nn.Parameter(value, requires_grad=name not in frozen)
        else:
            module._buffers[leaf] = value
    model.tie_weights()


def _tensors(model: Any) -> dict[str, Tensor]:
    """Return name -> parameter or buffer; tied ones by each of their names."""
    return dict([*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)])
