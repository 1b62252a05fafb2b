"""Files that ship inside the package: the small trained model of `hf-accel demo`, in `demo/`."""

from pathlib import Path


def demo_path() -> Path:
    """Return the folder of the embedded demo model, as `from_pretrained` takes it."""
    return Path(__file__).parent / "demo"
