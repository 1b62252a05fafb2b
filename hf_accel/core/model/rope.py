"""What moves rotary embeddings: where their frequencies change with the length of the text.

The one place that knows. transformers computes frequencies anew at every forward pass for the types longrope (one set
up to `original_max_position_embeddings`, another beyond) and dynamic (beyond the context of training, for the largest
position so far); always by the largest position of the whole batch. So a key depends on the pass that wrote it, not
on its own position alone, and steps of several tokens, rows apart and keys of another prompt are others there.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

# longrope, or as Phi-3 first called it; also recognised by what only its parameters have
SWITCHING = re.compile(r"longrope|\bsu\b")
SWITCHING_PARAMETERS = frozenset({"short_factor", "long_factor", "short_mscale", "long_mscale"})
GROWING = re.compile(r"dynamic|ntk")
# classes of models with code of their own, and of transformers' before types had names
CLASS_NAMES = re.compile(r"dynamic|ntk|longrope|suscaled", re.IGNORECASE)
LENGTHS = ("original_max_position_embeddings", "original_max_seq_len", "max_position_embeddings", "seq_length")


@dataclass(frozen=True)
class MovingRope:
    """kinds: the types. switches: a pass whose largest position is n or beyond has other frequencies than one before.

    beyond: from this position on frequencies change with every token; None: nowhere.
    """

    kinds: tuple[str, ...]
    switches: tuple[int, ...] = ()
    beyond: int | None = None

    def __str__(self) -> str:
        return f"its rotary embeddings ({', '.join(self.kinds)}) depend on the length of the text"

    def room(self, position: int) -> int | None:
        """Return how many tokens from `position` on single steps take in with the same frequencies; None: any."""
        if self.beyond is not None and position >= self.beyond:
            return 1
        ahead = [n for n in (*self.switches, *([] if self.beyond is None else [self.beyond])) if n > position]
        return min(ahead) - position if ahead else None

    def is_steady(self, first: int, stop: int) -> bool:
        """Return whether passes with the largest positions first, ..., stop - 1 have the same frequencies."""
        room = self.room(first)
        return room is None or stop - first <= room


def moving_rope(model: nn.Module) -> MovingRope | None:
    """Return what moves the frequencies of `model`, as its configs and its modules are now; None: nothing does."""
    kinds: set[str] = set()
    switches: set[int] = set()
    beyond: set[int] = set()
    configs: dict[int, Any] = {}
    found: list[Found] = []
    waiting, seen = [model], {id(model)}  # `modules()` takes thrice as long, and every speculating call asks
    while waiting:
        module = waiting.pop()
        held = vars(module)
        if (config := held.get("config")) is not None:
            configs[id(config)] = config
        if "rope_type" in held or "inv_freq" in module._buffers:
            found += _of_module(module)
        for child in module._modules.values():
            if child is not None and id(child) not in seen:
                seen.add(id(child))
                waiting.append(child)
    for config in _with_inner(list(configs.values())):
        found += _of_config(config)
    for kind, is_switch, position in found:
        kinds.add(kind)
        (switches if is_switch and position is not None else beyond).add(position or 0)
    if not kinds:
        return None
    return MovingRope(tuple(sorted(kinds)), tuple(sorted(switches)), min(beyond, default=None))


Found = tuple[str, bool, int | None]  # (type, whether frequencies change once, at which position where that is known)


def _of_config(config: Any) -> list[Found]:
    found: list[Found] = []
    for parameters in _parameters(config):
        kind = str(parameters.get("rope_type", parameters.get("type", "")))
        if SWITCHING.search(kind) or SWITCHING_PARAMETERS & set(parameters):
            found.append((kind or "longrope", True, _first(parameters, config, LENGTHS[:1])))
        elif GROWING.search(kind):
            found.append((kind, False, _first(config, None, LENGTHS[2:])))
    if getattr(config, "use_dynamic_ntk", False) is True:
        found.append(("dynamic ntk", False, _first(config, None, reversed(LENGTHS))))
    return found


def _of_module(module: nn.Module) -> list[Found]:
    held = vars(module)
    types = held.get("rope_type")
    if types is None:
        if "inv_freq" not in module._buffers or not CLASS_NAMES.search(type(module).__name__):
            return []
        return [(type(module).__name__, False, _first(held, held.get("config"), LENGTHS))]
    found: list[Found] = []
    for kind in map(str, types.values() if isinstance(types, dict) else [types]):
        if GROWING.search(kind):
            found.append((kind, False, _first(held, held.get("config"), LENGTHS[1:])))
        elif SWITCHING.search(kind) and not _parameters(held.get("config")):
            found.append((kind, True, None))  # where, only its config could say
    return found


def _with_inner(waiting: list[Any]) -> list[Any]:
    """Return all configs among `waiting`, and those within others."""
    found: dict[int, Any] = {}
    while waiting:
        config = waiting.pop()
        if isinstance(config, PreTrainedConfig) and id(config) not in found:
            found[id(config)] = config
            waiting.extend(vars(config).values())
            if getattr(config, "is_heterogeneous", False):
                waiting.extend(config.per_layer_config)
    return list(found.values())


def unfamiliar_lengths(model: nn.Module) -> list[int]:
    """Return the lengths that configs name, where rotary embeddings are not transformers' own."""
    known = [
        type(module).__module__.startswith("transformers.") or "rope_type" in vars(module)
        for module in model.modules()
        if "inv_freq" in module._buffers
    ]
    if all(known):
        return []
    configs = _with_inner([vars(module).get("config") for module in model.modules()])
    places = [place for config in configs for place in (vars(config), *_parameters(config))]
    return sorted({place[name] for place in places for name in LENGTHS if isinstance(place.get(name), int)})


def _parameters(config: Any) -> list[dict[str, Any]]:
    """Return the rotary parameters of a config: one dictionary, or one per kind of layers; by either of their names."""
    found: list[dict[str, Any]] = []
    for name in ("rope_parameters", "rope_scaling"):
        value = getattr(config, name, None)
        if isinstance(value, dict):
            found += [value, *(inner for inner in value.values() if isinstance(inner, dict))]
    return found


def _first(holder: Any, other: Any, names: Any) -> int | None:
    """Return the first of the lengths `names` that one of two objects or dictionaries has."""
    for place in (holder, other):
        for name in names:
            value = place.get(name) if isinstance(place, dict) else getattr(place, name, None)
            if isinstance(value, int) and value > 0:
                return value
    return None
