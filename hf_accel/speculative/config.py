"""What the user says about speculation."""

from __future__ import annotations

from dataclasses import dataclass

from hf_accel.core.config import Config
from hf_accel.errors import ConfigError
from hf_accel.speculative.drafters.suffixes import MINIMUM_TOKENS

DRAFTERS = ("lookup", "self", "layer_skip", "model")
MAX_DRAFT_TOKENS = 32


@dataclass(frozen=True, kw_only=True)
class SpeculativeConfig(Config):
    """Several tokens per step: cheap drafts, verified by the model in one forward pass; the text stays the same.

    drafter: who drafts. "lookup": what followed the last tokens earlier in the text (no memory, no model). "self": the
        model's own weights in `bits` bits, over the model's own cache. "layer_skip": the model without the layers it
        can best do without. "model": the `draft_model` given to `optimize`, with the same tokenizer. A list: the first
        that has something to say. "auto": lookup, then the draft model where one is given, else "self".
    max_draft_tokens: at most so many tokens are drafted per step, 1 to 32; how many pays is measured as it goes.
    adaptive: draft as many tokens as pay on this machine and text, none where none do; False always drafts
        `max_draft_tokens`.
    strict: draft only where steps of several tokens round as steps of one, to the last bit (the native layers do up
        to 16 rows), so that the text is that of plain decoding to the last token; elsewhere decode plainly.
    sampling: how sampled drafts are verified. "same_draws": drafts and verification make the draws of plain decoding,
        so that the text is that of plain decoding with the same seed, whatever is drafted. "residual": by acceptance
        and residual (Leviathan et al. 2023); the text is another one of the same distribution, and drafts of a model
        are accepted somewhat more often.
    bits, group_size: of the weights that "self" drafts with, as in WeightOnlyConfig.
    history_tokens: "lookup" also draws on this many tokens of earlier calls of the same tenant
        (`generate(..., tenant="a")`); 0: on the call's own text only.
    """

    drafter: str | tuple[str, ...] = "auto"
    max_draft_tokens: int = 8
    adaptive: bool = True
    strict: bool = False
    sampling: str = "same_draws"
    bits: int = 4
    group_size: int | None = None
    history_tokens: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.drafter, list):
            object.__setattr__(self, "drafter", tuple(self.drafter))
        names = (self.drafter,) if isinstance(self.drafter, str) else self.drafter
        known = (*DRAFTERS, "auto") if isinstance(self.drafter, str) else DRAFTERS
        if not isinstance(names, tuple) or not names or any(name not in known for name in names):
            raise ConfigError(
                f'SpeculativeConfig.drafter is "auto", one of {", ".join(DRAFTERS)}, or a list of those; '
                f"{self.drafter!r} was given."
            )
        if len(set(names)) < len(names):
            raise ConfigError(f"SpeculativeConfig.drafter names each drafter once; {self.drafter!r} was given.")
        self.check_integer("max_draft_tokens", 1, MAX_DRAFT_TOKENS)
        self.check_integer("history_tokens", 0)
        if 0 < self.history_tokens < MINIMUM_TOKENS:
            raise ConfigError(
                f"SpeculativeConfig.history_tokens is 0, or at least {MINIMUM_TOKENS}; {self.history_tokens} was given."
            )
        for name in ("adaptive", "strict"):
            if type(getattr(self, name)) is not bool:
                raise ConfigError(f"SpeculativeConfig.{name} is True or False; {getattr(self, name)!r} was given.")
        if self.sampling not in ("same_draws", "residual"):
            raise ConfigError(f'SpeculativeConfig.sampling is "same_draws" or "residual"; {self.sampling!r} was given.')
        if self.bits not in (4, 8) or type(self.bits) is not int:
            raise ConfigError(f"SpeculativeConfig.bits is 4 or 8; {self.bits!r} was given.")
        if self.group_size not in (None, 32, 64, 128):
            raise ConfigError(f"SpeculativeConfig.group_size is 32, 64, 128 or None; {self.group_size!r} was given.")

    def drafters(self, has_draft_model: bool) -> tuple[str, ...]:
        """Return the drafters in the order in which they are asked."""
        if self.drafter == "auto":
            return ("lookup", "model" if has_draft_model else "self")
        return (self.drafter,) if isinstance(self.drafter, str) else self.drafter
