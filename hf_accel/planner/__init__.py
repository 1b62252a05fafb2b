"""Turns a goal into a plan: candidates are timed on this machine, on this model; losers are reported, not applied."""

from hf_accel.planner.goals import GOALS, plan_goal, untimed

__all__ = ["GOALS", "plan_goal", "untimed"]
