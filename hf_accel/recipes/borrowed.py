"""What a student must be; what is put back on it: modes, flags, data types, config; and that it shares nothing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hf_accel.core.calls.hosting import host_of
from hf_accel.core.steps.patcher import Patcher
from hf_accel.errors import ConfigError, ConflictError, UnsupportedModelError
from hf_accel.kernels.weights import PackedProduct

# transformers hooks a model for good when its hidden states are asked for first, and marks it
_RECORDING, _RECORDED = "transformers.utils.output_capturing", "_output_capturing_hooks_installed"


def check_models(student: Any, teacher: Any) -> None:
    """Find out whether `student` can be trained towards `teacher`.

    Raises:
        UnsupportedModelError: the student's weights cannot be trained.
        ConfigError: the two do not fit together.
        ConflictError: the student is optimised by a step under which weights are not trained.
    """
    if student is teacher:
        raise ConfigError("Student and teacher are the same object. Give the original model as the teacher.")
    for name, model in (("student", student), ("teacher", teacher)):
        if not isinstance(model, nn.Module) or not hasattr(model, "config"):
            raise UnsupportedModelError(f"The {name} is a transformers model; {type(model).__name__} was given.")
    host = host_of(student)
    if host is not None and not all(Patcher.for_config(step.config).is_trainable for step in host.report.applied):
        raise ConflictError("The student is optimised by hf_accel. Call hf_accel.restore(student) before.")
    packed = any(isinstance(module, PackedProduct) for module in student.modules())
    integers = any(not parameter.is_floating_point() for parameter in student.parameters())
    if packed or integers or getattr(student, "is_quantized", False):
        raise UnsupportedModelError(
            "The student's weights are quantized, and such weights cannot be trained. Uptrain the model in floating "
            "point and quantize it afterwards."
        )
    if any(parameter.is_meta for parameter in student.parameters()):
        raise UnsupportedModelError("The student's weights are on the meta device or offloaded. Load it completely.")
    if not any(parameter.requires_grad for parameter in student.parameters()):
        raise UnsupportedModelError("No parameter of the student has requires_grad; student.requires_grad_(True).")
    ours, theirs = (model.config.get_text_config(decoder=True) for model in (student, teacher))
    if ours.vocab_size != theirs.vocab_size:
        raise ConfigError(
            f"The student's vocabulary has {ours.vocab_size} tokens, the teacher's {theirs.vocab_size}. "
            "Distillation compares their next-token distributions, so both must be of one tokenizer."
        )


def check_hidden_states(student: Any, teacher: Any, weight: float | None, default: float) -> float:
    """Return the weight of the hidden-state loss; None: the default where hidden states can be compared, else 0.

    Raises:
        ConfigError: it was asked for, and layers or sizes differ.
    """
    configs = [model.config.get_text_config(decoder=True) for model in (student, teacher)]
    (layers, size), (other_layers, other_size) = [(each.num_hidden_layers, each.hidden_size) for each in configs]
    if (layers, size) == (other_layers, other_size):
        return default if weight is None else weight
    if weight:
        raise ConfigError(
            "hidden_weight compares hidden states layer by layer, and needs as many layers of the same size: the "
            f"student has {layers} of {size}, the teacher {other_layers} of {other_size}. Leave hidden_weight out."
        )
    return 0.0


def _address(tensor: Tensor) -> tuple[str, int]:
    return str(tensor.device), tensor.untyped_storage().data_ptr()


def own_tensors(student: nn.Module, teacher: nn.Module) -> int:
    """Give the student copies of parameters that change and whose memory is the teacher's; return the copies' bytes.

    Frozen ones change where the others have to be trained in single precision, see `Borrowed`. What is
    tied inside the student stays tied: one storage is copied once, and one Parameter replaced by one.

    Raises:
        UnsupportedModelError: both hold the very same module.
    """
    theirs = {_address(tensor) for tensor in [*teacher.parameters(), *teacher.buffers()] if tensor.numel()}
    objects = {id(parameter) for parameter in teacher.parameters()}
    every = trains_in_single_precision(student)
    modules = {id(module) for module in teacher.modules()}
    copies: dict[tuple[str, int], torch.UntypedStorage] = {}
    replaced: dict[int, nn.Parameter] = {}
    moved: set[int] = set()
    for path, module in student.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is None or _address(parameter) not in theirs or id(parameter) in moved:
                continue
            if not (every or parameter.requires_grad):
                continue
            if id(module) in modules:
                raise UnsupportedModelError(
                    f"Student and teacher hold the very same module {path!r}; to train one would change the other. "
                    "Give copy.deepcopy(student), or load the student anew."
                )
            if id(parameter) in replaced:
                module._parameters[name] = replaced[id(parameter)]
                continue
            at = _address(parameter)
            if at not in copies:
                copies[at] = parameter.untyped_storage().clone()
            own = torch.empty(0, dtype=parameter.dtype, device=parameter.device)
            own.set_(copies[at], parameter.storage_offset(), parameter.shape, parameter.stride())
            if id(parameter) in objects:
                new = replaced[id(parameter)] = nn.Parameter(own, parameter.requires_grad)
                module._parameters[name] = new
                moved.add(id(new))
            else:
                parameter.data = own
                moved.add(id(parameter))
    return sum(storage.nbytes() for storage in copies.values())


def trains_in_single_precision(model: nn.Module) -> bool:
    """Return whether weights that are trained have too few bits for their updates."""
    return any(tensor.requires_grad and tensor.dtype is not torch.float32 for tensor in model.parameters())


class Borrowed:
    """A context in which a model's modes, flags, gradients, data types and config may change; all are put back."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __enter__(self) -> Borrowed:
        self.modes = [(module, module.training) for module in self.model.modules()]
        self.flags = [(tensor, tensor.requires_grad, tensor.grad) for tensor in self.model.parameters()]
        for tensor in self.model.parameters():
            tensor.grad = None
        self.dtypes: list[tuple[nn.Parameter, torch.dtype]] = []
        config: Any = self.model.config
        self.config = dict(vars(config))
        self.attributes = set(vars(self.model))
        self.recorded = {module for module in self.model.modules() if _RECORDED in vars(module)}
        return self

    def in_single_precision(self) -> int:
        """Train fp32 copies where weights have fewer bits, as updates would be lost in rounding; return extra bytes."""
        extra = 0
        if trains_in_single_precision(self.model):
            for tensor in self.model.parameters():
                if tensor.dtype is not torch.float32:
                    extra += (4 - tensor.element_size()) * tensor.numel()
                    self.dtypes.append((tensor, tensor.dtype))
                    tensor.data = tensor.data.float()
        return extra

    def __exit__(self, *_: object) -> None:
        for tensor, dtype in self.dtypes:
            tensor.data = tensor.data.to(dtype)
        for tensor, flag, gradient in self.flags:
            tensor.requires_grad_(flag)
            tensor.grad = gradient
        for module, mode in self.modes:
            module.training = mode
        self._unhook()
        for name in set(vars(self.model)) - self.attributes:  # marks that accelerate and peft leave
            delattr(self.model, name)
        config: Any = vars(self.model.config)
        config.clear()
        config.update(self.config)

    def _unhook(self) -> None:
        """Take off the hooks by which transformers records hidden states, where it had not put them there before."""
        for module in self.model.modules():
            if _RECORDED in vars(module) and module not in self.recorded:
                delattr(module, _RECORDED)
                for part in module.modules():
                    for key in [
                        key
                        for key, hook in part._forward_hooks.items()
                        if getattr(hook, "__module__", "") == _RECORDING
                    ]:
                        del part._forward_hooks[key]
