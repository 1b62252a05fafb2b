"""One line per config: the example with which the contract tests run it."""

from __future__ import annotations

from transformers import PreTrainedModel

import hf_accel
from hf_accel.core.config import Config
from hf_accel.core.steps.patcher import Fidelity, Patcher
from hf_accel.core.steps.setting import Setting

CATALOGUE: list[Config] = [
    hf_accel.WeightOnlyConfig(bits=8),
    hf_accel.GPTQConfig(bits=3, group_size=32, refine_steps=2),
    hf_accel.QATConfig(bits=3, group_size=32, start="nearest"),
    hf_accel.MixedPrecisionConfig(average_bits=15, choices=(8, 16), method="nearest"),
    hf_accel.CompressedTensorsConfig(),
    hf_accel.NativeLinearConfig(max_rows=16),
    hf_accel.NativeExpertsConfig(),
    hf_accel.ExpertOffloadConfig(share=0.7),
    hf_accel.SharedProjectionConfig(max_rows=16),
    hf_accel.LargePagesConfig(),
    hf_accel.DecoderBlockConfig(max_rows=16),
    hf_accel.DeviceBlockConfig(max_rows=16),
    hf_accel.RecurrentStepConfig(),
    hf_accel.AttentionConfig(),
    hf_accel.KVCacheConfig(),
    hf_accel.DecodingConfig(),
    # drafts always, so that every call of every test is verified step by step
    hf_accel.SpeculativeConfig(drafter="lookup", max_draft_tokens=4, adaptive=False),
    hf_accel.CompilationConfig(),
    hf_accel.BatchingConfig(),
    hf_accel.GQAConfig(num_kv_heads=1, method="mean"),
]
# the others change the weights, and with them the text, copies and what is saved
LOSSLESS = [config for config in CATALOGUE if Patcher.for_config(config).fidelity is not Fidelity.LOSSY]
# no goal offers them: one saves memory and takes time, one may take memory, one is for calls that come at once
BY_NAME_ONLY = ("BatchingConfig", "ExpertOffloadConfig", "LargePagesConfig")


def example(name: str) -> Config:
    """Return the example of the config class called `name`."""
    return next(config for config in CATALOGUE if type(config).__name__ == name)


def fits(config: Config, model: PreTrainedModel) -> bool:
    """Return whether the config's patcher has no obstacle on this model."""
    return not Patcher.for_config(config).obstacles(Setting.of(model))


def exact(model: PreTrainedModel, *without: type[Config], speculates: bool = False) -> list[Config]:
    """Return everything the goal "exact" could choose on this model, untimed: of two claims to one place the first.

    speculates: whether drafts are verified; plain steps are another way through the token loop.
    """
    # that calls may join shows where several come at once
    without = (*without, hf_accel.BatchingConfig)
    left_out = without if speculates else (*without, hf_accel.SpeculativeConfig)
    chosen: dict[str, Config] = {}
    for config in LOSSLESS:
        if type(config) not in left_out and fits(config, model):
            chosen.setdefault(Patcher.for_config(config).occupies, config)
    return list(chosen.values())
