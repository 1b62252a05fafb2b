"""From what the user names (a folder, a hub id, a shape) to a model in memory and the plan for it."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch
import typer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging as transformers_logging

from hf_accel.cli.output import progress
from hf_accel.core.config import Config
from hf_accel.core.steps.applying import checked
from hf_accel.core.steps.plan import Plan
from hf_accel.core.steps.setting import Setting
from hf_accel.errors import ConfigError, described
from hf_accel.measure import SHAPES, build_shape
from hf_accel.planner import GOALS, Named, goal_called, plan_beside, plan_goal, untimed
from hf_accel.quantization import WeightOnlyConfig
from hf_accel.speculative import SpeculativeConfig


class Dtype(enum.StrEnum):
    """The data types of weights that can be asked for."""

    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"

    @property
    def torch(self) -> torch.dtype:
        return getattr(torch, self.value)


_MODEL = typer.Argument(
    metavar="MODEL", help=f"A local folder, a hub id, or a shape with random weights: {', '.join(SHAPES)}."
)
ModelName = Annotated[str, _MODEL]
OptionalModelName = Annotated[str | None, _MODEL]
GoalName = Annotated[str, typer.Option("--goal", help=f"What to aim at: {', '.join(GOALS)}.")]
Bits = Annotated[
    int | None, typer.Option("--bits", help="Weights in 8, 4, 3 or 2 bits, and the goal's other steps beside them.")
]
GroupSize = Annotated[int | None, typer.Option("--group-size", help="With --bits: columns that share a scale.")]
DtypeName = Annotated[Dtype, typer.Option("--dtype", help="Data type to load or build the weights in.")]
Device = Annotated[str, typer.Option("--device", help="Where to put the model, for example cpu or cuda.")]
Threads = Annotated[
    int | None, typer.Option("--threads", min=1, help="Threads torch computes with.", show_default="torch's own choice")
]
AsJson = Annotated[bool, typer.Option("--json", help="Write JSON, and nothing else, to standard output.")]


def use_threads(threads: int | None) -> None:
    """Make torch compute with this many threads; None leaves its choice."""
    if threads is not None:
        torch.set_num_threads(threads)


def check_device(device: str) -> None:
    """Raise ConfigError where torch does not find the CUDA device that was asked for."""
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"Device {device!r} was asked for, but torch finds no CUDA device here. Use --device cpu.")


def load_model(name: str, dtype: torch.dtype, device: str = "cpu", layers: int | None = None) -> PreTrainedModel:
    """Return the model that `name` stands for, ready to generate; `layers` of them where it is a shape.

    Raises:
        ConfigError: there is no such shape, folder or hub model, or no such device.
    """
    check_device(device)
    transformers_logging.disable_progress_bar()
    with progress(f"loading {name}"):
        if name in SHAPES:
            return build_shape(name, dtype, device, layers=layers)
        try:
            model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, local_files_only=Path(name).is_dir())
        except Exception as error:  # whatever a folder that holds something else makes transformers raise
            reason = described(error)
            raise ConfigError(
                f"{name!r} is not a shape ({', '.join(SHAPES)}), and no causal language model could be loaded from it "
                f"as a folder or hub id: {reason}"
            ) from error
        return model.to(device).eval()


def load_tokenizer(name: str) -> Any:
    """Return the tokenizer that lies beside a model, None where there is none to load."""
    try:
        return AutoTokenizer.from_pretrained(name, local_files_only=Path(name).is_dir())
    except Exception:  # whatever is wrong with its files: what needs none goes on without it
        return None


def read_calibration(path: Path) -> str:
    """Return the text of the file that --calibration names.

    Raises:
        ConfigError: it is not in UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"--calibration takes a text in UTF-8; {str(path)!r} is not one ({error}).") from error


def check_folder(out: Path) -> None:
    """Find out before anything is loaded whether OUT can be written, leaving nothing behind.

    Raises:
        ConfigError: it cannot.
    """
    if out.exists() and not out.is_dir():
        raise ConfigError(f"OUT is the folder to write; {str(out)!r} is a file.")
    nearest = next(path for path in (out, *out.absolute().parents) if path.exists())
    try:
        with TemporaryDirectory(dir=nearest):
            pass
    except OSError as error:
        raise ConfigError(
            f"OUT cannot be written: {nearest} takes no files ({error.strerror or error}). Name another folder."
        ) from error


def untimed_plan(model: PreTrainedModel, configs: list[Config], draft_model: Any = None) -> Plan:
    """Return the plan of `configs` and every exact step that fits, untimed; speculation must fit.

    Raises:
        UnsupportedModelError: the model cannot be optimised, or not be speculated for.
    """
    setting = Setting.of(model, draft_model=draft_model)
    checked(Plan.of([config for config in configs if isinstance(config, SpeculativeConfig)]), setting)
    return untimed(setting, configs)


def make_plan(model: PreTrainedModel, goal: str, configs: Sequence[Config] = (), draft_model: Any = None) -> Plan:
    """Return the plan for `goal` beside `configs`, timed on `model`, with a progress bar.

    Raises:
        ConfigError: there is no such goal.
        UnsupportedModelError: the model cannot be optimised, or not by these configs.
    """
    with progress("timing what pays on this machine") as step:
        setting = Setting.of(model, draft_model=draft_model, progress=step)
        if not configs:
            return plan_goal(setting, goal)
        goal_called(goal)
        return plan_beside(setting, goal, Named.of(configs, setting))


def few_bits(bits: int | None, group_size: int | None) -> list[Config]:
    """Return the config that --bits and --group-size ask for, if any.

    Raises:
        ConfigError: a value does not fit, or --group-size stands alone.
    """
    if bits is None and group_size is not None:
        raise ConfigError("--group-size belongs to --bits; give both.")
    return [] if bits is None else [WeightOnlyConfig(bits=bits, group_size=group_size)]
