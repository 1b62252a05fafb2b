"""Uptraining: a changed model is healed by distillation from its original.

Whoever merges key/value heads, prunes, or rounds weights changes what a model computes. Training it for a small part of
the original's steps brings most of the quality back: Ainslie et al. 2023 (arXiv:2305.13245, section 3) uptrain merged
heads for 5 % of them. Here the original itself is the teacher (Hinton et al. 2015, arXiv:1503.02531): its distributions
say more per token than the text does. What was changed does not matter here: two models with one vocabulary are enough.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from hf_accel.core.fingerprint import fingerprint
from hf_accel.errors import ConfigError, MissingDependencyError, UnsupportedModelError
from hf_accel.measure.text import context_tokens
from hf_accel.recipes.borrowed import Borrowed, check_hidden_states, check_models, own_tensors
from hf_accel.recipes.curve import check_picture
from hf_accel.recipes.folder import RunFolder
from hf_accel.recipes.pacing import Clock
from hf_accel.recipes.result import Uptrained
from hf_accel.recipes.texts import Text, given_text, written_text

WINDOW_TOKENS, BATCH_TOKENS = 512, 1024  # positions that no window has are not healed
RATE, RATE_PARAMETERS, LORA_FACTOR = 2e-4, 1e7, 3.0
HIDDEN_WEIGHT = 4.0  # where the hidden states of both models can be compared
_DECISIVE = (
    "learning_rate",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "optim",
    "optim_args",
    "bf16",
    "fp16",
    "gradient_accumulation_steps",
    "per_device_train_batch_size",
    "seed",
    "max_steps",
    "full_determinism",
    "neftune_noise_alpha",
)  # those of the TrainingArguments that decide on the weights
_WRITING_SHARE = 0.3  # of the minutes, where the teacher writes the text itself


def uptrain(
    student: Any,
    teacher: Any,
    text: Any = None,
    *,
    tokenizer: Any = None,
    held_out: Any = None,
    out: str | Path | None = None,
    minutes: float | None = None,
    tokens: int | None = None,
    steps: int | None = None,
    lora_rank: int | None = None,
    temperature: float = 1.0,
    hidden_weight: float | None = None,
    cross_entropy_share: float = 0.0,
    learning_rate: float | None = None,
    batch_size: int | None = None,
    window: int | None = None,
    decay: str = "cosine",
    bf16: bool | None = None,
    evaluations: int = 4,
    checkpoint_minutes: float = 2.0,
    picture: bool | str | Path | None = None,
    seed: int = 0,
    arguments: Any = None,
    callbacks: Sequence[Any] = (),
) -> Uptrained:
    """Train `student` in place until its next-token distributions are close to `teacher`'s; return what was measured.

    The loss per token is `(1 - cross_entropy_share) t² KL(teacher || student) + cross_entropy_share · cross entropy +
    hidden_weight · hidden-state loss`, with t the `temperature`. The teacher is not changed: it runs in eval mode
    without gradients, and parameters that the student shares with it are copied before.

    Memory beside the two models and their activations: 12 bytes per trained parameter (gradient and AdamW's two
    moments in fp32), 2 more where weights have 16 bits (they are trained in fp32 and rounded back), and the teacher's
    logits [B, T, V] and hidden states L x [B, T, E] of one batch.

    Args:
        student: the changed model; trained in place. Parameters without requires_grad stay as they are.
        teacher: the original model, with the same vocabulary.
        text: texts (with `tokenizer`), token ids [B, T], or an iterable of either; packed into windows. None: the
            teacher samples text itself, the same for the same `seed`.
        held_out: text of the same kinds for measuring; None: every fiftieth window of the text is held out.
        out: a folder for checkpoints, the record of the run and its learning curve. Called again with the same models,
            text and settings, the run continues from its last checkpoint and ends with the same weights, bit for bit.
        minutes: the wall time that all of it may take. Steps are timed, and the learning rate is zero by the end;
            where the machine gets slower or faster on the way, the end is moved, and bits then depend on times.
        tokens: how many tokens to train on, instead of minutes.
        steps: how many steps to make, instead of minutes.
        lora_rank: train low-rank additions to all linear products (Hu et al. 2021, arXiv:2106.09685), merged at the
            end; None: all weights. Needs peft.
        hidden_weight: weight of the hidden-state loss; None: 4 where both models have as many layers of the same size,
            else 0.
        learning_rate: of AdamW, at its highest; None: 2e-4 up to 10 M parameters, falling with the square root of their
            number above; three times that for LoRA.
        batch_size: windows per step; None: 1,024 tokens in all.
        window: tokens per window; None: 512, or the models' context if that is shorter.
        decay: "cosine" or "linear", after 3 % of warm-up.
        bf16: products in bf16 under autocast; None: where that is measured to be faster. With `out` the decision is
            kept; a run whose bits must not depend on it gives True or False.
        evaluations: how often to measure on held-out text between the first and the last time.
        checkpoint_minutes: how often a checkpoint is written; the last one stays.
        picture: where to draw the learning curve; True: `curve.png` in `out`; None: there, if matplotlib is installed.
        seed: of the order of windows, of dropout, of LoRA's first weights, of the teacher's text.
        arguments: transformers.TrainingArguments for everything else; then its learning rate, batch size, seed and
            precision count, and the corresponding arguments here are to be left out.
        callbacks: transformers.TrainerCallbacks of yours.

    Raises:
        ConfigError: a value or text does not fit, the vocabularies differ, or `out` belongs to another run.
        UnsupportedModelError: the student's weights cannot be trained: quantized, frozen, on no device.
        ConflictError: the student is optimised.
        MissingDependencyError: peft or matplotlib is missing; found out before anything is done.
        CheckpointError: a checkpoint in `out` is damaged.

    After an error or an interruption the last checkpoint stays. Modes, requires_grad, gradients, data types and config
    of the student are as before; its weights are where training had brought them, but for LoRA, which is taken off.
    """
    clock = Clock(minutes)
    budgets = {"minutes": minutes, "tokens": tokens, "steps": steps}
    if arguments is not None and not any(budgets.values()) and arguments.max_steps > 0:
        budgets["steps"] = steps = arguments.max_steps
    given = {name: value for name, value in budgets.items() if value is not None}
    if len(given) != 1 or not all(value > 0 for value in given.values()):
        raise ConfigError(f"Give one of minutes, tokens and steps, more than 0; given: {given or 'none'}.")
    _check_values(
        positive={"temperature": temperature, "batch_size": batch_size, "window": window, "lora_rank": lora_rank,
                  "learning_rate": learning_rate},
        shares={"cross_entropy_share": cross_entropy_share},
        natural={"hidden_weight": hidden_weight or 0, "evaluations": evaluations,
                 "checkpoint_minutes": checkpoint_minutes},
    )  # fmt: skip
    if decay not in ("cosine", "linear"):
        raise ConfigError(f'decay is "cosine" or "linear"; {decay!r} was given.')
    if arguments is not None and not (learning_rate is batch_size is bf16 is None and seed == 0):
        raise ConfigError("learning_rate, batch_size, bf16 and seed are those of the TrainingArguments, if given.")
    check_models(student, teacher)
    hidden_weight = check_hidden_states(student, teacher, hidden_weight, HIDDEN_WEIGHT)
    if lora_rank is not None:
        _check_peft(student)
    folder = RunFolder(None if out is None else Path(out))
    picture = _picture(picture, folder.path)

    longest = min(context_tokens(student), context_tokens(teacher))
    window = min(window or WINDOW_TOKENS, longest)
    if window < 2:
        raise ConfigError(f"window is 2 tokens or more; {window} was given.")
    if arguments is not None:
        batch_size, seed = arguments.per_device_train_batch_size, arguments.seed
    batch_size = batch_size or max(1, BATCH_TOKENS // window)
    accumulated = 1 if arguments is None else arguments.gradient_accumulation_steps
    step_tokens = batch_size * window * accumulated
    steps = steps or (tokens and max(1, round(tokens / step_tokens)))
    wanted = math.inf if steps is None else steps * step_tokens
    found = _text(text, held_out, tokenizer, teacher, window, wanted, seed, clock, folder)

    from hf_accel.recipes.run import Run  # with transformers.Trainer: seconds, only where they are needed
    from hf_accel.recipes.trainer import Objective

    objective = Objective(temperature, cross_entropy_share, hidden_weight)
    if learning_rate is None:
        learning_rate = _rate(student, lora_rank) if arguments is None else arguments.learning_rate
    settings = {
        "objective": vars(objective), "budget": given, "window": window, "batch": batch_size, "lora_rank": lora_rank,
        "rate": learning_rate, "decay": decay, "seed": seed, "bf16": bf16, "evaluations": evaluations,
        "arguments": _settings(arguments),
    }  # fmt: skip
    if folder.path is not None:
        folder.open(fingerprint([student, teacher], [found.train, found.held_out], settings))
    with ExitStack() as stack:
        stack.enter_context(Borrowed(teacher)).model.eval()
        copied = own_tensors(student, teacher)
        borrowed = stack.enter_context(Borrowed(student))
        run = Run(
            student=student, teacher=teacher, text=found, objective=objective, clock=clock, folder=folder, steps=steps,
            step_tokens=step_tokens, batch=batch_size, learning_rate=learning_rate, decay=decay, bf16=bf16, seed=seed,
            lora_rank=lora_rank, evaluations=evaluations, checkpoint_s=60 * checkpoint_minutes,
            arguments=arguments, callbacks=tuple(callbacks),
        )  # fmt: skip
        return run.go(borrowed, picture, copied)


def _check_values(positive: dict[str, Any], shares: dict[str, float], natural: dict[str, float]) -> None:
    for name, value in positive.items():
        if value is not None and not value > 0:
            raise ConfigError(f"{name} is more than 0; {value!r} was given.")
    for name, value in shares.items():
        if not 0 <= value <= 1:
            raise ConfigError(f"{name} is between 0 and 1; {value!r} was given.")
    for name, value in natural.items():
        if not value >= 0:
            raise ConfigError(f"{name} is 0 or more; {value!r} was given.")


def _check_peft(student: Any) -> None:
    if importlib.util.find_spec("peft") is None:
        raise MissingDependencyError("lora_rank needs peft: pip install 'hf-accel[peft]'.")
    if hasattr(student, "peft_config"):
        raise UnsupportedModelError("The student has adapters already. Merge them before: model.merge_and_unload().")


def _picture(asked: bool | str | Path | None, folder: Path | None) -> Path | None:
    if asked is False or (asked is None and (folder is None or importlib.util.find_spec("matplotlib") is None)):
        return None
    check_picture()
    if asked is None or asked is True:
        if folder is None:
            raise ConfigError("picture=True draws to curve.png in `out`; give out=, or a path as picture.")
        return folder / "curve.png"
    return Path(asked)


def _text(
    text: Any, held_out: Any, tokenizer: Any, teacher: Any, window: int, wanted: float, seed: int, clock: Clock,
    folder: RunFolder,
) -> Text:  # fmt: skip
    most = 1 << 60 if wanted == math.inf else int(wanted * 1.03) + 2 * window
    if text is not None:
        vocabulary = teacher.config.get_text_config(decoder=True).vocab_size
        return given_text(text, held_out, tokenizer, vocabulary, window, most)
    if held_out is not None:
        raise ConfigError("held_out belongs to a text; without one the teacher's own text is divided.")
    modes = Borrowed(teacher)
    with modes:
        teacher.eval()
        return written_text(teacher, window, most, seed, clock.after(_WRITING_SHARE), folder.file("written.pt"))


def _rate(student: Any, lora_rank: int | None) -> float:
    """Return the default learning rate for the number of parameters."""
    count = sum(parameter.numel() for parameter in student.parameters())
    return RATE * min(1.0, math.sqrt(RATE_PARAMETERS / count)) * (1 if lora_rank is None else LORA_FACTOR)


def _settings(arguments: Any) -> dict[str, Any]:
    """Return those of the TrainingArguments that decide on the weights."""
    if arguments is None:
        return {}
    return {name: str(getattr(arguments, name, None)) for name in _DECISIVE}
