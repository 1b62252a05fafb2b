"""What a call collects of its steps for the caller."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hf_accel.decoding.choosing import NextTokens


@dataclass
class Collected:
    """What `return_dict_in_generate` asks to keep of every step; a tuple per kind, None where not asked for."""

    scores: tuple[Any, ...] | None = None
    logits: tuple[Any, ...] | None = None
    attentions: tuple[Any, ...] | None = None
    hidden_states: tuple[Any, ...] | None = None
    wanted: dict[str, bool] = field(default_factory=dict)

    @classmethod
    def for_config(cls, config: Any) -> Collected:
        """Return what a call with this generation config collects, still empty."""
        names = ("scores", "logits", "attentions", "hidden_states")
        wanted = {name: bool(config.return_dict_in_generate and getattr(config, f"output_{name}")) for name in names}
        return cls(**{name: () if wanted[name] else None for name in names}, wanted=wanted)  # type: ignore[arg-type]

    def add(self, step: NextTokens) -> None:
        """Keep what is wanted of a step."""
        if self.scores is not None:
            self.scores += (step.scores,)
        if self.logits is not None:
            self.logits += (step.logits,)
        if self.attentions is not None:
            self.attentions += (step.outputs.attentions,)
        if self.hidden_states is not None:
            self.hidden_states += (step.outputs.hidden_states,)

    def drop(self, steps: int) -> None:
        """Give up what the last steps left."""
        for name, is_wanted in self.wanted.items():
            if is_wanted:
                setattr(self, name, getattr(self, name)[:-steps])
