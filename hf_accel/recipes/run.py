"""One run: measured before, trained, measured after."""

from __future__ import annotations

import copy
import random
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor
from transformers import PrinterCallback, ProgressCallback, TrainingArguments
from transformers.trainer_utils import set_seed

from hf_accel.measure.quality import Quality
from hf_accel.quantization.adapting import get_qat_peft_model
from hf_accel.quantization.modules.fake_linear import FakeQuantizedLinear
from hf_accel.recipes.borrowed import Borrowed
from hf_accel.recipes.curve import Curve
from hf_accel.recipes.evaluation import compare
from hf_accel.recipes.folder import RunFolder, load_trained
from hf_accel.recipes.pacing import Clock, Pace, Schedule
from hf_accel.recipes.result import Uptrained
from hf_accel.recipes.showing import bar
from hf_accel.recipes.texts import Text, Windows
from hf_accel.recipes.trainer import Conductor, DistillationTrainer, Objective, timed_step

_MEASURING_SHARE, _TIMING_SHARE = 0.02, 0.03  # of the minutes: one measurement on held-out text, timing steps
_ROOM = 64  # times the planned steps that the data reaches, where the end may move


@dataclass
class Run:
    """Everything that is settled when a run begins."""

    student: Any
    teacher: Any
    text: Text
    objective: Objective
    clock: Clock
    folder: RunFolder
    steps: int | None
    step_tokens: int
    batch: int
    learning_rate: float
    decay: str
    bf16: bool | None
    seed: int
    lora_rank: int | None
    evaluations: int
    checkpoint_s: float
    arguments: Any
    callbacks: tuple[Any, ...]

    def go(self, borrowed: Borrowed, picture: Path | None, copied: int) -> Uptrained:
        """Train and measure; return the result."""
        last = self.folder.last()
        if last is not None:
            self.clock.spent_s = last[1]["seconds"]
        extra = 0
        with ExitStack() as stack:
            stack.enter_context(_random_states())
            show = stack.enter_context(bar("uptraining"))
            before, windows, evaluation_s = self._first()
            if self.lora_rank is None:
                extra = borrowed.in_single_precision()
            set_seed(self.seed)
            model = self.student if self.lora_rank is None else stack.enter_context(_adapted(self.student, self))
            trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
            bf16, step_s = self._timing(model, last)
            pace = Pace(self.clock, step_s, evaluation_s)
            schedule = self._schedule(pace, last)
            at = 0 if last is None else int(last[0].name.rpartition("-")[2])
            curve = Curve(self.folder.file("curve.jsonl"), at)
            conductor = Conductor(
                pace, schedule, curve, lambda: self._measure(windows)[0], show, self.step_tokens, self.evaluations,
                None if self.folder.path is None else self.checkpoint_s,
            )  # fmt: skip
            if not at:
                conductor.measured(0, before)
            began = time.monotonic()
            if at >= schedule.steps and last is not None:
                load_trained(model, str(last[0]))
            else:
                self._train(model, schedule, pace, conductor, bf16, last and last[0])
            trained_s = time.monotonic() - began
            if self.lora_rank is not None:
                model.merge_and_unload()
        borrowed.__exit__()  # what is measured is what the caller gets
        after = self._measure(windows)[0]
        if at < schedule.steps:
            conductor.measured(schedule.steps, after)
        if picture is not None:
            curve.draw(picture, after.perplexity_before)
        done = schedule.steps
        speed = (done - at) * self.step_tokens / max(trained_s, 1e-9)
        result = Uptrained(
            student=self.student, before=before, after=after, steps=done, tokens=done * self.step_tokens,
            seconds=self.clock.seconds, tokens_per_s=speed, trained_parameters=trained,
            extra_bytes=extra + 12 * trained + self._batch_bytes(bf16), copied_bytes=copied, bf16=bf16,
            learning_rate=self.learning_rate, lora_rank=self.lora_rank, resumed_at=at or None,
            curve=tuple(curve.records), out=self.folder.path,
        )  # fmt: skip
        self.folder.decide(result=result.to_dict())
        return result

    def _batch_bytes(self, bf16: bool) -> int:
        """Return the bytes of both models' logits of one batch, and of the teacher's hidden states."""
        config = self.teacher.config.get_text_config(decoder=True)
        values = 2 * config.vocab_size * (2 if bf16 else 4)
        if self.objective.hidden_weight:
            values += 4 * config.num_hidden_layers * config.hidden_size
        return int(values * self.batch * self.text.train.shape[1])

    def _measure(self, windows: Tensor, until: float = float("inf")) -> tuple[Quality, int]:
        text = self.text
        return compare(self.student, self.teacher, windows, text.source, text.is_own, self.batch, until)

    def _first(self) -> tuple[Quality, Tensor, float]:
        """Return the quality before training, the windows that fit in a fiftieth of the minutes, and their seconds."""
        kept = self.folder.record.get("before")
        if kept is not None:
            used = self.folder.record["held_out_windows"]
            return Quality(**kept), self.text.held_out[:used], self.folder.record["evaluation_s"]
        began = time.monotonic()
        before, used = self._measure(self.text.held_out, self.clock.after(_MEASURING_SHARE))
        seconds = time.monotonic() - began
        self.folder.decide(before=asdict(before), held_out_windows=used, evaluation_s=seconds)
        return before, self.text.held_out[:used], seconds

    def _timing(self, model: Any, last: Any) -> tuple[bool, float]:
        """Return whether to run in bf16, and the seconds of a step; decided once for all sittings."""
        record = self.folder.record
        if "autocasts" not in record:
            wish = self.bf16 if self.arguments is None else False  # arguments have a precision of their own
            if wish is not None and self.clock.minutes is None:
                chosen, seconds = wish, 0.0
            else:
                rows = self.text.train[torch.arange(self.batch) % len(self.text.train)]
                limit = 10.0 if self.clock.minutes is None else _TIMING_SHARE * 60 * self.clock.minutes
                chosen, seconds = timed_step(
                    self.objective, model, self.teacher, rows.long().to(self.student.device), wish, limit
                )
            self.folder.decide(autocasts=chosen, step_s=seconds)
            record = record | {"autocasts": chosen, "step_s": seconds}
        accumulated = 1 if self.arguments is None else self.arguments.gradient_accumulation_steps
        return record["autocasts"], last[1]["step_s"] if last else accumulated * record["step_s"]

    def _schedule(self, pace: Pace, last: Any) -> Schedule:
        if last is not None:
            return Schedule(last[1]["knots"], self.decay)
        return Schedule.of(self.steps or max(1, pace.affordable(self.evaluations + 1)), self.decay)

    def _train(
        self, model: Any, schedule: Schedule, pace: Pace, conductor: Conductor, bf16: bool, checkpoint: Path | None
    ) -> None:
        with tempfile.TemporaryDirectory() as scratch:
            arguments = self._arguments(str(self.folder.path or scratch), schedule.steps)
            length = schedule.steps * self.step_tokens // self.text.train.shape[1]
            trainer = DistillationTrainer(
                model=model, args=arguments, teacher=self.teacher, objective=self.objective, schedule=schedule,
                autocasts=bf16, pace=pace, callbacks=[conductor, *self.callbacks],
                train_dataset=Windows(
                    self.text.train, self.seed, length if self.clock.minutes is None else length * _ROOM
                ),
            )  # fmt: skip
            for own in (PrinterCallback, ProgressCallback):
                trainer.remove_callback(own)
            try:
                trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
            finally:
                trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
                trainer.accelerator.free_memory()

    def _arguments(self, folder: str, steps: int) -> TrainingArguments:
        """Return the user's arguments with what a run decides itself, or ours."""
        if self.arguments is not None:
            arguments = copy.copy(self.arguments)
            arguments.output_dir = folder
        else:
            arguments = TrainingArguments(
                output_dir=folder, per_device_train_batch_size=self.batch, learning_rate=self.learning_rate,
                weight_decay=0.0, adam_beta2=0.95, max_grad_norm=1.0, optim="adamw_torch_fused", report_to="none",
                save_strategy="no", save_total_limit=1, logging_steps=max(1, steps // 100), seed=self.seed,
                use_cpu=self.student.device.type == "cpu", dataloader_pin_memory=False,
            )  # fmt: skip
        arguments.max_steps = steps
        arguments.remove_unused_columns = False
        arguments.disable_tqdm = True
        if arguments.n_gpu > 1:
            arguments._n_gpu = 1  # one student against one teacher: no copies of one of them per device
        return arguments


@contextmanager
def _random_states() -> Iterator[None]:
    """Leave the random states of Python, numpy and torch as they were: a run seeds them."""
    python, arrays = random.getstate(), numpy.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            numpy.random.set_state(arrays)


@contextmanager
def _adapted(student: Any, run: Run) -> Iterator[Any]:
    """Give the student low-rank additions; they are off again at the end, merged or not."""
    from peft import LoraConfig, get_peft_model

    is_rounded = any(isinstance(module, FakeQuantizedLinear) for module in student.modules())
    config = LoraConfig(r=run.lora_rank or 8, lora_alpha=2 * (run.lora_rank or 8), target_modules="all-linear")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers by names that are going to be renamed
        model: Any = (get_qat_peft_model if is_rounded else get_peft_model)(student, config)
    try:
        yield model
    finally:
        model.unload()  # nothing is left to do where it was merged
