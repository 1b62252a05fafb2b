"""A quantizer for transformers' own loading: `from_pretrained(name, quantization_config=WeightOnlyConfig(bits=4))`.

transformers builds the empty model, renames, joins and splits what the files hold, and hands over one tensor after the
other. Each weight that the config names is rounded and packed as it arrives, and then given up. Packed modules take
their places when all have arrived, by the patcher that puts them into a model in memory, so the result is the same bit
for bit. Weights that are tied to others are rounded then, too: what they share stays in memory anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer

from hf_accel.core.calls.hosting import Host
from hf_accel.core.journal import Journal
from hf_accel.core.model.anatomy import Anatomy
from hf_accel.core.steps.applying import new_report
from hf_accel.core.steps.patcher import Change
from hf_accel.core.steps.plan import Plan
from hf_accel.core.steps.setting import Setting
from hf_accel.errors import CheckpointError, ConfigError, HfAccelError, UnsupportedModelError
from hf_accel.kernels.weights import PackedWeight
from hf_accel.ops.affine import Scheme
from hf_accel.quantization.config import WeightOnlyConfig
from hf_accel.quantization.modules.experts import PRODUCTS, QuantizedExperts, bias_of, gate_first, ordered
from hf_accel.quantization.modules.linear import QuantizedLinear
from hf_accel.quantization.patcher import WeightOnlyPatcher, scale_dtype
from hf_accel.quantization.reading.pages import MappedFiles
from hf_accel.quantization.rounding import METHODS
from hf_accel.quantization.targets import Target, targets

METHOD = WeightOnlyConfig.quant_method


class Reading:
    """A config on its way through transformers, for who wants to hear of each tensor and of the result.

    change: what was done to the model, once it is complete; error: what was found wrong.
    """

    quant_method = METHOD

    def __init__(self, config: WeightOnlyConfig, advance: Callable[[], None]) -> None:
        self.config, self.advance = config, advance
        self.change: Change | None = None
        self.error: HfAccelError | None = None

    def to_dict(self) -> dict[str, Any]:
        return self.config.to_dict()

    def __deepcopy__(self, memo: Any) -> Reading:
        return self  # transformers copies the configs of models that it loads


class ReadingQuantizer(HfQuantizer):
    """Rounds what one model is loaded from.

    Raises:
        ConfigError: the config does not say how weights are rounded to nearest, or devices are several.
        UnsupportedModelError: the model cannot be rounded so, or a weight is not a number.
        CheckpointError: a weight is missing or has another shape.
    """

    requires_calibration = False

    def __init__(self, quantization_config: Any, **options: Any) -> None:
        super().__init__(quantization_config, **options)
        self.reading = quantization_config
        if not isinstance(quantization_config, Reading):
            self.reading = Reading(quantization_config, lambda: None)
        config = self.reading.config
        if type(config) is not WeightOnlyConfig:
            raise ConfigError(
                f"Weights are rounded while they are read by WeightOnlyConfig; a {type(config).__name__} was given. "
                "Load the model as it is, and call hf_accel.optimize(model, config)."
            )
        self.patcher = WeightOnlyPatcher(config)
        self.dtype = torch.get_default_dtype()
        self.files = MappedFiles(())
        self.shapes: dict[str, torch.Size] = {}  # of all that the model holds
        self.places: dict[str, tuple[Target, str]] = {}  # name in the model of what is awaited -> where it belongs
        self.packed: dict[str, list[PackedWeight]] = {}  # the same name -> what was made of it; experts are several

    @property
    def is_trainable(self) -> bool:
        return True

    def is_serializable(self) -> bool:
        return True

    def validate_environment(self, *args: Any, device_map: Any = None, **options: Any) -> None:
        """Refuse several devices, and parts of the model on the disk."""
        if isinstance(device_map, dict) and (len(set(device_map.values())) > 1 or "disk" in device_map.values()):
            raise ConfigError(
                "A model is read in few bits onto one device; a device_map with several was given. Name one, as "
                'device_map="cpu".'
            )

    def _process_model_before_weight_loading(self, model: Any, checkpoint_files: Any = None, **options: Any) -> None:
        self.files = MappedFiles(checkpoint_files or ())
        self.dtype = dtype = model.config.dtype
        self.shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        anatomy = Anatomy(model, torch.device("cpu"), dtype)
        if misfits := self.patcher.misfits(anatomy):
            listed = "\n  - ".join(misfits)
            raise UnsupportedModelError(f"This {type(model).__name__} cannot be read in few bits:\n  - {listed}")
        tied: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
        for target in targets(anatomy, self.patcher.config)[0]:
            parts = ("weight",) if target.layout is None else PRODUCTS
            names = {f"{target.path}.{part}": part for part in parts}
            is_shared = any(name in tied or name in tied.values() for name in names)
            if not is_shared and all(getattr(target.module, part).dtype is dtype for part in parts):
                self.places |= {name: (target, part) for name, part in names.items()}

    def param_needs_quantization(self, model: Any, param_name: str, **options: Any) -> bool:
        """Return whether a tensor is shown here: all of the model's dtype are, for one may become several."""
        return model.get_parameter_or_buffer(param_name).dtype is self.dtype

    def get_quantize_ops(self) -> ConversionOps:
        return _Rounding(self)

    def take(self, name: str, tensor: Tensor) -> None:
        """Round and pack the weight called `name`; the first that is found wrong is told when all have been read."""
        target, part = self.places[name]
        wanted = getattr(target.module, part)
        wanted._is_hf_initialized = True  # nothing is to be filled in: it stays without memory until it is replaced
        if self.reading.error is not None:
            return
        if tensor.shape != wanted.shape:
            self.reading.error = _misshapen(name, tensor.shape, wanted.shape)
            return
        try:
            self.packed[name] = self._rounded(target, part, tensor)
            self.files.give_back(tensor)
        except ValueError:  # of all that could be wrong with it, the rest was asked before
            self.reading.error = UnsupportedModelError(f"The weight {name} of the files holds NaN or infinity.")

    def _rounded(self, target: Target, part: str, tensor: Tensor) -> list[PackedWeight]:
        if target.scheme is not None:
            weight = tensor if isinstance(target.module, nn.Linear) else tensor.T
            return [self._pack(weight, target.scheme)]
        layout: Any = target.layout
        schemes = [
            scheme
            for path, _, scheme, _ in target.products(self.patcher.config)
            if path.startswith(f"{target.path}.{part}.")
        ]
        rows = tensor.mT if layout.transposed else tensor
        codes = (METHODS["nearest"](weight, scheme, None, scale_dtype(scheme, self.dtype))
                 for weight, scheme in zip(rows, schemes, strict=True))  # fmt: skip
        return [PackedWeight.pack(ordered(found, None, layout, part)[0]) for found in codes]

    def _pack(self, weight: Tensor, scheme: Scheme) -> PackedWeight:
        return PackedWeight.pack(METHODS["nearest"](weight, scheme, None, scale_dtype(scheme, self.dtype)))

    def postprocess_model(self, model: Any, **options: Any) -> None:
        """Put the packed modules in their places, or raise what was found wrong."""
        if self.reading.error is not None:
            raise self.reading.error
        if absent := [name for name in self.places if name not in self.packed]:
            raise CheckpointError(
                f"The files lack the tensor {absent[0]} of a {type(model).__name__}; the checkpoint is not complete. "
                "Save or download it anew."
            )
        for name, tensor in model.state_dict().items():  # transformers compares no shapes where there is a quantizer
            if tensor.shape != self.shapes.get(name):
                raise _misshapen(name, tensor.shape, self.shapes.get(name, ()))
        for name in ("is_quantized", "quantization_method"):
            vars(model).pop(name, None)
        vars(model.config).pop("quantization_config", None)
        device = next(tensor.device for tensor in model.parameters() if not tensor.is_meta)
        setting = Setting(Anatomy(model, device, self.dtype), originals="drop", progress=self.reading.advance)
        setting.keep_prepared()
        for target in {id(target): target for target, _ in self.places.values()}.values():
            self.patcher.prepare(target, self._module(target), setting)
        self.reading.change = self.patcher.patch(setting, Host(Journal("drop"), new_report(Plan(), setting)))

    def _module(self, target: Target) -> nn.Module:
        """Return the module that stands for what arrived of a target, with the biases that the model has by now."""
        original: Any = target.module
        if target.scheme is not None:
            return QuantizedLinear(self.packed.pop(f"{target.path}.weight")[0], original.bias, self.dtype)
        layout: Any = target.layout

        def product(name: str, index: int, packed: PackedWeight) -> QuantizedLinear:
            bias = bias_of(original, layout, name, index)
            return QuantizedLinear(packed, None if bias is None else gate_first(bias, layout, name).clone(), self.dtype)

        gate_up, down = (
            [product(name, index, packed) for index, packed in enumerate(self.packed.pop(f"{target.path}.{name}"))]
            for name in PRODUCTS
        )
        return QuantizedExperts(gate_up, down, original)


def _misshapen(name: str, found: Iterable[int], wanted: Iterable[int]) -> CheckpointError:
    return CheckpointError(
        f"The tensor {name} of the files has the shape {tuple(found)}; the model's config asks for {tuple(wanted)}. "
        "Save or download the checkpoint anew."
    )


class _Rounding(ConversionOps):
    """The last operation on every tensor: what is awaited is taken, everything else goes on into the model."""

    def __init__(self, quantizer: ReadingQuantizer) -> None:
        self.quantizer = quantizer

    def convert(self, input_dict: dict[str, Any], *given: Any, missing_keys: Any = None, **options: Any) -> Any:
        rest = {}
        for name, value in input_dict.items():
            if name not in self.quantizer.places:
                rest[name] = value
                continue
            self.quantizer.take(name, value[0] if isinstance(value, list) else value)
            if missing_keys is not None:
                missing_keys.discard(name)
        self.quantizer.reading.advance()
        return rest


if METHOD not in auto.AUTO_QUANTIZER_MAPPING:
    auto.register_quantizer(METHOD)(ReadingQuantizer)
