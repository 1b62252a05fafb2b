"""Turns a goal into a plan: candidates are timed on this machine, on this model; losers are reported, not applied."""

from hf_accel.planner.goals import GOALS, offer, plan_goal

__all__ = ["GOALS", "offer", "plan_goal"]
