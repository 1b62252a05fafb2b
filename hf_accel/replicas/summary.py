"""The reports of several replicas as one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any


def summed(told: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return {"answered", "calls": {"served", "delegated", "reasons"}, "private_bytes", "replicas"}.

    told: of every replica what `Answering.report` returns. What replicas that died had answered is not in it.
    private_bytes: memory that replicas share with nobody; None: the system does not say.
    """
    calls = [each["report"]["calls"] for each in told if each["report"] is not None]
    reasons: Counter[str] = Counter()
    for each in calls:
        reasons.update(each["reasons"])
    private = [each["memory"]["private"] for each in told if each["memory"] is not None]
    return {
        "answered": sum(each["answered"] for each in told),
        "calls": {
            "served": sum(each["served"] for each in calls),
            "delegated": sum(each["delegated"] for each in calls),
            "reasons": dict(reasons),
        },
        "private_bytes": sum(private) if len(private) == len(told) else None,
        "replicas": list(told),
    }
