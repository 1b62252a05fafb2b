"""GGUF files as a source of `hf_accel.load`."""

from __future__ import annotations

from dataclasses import dataclass

from hf_accel.core.calls.report import Applied
from hf_accel.core.config import Config
from hf_accel.core.steps.patcher import Fidelity
from hf_accel.errors import ConfigError
from hf_accel.quantization.gguf.loading import load_gguf
from hf_accel.quantization.gguf.reader import GgufFile
from hf_accel.quantization.reading.sources import Loaded, Request

_SUFFIX = ".gguf"


@dataclass(frozen=True, kw_only=True)
class GgufTensors(Config):
    """Weights of a GGUF file on our kernels; stands in the report of a model that was read from one.

    file: the file's name.
    """

    file: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.file, str):
            raise ConfigError(f"GgufTensors.file is {self.file!r}; it takes the name of a file.")


class Gguf:
    """A GGUF file on this machine."""

    def claims(self, name: str) -> bool:
        return name.endswith(_SUFFIX)

    def read(self, request: Request) -> Loaded:
        """Return the model; see `Source.read`."""
        if request.cache:
            raise ConfigError(
                "cache=True keeps what was packed; a GGUF file is packed and mapped as it is. Leave it out."
            )
        file = GgufFile(request.name)
        file_bytes = sum(entry.nbytes for entry in file.tensors.values())
        budget = request.memory_budget_bytes
        if budget is not None and file_bytes > budget:
            raise ConfigError(
                f"{request.name} holds {file_bytes} bytes of weights, more than memory_budget_bytes={budget}; they "
                f"keep the "
                "bits that they have. Take a file of fewer bits."
            )
        found = load_gguf(file, request.dtype, request.config, request.advance)
        entries = [
            Applied(
                GgufTensors(file=request.name),
                str(found),
                0,
                (Fidelity.CLOSE if found.is_close else Fidelity.LOSSY).value,
            )
        ]
        if request.config is not None and found.rounded:
            summary = f"{found.rounded} dense products of the file rounded as they were read"
            entries.append(Applied(request.config, summary, 0, Fidelity.LOSSY.value))
        return Loaded(found.model, tuple(entries), weight_bytes=file_bytes)
