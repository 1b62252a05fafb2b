"""Calls whose rows end apart, on models whose passes are watched from where nobody of the user's stands."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from comparison import Call
from models import PAD, build, padded

import hf_accel
from hf_accel import AttentionConfig, DecodingConfig, KVCacheConfig
from hf_accel.core.calls.doors import Door
from hf_accel.core.calls.hosting import host_of
from hf_accel.core.config import Config
from hf_accel.core.drift import CACHE

ROWS = [11, 5, 9, 11, 7, 3, 11, 8]  # tokens of the prompts
ENDS: dict[str, Any] = {"eos_token_id": list(range(4, 12)), "pad_token_id": PAD}
CONFIGS: list[Config] = [AttentionConfig(), KVCacheConfig(), DecodingConfig()]


@dataclass
class Watched:
    """A model, and how many rows each pass after the prompt had, its mask and its cache."""

    model: Any
    passes: list[int] = field(default_factory=list)
    masks: set[int] = field(default_factory=set)
    caches: list[set[int]] = field(default_factory=list)

    @property
    def rows(self) -> dict[str, Any]:
        """What the report says of rows that ended."""
        found: dict[str, Any] = hf_accel.report(self.model).to_dict()["rows_left"]
        return found


def watched(model: Any, configs: list[Config] | None = None) -> Watched:
    """Optimise a model, and watch its passes."""
    hf_accel.optimize(model, CONFIGS if configs is None else configs)
    found, host = Watched(model), host_of(model)
    assert host is not None
    run = host.doors.get(Door.FORWARD, model)

    def watch(**inputs: Any) -> Any:
        outputs = run(**inputs)
        rows, mask = len(inputs["input_ids"]), inputs.get("attention_mask")
        found.passes.append(rows)
        if mask is not None and not isinstance(mask, dict):
            found.masks.add(len(mask) - rows)
        if (cache := inputs.get(CACHE)) is not None:
            kept = [buffers.keys for layer in cache.layers if (buffers := getattr(layer, "buffers", None))]
            found.caches.append({len(keys) for keys in kept} or {rows})
        return outputs

    host.stand(Door.FORWARD, watch)
    return found


def asking(rows: list[int] | None = None, seed: int = 3, **given: Any) -> Call:
    """Return a call of left-padded prompts, by default greedy up to 40 tokens, whose rows end apart."""
    options = {"max_new_tokens": 40, "do_sample": False, **ENDS, **given}
    return lambda model: model.generate(**padded(rows or ROWS, seed), **options)


def shrank(found: Watched) -> bool:
    """Return whether passes had fewer and fewer rows, and so had masks and caches with them."""
    falls = all(one >= next for one, next in zip(found.passes, found.passes[1:], strict=False))
    same = all(sizes == {rows} for sizes, rows in zip(found.caches, found.passes, strict=False))
    return falls and found.passes[-1] < found.passes[0] and found.masks <= {0} and same


def fresh(name: str = "llama", configs: list[Config] | None = None) -> Watched:
    """Return a model of its own, optimised and watched."""
    return watched(build(name), configs)
