"""The trained mixture of experts of the tests: its routing has the locality that random weights lack."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_accel.assets import demo_path

MIXTURE = Path(__file__).parent / "assets" / "mixture"


def trained_mixture(dtype: torch.dtype = torch.float32) -> Any:
    """Return a fresh copy of the model, in evaluation mode."""
    return AutoModelForCausalLM.from_pretrained(MIXTURE, dtype=dtype, local_files_only=True).eval()


def mixture_tokenizer() -> Any:
    """Return its tokenizer, which is the demo model's."""
    return AutoTokenizer.from_pretrained(demo_path(), local_files_only=True)
