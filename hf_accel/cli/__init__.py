"""The command line: `hf-accel demo | plan | bench | quantize | doctor`."""

from hf_accel.cli.application import app

__all__ = ["app"]
