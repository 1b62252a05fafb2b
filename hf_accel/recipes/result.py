"""What a run of uptraining returns."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from hf_accel.measure.quality import Quality


@dataclass(frozen=True)
class Uptrained:
    """A healed student and what was measured. `before` and `after`: the student against the teacher, on held-out text.

    `seconds` are those of all sittings, `tokens` those trained on; `tokens_per_s` is of this sitting, with what was
    measured and saved in between. `extra_bytes` were held for the length of the run beside the two models and their
    activations: gradients, the optimizer's states, fp32 copies, logits of a batch.
    `copied_bytes` stay: parameters that student and teacher had shared. `curve`: one record per measurement.
    """

    student: Any
    before: Quality
    after: Quality
    steps: int
    tokens: int
    seconds: float
    tokens_per_s: float
    trained_parameters: int
    extra_bytes: int
    copied_bytes: int
    bf16: bool
    learning_rate: float
    lora_rank: int | None
    resumed_at: int | None
    curve: tuple[dict[str, float], ...]
    out: Path | None

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the model and the curve, as JSON values."""
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        del named["student"], named["curve"]
        out = None if self.out is None else str(self.out)
        return named | {"before": self.before.to_dict(), "after": self.after.to_dict(), "out": out}

    def __str__(self) -> str:
        how = f"LoRA of rank {self.lora_rank}, " if self.lora_rank else ""
        lines = [
            f"uptrained {self.steps} steps of {self.tokens // max(1, self.steps)} tokens in {self.seconds:.0f} s, "
            f"{self.tokens_per_s:.0f} tokens/s",
            f"  {how}{self.trained_parameters / 1e6:.2f} M parameters, {'bf16' if self.bf16 else 'fp32'} products, "
            f"learning rate {self.learning_rate:.2g}; {self.extra_bytes / 1e6:.0f} MB extra while training",
            f"  KL to the teacher {self.before.kl:.3g} -> {self.after.kl:.3g} nats per token, likeliest token equal at "
            f"{100 * self.before.top1_agreement:.1f} -> {100 * self.after.top1_agreement:.1f} %",
        ]
        first, last, original = (
            self.before.perplexity_after,
            self.after.perplexity_after,
            self.after.perplexity_before,
        )
        if first is not None and last is not None and original is not None:
            lines.append(
                f"  perplexity {first:.3f} -> {last:.3f}, the teacher's {original:.3f} "
                f"({100 * (last / original - 1):+.1f} %)"
            )
        lines.append(f"  {self.after.tokens} tokens of {self.after.source}")
        if self.copied_bytes:
            lines.append(f"  {self.copied_bytes / 1e6:.1f} MB that student and teacher had shared were copied")
        return "\n".join(lines)
