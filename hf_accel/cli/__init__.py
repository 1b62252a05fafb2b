"""The command line: `hf-accel demo | plan | bench | doctor`."""

from hf_accel.cli.application import app

__all__ = ["app"]
