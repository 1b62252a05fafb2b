"""Turns a goal into a plan: candidates are timed on this machine, on this model; losers are reported, not applied."""

from hf_accel.planner.goals import GOALS, addition, goal_called, plan_goal, untimed
from hf_accel.planner.joining import optimize_beside, plan_beside
from hf_accel.planner.named import Asked, Named

__all__ = [
    "GOALS",
    "Asked",
    "Named",
    "addition",
    "goal_called",
    "optimize_beside",
    "plan_beside",
    "plan_goal",
    "untimed",
]
