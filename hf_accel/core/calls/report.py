"""What optimising did: changes, what was left out and why, bytes, speed, and the calls served since."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from hf_accel.core.calls.call import CallLog
from hf_accel.core.config import Config


@dataclass(frozen=True)
class Speed:
    """Decoding speed at batch 1, measured on this machine: stock and patched in alternation, medians.

    beside: names of the configs that were applied in both, where they were named beside the goal: then "stock" is the
        model with these alone.
    """

    stock_tokens_per_s: float
    patched_tokens_per_s: float
    weight_bytes: int
    read_bandwidth_bytes_per_s: float
    prompt_tokens: int
    threads: int
    beside: tuple[str, ...] = ()

    @property
    def ratio(self) -> float:
        return self.patched_tokens_per_s / self.stock_tokens_per_s

    @property
    def change(self) -> str:
        """The two speeds and their ratio in words."""
        alone = f" with {', '.join(self.beside)} alone" if self.beside else ""
        return f"{self.stock_tokens_per_s:.1f}{alone} -> {self.patched_tokens_per_s:.1f} tokens/s ({self.ratio:.2f} x)"

    @property
    def achieved_bytes_per_s(self) -> float:
        """Weight bytes read per second: every token reads every weight once."""
        return self.weight_bytes * self.patched_tokens_per_s

    @property
    def share_of_bandwidth(self) -> float:
        return self.achieved_bytes_per_s / self.read_bandwidth_bytes_per_s


@dataclass(frozen=True)
class Applied:
    """One step that was applied; `gain` is how much longer a token takes without it (1.0: no difference)."""

    config: Config
    summary: str
    extra_bytes: int
    fidelity: str
    gain: float | None = None


@dataclass(frozen=True)
class Skip:
    """Something that was not done, and why."""

    what: str
    reason: str


@dataclass(frozen=True)
class Addition:
    """What a goal would try beside the configs that were named alone, and what to pass for that."""

    goal: str
    configs: tuple[str, ...]  # names of the configs it would try
    written: str

    def __str__(self) -> str:
        return (
            f'goal "{self.goal}" beside this would try {", ".join(self.configs)}, and keep what pays here: '
            f"pass {self.written}"
        )


class Section(Protocol):
    """What a family counts over all calls; `str` of it is for people."""

    def to_dict(self) -> dict[str, Any]: ...


SECTIONS: dict[str, str] = {}
"""Sections of a report that families fill: name, in `to_dict` and as an attribute -> title for people."""


@dataclass
class Report:
    """The report of one optimised model. `str(report)` is for people, `to_dict()` for programs."""

    model: str
    goal: str
    device: str
    dtype: str
    weight_bytes: int
    patched_weight_bytes: int | None = None  # where a step changed them
    applied: list[Applied] = field(default_factory=list)
    skipped: list[Skip] = field(default_factory=list)
    speed: Speed | None = None
    verified: str | None = None
    quality: Any = None  # a measure.quality.Quality, where lossy steps were measured
    calls: CallLog | None = None
    sections: dict[str, Section] = field(default_factory=dict)  # what families count, by the names in SECTIONS
    named: tuple[str, ...] = ()  # the configs that were named beside the goal
    addition: Addition | None = None  # where configs were named alone

    def __getattr__(self, name: str) -> Section | None:
        """Return the section called `name`; None where the family that fills it is not applied."""
        if name in SECTIONS:
            return self.sections.get(name)
        raise AttributeError(f"A report has no {name!r}. Its sections: {', '.join(SECTIONS)}.")

    @property
    def extra_bytes(self) -> int:
        return sum(step.extra_bytes for step in self.applied)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        speed = None
        if self.speed is not None:
            speed = asdict(self.speed) | {
                "ratio": self.speed.ratio,
                "achieved_bytes_per_s": self.speed.achieved_bytes_per_s,
                "share_of_bandwidth": self.speed.share_of_bandwidth,
            }
        return {
            "model": self.model,
            "goal": self.goal,
            "named": list(self.named),
            "addition": self.addition and asdict(self.addition),
            "device": self.device,
            "dtype": self.dtype,
            "weight_bytes": self.weight_bytes,
            "patched_weight_bytes": self.patched_weight_bytes,
            "extra_bytes": self.extra_bytes,
            "changes": [
                {
                    "config": step.config.to_dict(),
                    "summary": step.summary,
                    "extra_bytes": step.extra_bytes,
                    "fidelity": step.fidelity,
                    "gain": step.gain,
                }
                for step in self.applied
            ],
            "skipped": [asdict(skip) for skip in self.skipped],
            "speed": speed,
            "verified": self.verified,
            "quality": self.quality and self.quality.to_dict(),
            "calls": self.calls.to_dict() if self.calls else {"served": 0, "delegated": 0, "reasons": {}},
            **{name: self.sections[name].to_dict() if name in self.sections else None for name in SECTIONS},
        }

    def __str__(self) -> str:
        beside = f" beside {', '.join(self.named)}" if self.named else ""
        lines = [f"hf_accel report: {self.model}, {self.dtype} on {self.device}, goal {self.goal}{beside}"]
        after = "" if self.patched_weight_bytes is None else f" -> {_size(self.patched_weight_bytes)}"
        lines.append(f"  weights {_size(self.weight_bytes)}{after}, extra {_size(self.extra_bytes)}")
        if self.speed is not None:
            s = self.speed
            lines.append(
                f"  decode {s.change}, "
                f"{s.achieved_bytes_per_s / 1e9:.1f} GB/s of {s.read_bandwidth_bytes_per_s / 1e9:.1f} measured "
                f"({100 * s.share_of_bandwidth:.0f} %), prompt {s.prompt_tokens}, {s.threads} threads"
            )
        if self.verified:
            lines.append(f"  verified: {self.verified}")
        if self.quality is not None:
            lines.append(f"  quality: {self.quality}")
        lines.append("  changes:" if self.applied else "  changes: none")
        for step in self.applied:
            gain = f" ({step.gain:.2f} x)" if step.gain is not None else ""
            lines.append(f"    {type(step.config).__name__}: {step.summary}{gain}")
        if self.skipped:
            lines.append("  not done:")
            lines += [f"    {skip.what}: {skip.reason}" for skip in self.skipped]
        if self.addition is not None:
            lines.append(f"  {self.addition}")
        if self.calls is not None:
            lines.append(f"  calls: {self.calls.served} served, {self.calls.delegated} delegated to stock generate")
            lines += [f"    {count} x {reason}" for reason, count in self.calls.reasons.items()]
        for name, title in SECTIONS.items():
            if name in self.sections:
                lines.append(f"  {title}: " + str(self.sections[name]).replace("\n", "\n    "))
        return "\n".join(lines)


def _size(count: int) -> str:
    value = float(count)
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.2f} GiB"
