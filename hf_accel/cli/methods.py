"""What `hf-accel quantize --method` offers: a line for each, from what was asked to the config that does it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_accel.core.config import Config
from hf_accel.errors import ConfigError
from hf_accel.quantization import GPTQConfig, MixedPrecisionConfig, QATConfig, WeightOnlyConfig


@dataclass(frozen=True)
class Asked:
    """What was asked for on the command line: the bits, the options of every method, and those of some.

    shared: fields that all configs of weights in few bits have. folder: where finished layers are kept, if anywhere.
    """

    bits: float
    shared: dict[str, Any]
    refine_steps: int = 0
    folder: Path | None = None
    minutes: float | None = None

    @property
    def products(self) -> dict[str, Any]:
        """The fields of configs with one number of bits."""
        return {"bits": int(self.bits) if self.bits == int(self.bits) else self.bits} | self.shared

    @property
    def unnamed(self) -> dict[str, Any]:
        """The fields of configs that choose the bits of each product."""
        return {name: value for name, value in self.shared.items() if name not in ("layers", "symmetric")}

    @property
    def trained(self) -> dict[str, Any]:
        """The fields of configs for training, which leave the head and the embeddings as they are."""
        if self.shared["embeddings"] is not None:
            raise ConfigError("--embeddings are not trained in few bits; leave them out with --method qat.")
        return {name: value for name, value in self.products.items() if name not in ("head", "embeddings")}

    @property
    def calibrated(self) -> dict[str, Any]:
        """The fields of configs that choose codes on text."""
        folder = None if self.folder is None else str(self.folder)
        return self.products | {"refine_steps": self.refine_steps, "folder": folder}


@dataclass(frozen=True)
class Method:
    """A way to choose weights.

    config: makes the config; help: what it does, in a few words; resumes, refines, names, trains: whether it takes
    --resume, --refine-steps, --layer and --asymmetric, and --minutes.
    """

    config: Callable[[Asked], Config]
    help: str
    resumes: bool = False
    refines: bool = False
    names: bool = True
    trains: bool = False


METHODS: dict[str, Method] = {
    "nearest": Method(lambda asked: WeightOnlyConfig(**asked.products), "rounds; needs no text"),
    "gptq": Method(lambda asked: GPTQConfig(**asked.calibrated), "chooses codes on text", resumes=True, refines=True),
    "awq": Method(
        lambda asked: GPTQConfig(scaling="awq", solver="nearest", **asked.calibrated),
        "scales by what is read, and rounds",
        resumes=True,
        refines=True,
    ),
    "mixed": Method(
        lambda asked: MixedPrecisionConfig(average_bits=asked.bits, refine_steps=asked.refine_steps, **asked.unnamed),
        "bits where they matter, --bits on average, scales included",
        refines=True,
        names=False,
    ),
    "qat": Method(
        lambda asked: QATConfig(refine_steps=asked.refine_steps, **asked.trained),
        "trains in few bits for --minutes",
        resumes=True,
        refines=True,
        trains=True,
    ),
}


def chosen_config(name: str, asked: Asked) -> Config:
    """Return the config of the method called `name`.

    Raises:
        ConfigError: there is no such method, it has not the options that were given, or a value does not fit.
    """
    method = METHODS.get(name)
    if method is None:
        raise ConfigError(f"--method is one of {', '.join(METHODS)}; {name!r} was given.")
    for is_given, trait, option in (
        (asked.folder is not None, "resumes", "--resume"),
        (bool(asked.refine_steps), "refines", "--refine-steps"),
        (bool(asked.shared["layers"]), "names", "--layer"),
        (not asked.shared["symmetric"], "names", "--asymmetric"),
        (asked.minutes is not None, "trains", "--minutes"),
    ):
        if is_given and not getattr(method, trait):
            those = [other for other, found in METHODS.items() if getattr(found, trait)]
            raise ConfigError(f"{option} belongs to --method {', '.join(those)}; the method is {name!r}.")
    return method.config(asked)
