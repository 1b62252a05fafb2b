"""Measuring speed, as ratios in one run: stock and patched in alternation, medians, bytes per second beside tokens."""

from hf_accel.measure.bandwidth import read_bandwidth
from hf_accel.measure.bench import run_bench
from hf_accel.measure.difference import Difference
from hf_accel.measure.latency import Run, Timing, alternate, timed_generate
from hf_accel.measure.machine import Machine, versions
from hf_accel.measure.result import Bench
from hf_accel.measure.subjects.shapes import SHAPES, build_shape, shape_config
from hf_accel.measure.workload import Workload, random_prompt

__all__ = [
    "SHAPES",
    "Bench",
    "Difference",
    "Machine",
    "Run",
    "Timing",
    "Workload",
    "alternate",
    "build_shape",
    "random_prompt",
    "read_bandwidth",
    "run_bench",
    "shape_config",
    "timed_generate",
    "versions",
]
