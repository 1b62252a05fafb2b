"""The sources that `hf_accel.load` asks, in this order: the last claims every name."""

from __future__ import annotations

from hf_accel.quantization.reading.folder import Folder
from hf_accel.quantization.reading.gguf import Gguf
from hf_accel.quantization.reading.sources import Source

SOURCES: list[Source] = [Gguf(), Folder()]


def source_of(name: str) -> Source:
    """Return the source that reads `name`."""
    return next(source for source in SOURCES if source.claims(name))
