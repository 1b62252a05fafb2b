"""The training: transformers' Trainer with the loss of distillation, checkpoints of what is trained, and a pace."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainerCallback

from hf_accel.measure.quality import Quality
from hf_accel.recipes.curve import Curve
from hf_accel.recipes.distillation import divergence, hidden_state_loss
from hf_accel.recipes.folder import load_trained, save_trained
from hf_accel.recipes.pacing import Pace, Schedule


@dataclass(frozen=True)
class Objective:
    """What is minimised: `(1 - share) t² KL + share · cross entropy + hidden_weight · hidden-state loss`."""

    temperature: float = 1.0
    cross_entropy_share: float = 0.0
    hidden_weight: float = 0.0

    def __call__(self, student: Any, teacher: Any, ids: Tensor, bf16: bool) -> Tensor:
        """Return the loss on token ids [B, T], a scalar; products run in bf16 under autocast where asked."""
        hidden = self.hidden_weight > 0
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=bf16):
            with torch.no_grad():
                theirs = teacher(ids.to(teacher.device), use_cache=False, output_hidden_states=hidden)
            ours = student(ids, use_cache=False, output_hidden_states=hidden)
        loss = divergence(ours.logits, theirs.logits, ids, self.temperature, self.cross_entropy_share)
        if hidden:
            loss = loss + self.hidden_weight * hidden_state_loss(ours.hidden_states, theirs.hidden_states)
        return loss


class DistillationTrainer(Trainer):
    """Trains `model` towards `teacher`; items of the data set are read in their order."""

    def __init__(
        self, *, teacher: Any, objective: Objective, schedule: Schedule, autocasts: bool, pace: Pace, **options: Any
    ) -> None:
        super().__init__(**options)
        self.teacher = teacher
        self.aim: Objective = objective
        self.schedule, self.autocasts, self.pace = schedule, autocasts, pace
        self.model_accepts_loss_kwargs = False  # the loss is a mean, to be divided over accumulated batches

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        loss = self.aim(model, self.teacher, inputs["input_ids"], self.autocasts)
        return (loss, {}) if return_outputs else loss

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        if self.lr_scheduler is None:
            self.lr_scheduler = LambdaLR(optimizer or cast(Any, self.optimizer), self.schedule)
        return self.lr_scheduler

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return SequentialSampler(train_dataset or cast(Any, self.train_dataset))

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        progress = {"seconds": self.pace.clock.seconds, "knots": self.schedule.knots, "step_s": self.pace.step_s}
        save_trained(cast(Any, self.model), str(output_dir or self.args.output_dir), progress)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load_trained(model or cast(Any, self.model), resume_from_checkpoint)


class Conductor(TrainerCallback):
    """Ends the run in time, measures on the way, and says when to save."""

    def __init__(
        self,
        pace: Pace,
        schedule: Schedule,
        curve: Curve,
        evaluate: Callable[[], Quality],
        show: Callable[[float, str], None],
        step_tokens: int,
        evaluations: int,
        checkpoint_s: float | None,
    ) -> None:
        self.pace, self.schedule, self.curve, self.evaluate, self.show = pace, schedule, curve, evaluate, show
        self.step_tokens, self.evaluations, self.checkpoint_s = step_tokens, evaluations, checkpoint_s
        self.saved_at = self.began = time.monotonic()
        self.seen = 0
        self.note = ""

    def record(self, step: int, **values: float | None) -> None:
        """Add a record to the curve; what was not measured is left out."""
        known = {name: value for name, value in values.items() if value is not None}
        seconds = round(self.pace.clock.seconds, 3)
        self.curve.add(step=step, tokens=step * self.step_tokens, seconds=seconds, **known)

    def measured(self, step: int, quality: Quality) -> None:
        """Take a measurement into the curve and the bar."""
        self.record(step, kl=quality.kl, perplexity=quality.perplexity_after)
        self.note = f"KL {quality.kl:.3g}"

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.began = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        step, schedule = state.global_step, self.schedule
        self.seen += 1
        self.pace.saw(time.monotonic() - self.began, 1 / min(self.seen, 16))
        before, now = (int(schedule.share(at) * (self.evaluations + 1)) for at in (step - 1, step))
        if now > before and step < schedule.steps:
            self.measured(step, self.evaluate())
        still = self.evaluations - now + 1
        if step < schedule.steps and self.seen % max(1, schedule.steps // 50) == 0:
            self.pace.corrected(schedule, step, still)
        state.max_steps = args.max_steps = schedule.steps
        done = step >= schedule.steps
        control.should_training_stop = control.should_training_stop or done
        if self.checkpoint_s is not None and (done or time.monotonic() - self.saved_at >= self.checkpoint_s):
            control.should_save = True
        self.show(schedule.share(step), self.note)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.saved_at = time.monotonic()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if logs and "loss" in logs:
            self.record(state.global_step, loss=logs["loss"], learning_rate=logs["learning_rate"])


def timed_step(
    objective: Objective, student: Any, teacher: Any, ids: Tensor, bf16: bool | None, seconds: float
) -> tuple[bool, float]:
    """Return whether steps in bf16 are faster than in fp32, and the seconds of one on token ids [B, T].

    `bf16` None: each is run two or three times in turn, for about `seconds`; else only the one is. On a CPU the
    processor's time decides, which other programs disturb less. The student's weights and random state are as before.
    """
    ways = (False, True) if bf16 is None else (bf16,)
    best, costs = (dict.fromkeys(ways, float("inf")) for _ in range(2))
    is_cpu = ids.device.type == "cpu"
    end = time.monotonic() + seconds
    student.train()
    with torch.random.fork_rng(devices=[ids.device] if ids.device.type == "cuda" else []):
        for turn in range(4):
            for way in ways:
                began, worked = time.perf_counter(), time.process_time()
                objective(student, teacher, ids, way).backward()
                if ids.device.type == "cuda":
                    torch.cuda.synchronize(ids.device)
                if turn:  # the first one also allocates
                    spent = time.perf_counter() - began
                    best[way] = min(best[way], spent)
                    costs[way] = min(costs[way], time.process_time() - worked if is_cpu else spent)
                student.zero_grad(set_to_none=True)
            if turn > 1 and time.monotonic() > end:
                break
    chosen = min(ways, key=lambda way: costs[way])
    return chosen, best[chosen]
