"""Files that ship inside the package: two small trained models, of which one writes and one retrieves."""

from pathlib import Path


def demo_path() -> Path:
    """Return the folder of the embedded demo model, as `from_pretrained` takes it."""
    return Path(__file__).parent / "demo"


def retrieval_path() -> Path:
    """Return the folder of the embedded retrieval model, as `from_pretrained` takes it."""
    return Path(__file__).parent / "retrieval"
