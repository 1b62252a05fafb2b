"""How steps of decoding are compiled."""

from __future__ import annotations

from dataclasses import dataclass

from hf_accel.core.config import Config
from hf_accel.errors import ConfigError

MODES = ("graphs", "compile", "off")


@dataclass(frozen=True, kw_only=True)
class CompilationConfig(Config):
    """Steps of decoding over fixed buffers, captured once and replayed: no launch costs, no waiting for the host.

    mode: "graphs" captures steps as CUDA graphs; "compile" has torch.compile make kernels of the decoder layers first,
        and captures these on CUDA devices; elsewhere they are used where they are faster, timed when applied. "off"
        leaves steps as they are.
    folder: with "compile", where compiled kernels are kept for later processes; what is in it is run, so nobody else
        may write to it. None: where torch keeps them, in the temporary folder.
    """

    mode: str = "graphs"
    folder: str | None = None

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ConfigError(f"{type(self).__name__}.mode is one of {', '.join(MODES)}; {self.mode!r} was given.")
        if self.folder is not None and self.mode != "compile":
            raise ConfigError(f'{type(self).__name__}.folder is for mode="compile"; {self.mode!r} compiles nothing.')
