"""The command line: `hf-accel demo | plan | bench | quantize | serve | doctor`."""

from hf_accel.cli.application import app

__all__ = ["app"]
