"""A quantizer for transformers' loading: `from_pretrained(folder, gguf_file=..., quantization_config=GGUFConfig())`.

transformers takes a GGUF file to the quantizer that it calls "gguf", which expands it; that name is taken, and
exchanging what stands under it would change loads that never asked for us. So ours has a name of its own, which the
config says. The config of the model is transformers' reading of the file; where that is another than ours, the load is
refused.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer

from hf_accel.errors import ConfigError, UnsupportedModelError
from hf_accel.quantization.files.seal import Seal
from hf_accel.quantization.gguf.agreement import disagreement
from hf_accel.quantization.gguf.architectures import read_as, written_as
from hf_accel.quantization.gguf.loading import load_gguf, packed_modules, untie
from hf_accel.quantization.gguf.reader import GgufFile
from hf_accel.quantization.modules.linear import QuantizedLinear

METHOD = "hf_accel_gguf"
_Base: Any = getattr(transformers, "GgufConfig", None)


class GGUFConfig(_Base or object):  # type: ignore[misc]
    """Read the blocks of a GGUF file onto our kernels, in `from_pretrained(folder, gguf_file=...)`.

    Raises:
        ConfigError: the installed transformers has no configs for GGUF files; `hf_accel.load` needs none.
    """

    def __init__(self, **options: Any) -> None:
        if _Base is None:
            raise ConfigError(
                f"transformers {transformers.__version__} takes no config for GGUF files (5.24 does); "
                'hf_accel.load("x.gguf") does the same.'
            )
        super().__init__(**options)
        self.quant_method = METHOD


class GgufReadingQuantizer(HfQuantizer):
    """Puts packed modules in their places while transformers loads a GGUF file, and hands it what is dense.

    Raises:
        UnsupportedModelError: no row of the table says how the architecture is read, or transformers reads another
            config.
        CheckpointError: as `load_gguf`.
    """

    requires_calibration = False

    def __init__(self, quantization_config: Any, **options: Any) -> None:
        # transformers asks again whether a quantizer of GGUF files is one: by its own name for them
        super().__init__(_Base(gguf_file=quantization_config.gguf_file), **options)
        self.pre_quantized = True
        self.file: Any = None
        self.read: Any = None

    @property
    def is_trainable(self) -> bool:
        return True

    def is_serializable(self, *given: Any) -> bool:
        return True

    def read_header(self, gguf_file: str) -> None:
        """Take note of the file, if its architecture is known."""
        self.file = GgufFile(gguf_file)
        architecture = self.file.architecture
        if read_as(architecture) is None:
            raise UnsupportedModelError(
                f"No row of the table says how GGUF files of the architecture {architecture!r} are read. Leave "
                "quantization_config out: transformers expands the weights."
            )

    def update_dtype(self, dtype: torch.dtype | None) -> torch.dtype:
        """Read the file, and return the dtype of everything that is not packed; None: as `load_gguf`."""
        self.read = load_gguf(self.file, dtype).model  # here, where no device is in force that holds no values
        return self.read.dtype

    def _process_model_before_weight_loading(self, model: Any, **options: Any) -> None:
        row = written_as(self.read.config.model_type)
        reason = "it is of no known architecture" if row is None else disagreement(model.config, self.read.config, row)
        if reason:
            raise UnsupportedModelError(
                f"transformers reads {self.file.path} as another model than it is: {reason}. Load it by hf_accel.load."
            )
        for name, module in packed_modules(self.read).items():
            parent, _, leaf = name.rpartition(".")
            model.get_submodule(parent)._modules[leaf] = module
        if isinstance(self.read.get_output_embeddings(), QuantizedLinear):
            untie(model)

    def get_state_dict(self, checkpoint_file: str, model: Any) -> dict[str, Tensor]:
        """Return the tensors of the file by the model's names; those of packed modules are in place already."""
        return dict(self.read.state_dict())

    def param_needs_quantization(self, model: Any, param_name: str, **options: Any) -> bool:
        return False

    def postprocess_model(self, model: Any, **options: Any) -> None:
        """Leave the model as our own loading does."""
        for name in ("is_quantized", "quantization_method"):
            vars(model).pop(name, None)
        vars(model.config).pop("quantization_config", None)
        self.file = self.read = None
        model.hf_quantizer = Seal()


if _Base is not None and METHOD not in auto.AUTO_QUANTIZER_MAPPING:
    auto.register_quantizer(METHOD)(GgufReadingQuantizer)
