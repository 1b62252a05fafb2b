"""What a benchmark generates: random prompts, how many tokens, greedily or by sampling, and how often."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_accel.errors import ConfigError


def random_prompt(model: PreTrainedModel, tokens: int, batch: int = 1, seed: int = 1) -> torch.Tensor:
    """Return random token ids [batch, tokens] on the model's device."""
    embeddings: Any = model.get_input_embeddings()
    vocabulary = embeddings.weight.shape[0]
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(min(5, vocabulary - 1), vocabulary, (batch, tokens), generator=generator).to(model.device)


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What is generated, and how often. Sampling draws from the same seed on both sides."""

    prompt_tokens: int = 128
    new_tokens: int = 64
    batch: int = 1
    has_left_padding: bool = False
    samples: bool = False
    top_k: int | None = None
    top_p: float | None = None
    temperature: float | None = None
    rounds: int = 5

    def __post_init__(self) -> None:
        if self.has_left_padding and self.batch < 2:
            raise ConfigError("Left padding comes from rows of different length; give a batch of at least 2.")
        if not self.samples and {self.top_k, self.top_p, self.temperature} != {None}:
            raise ConfigError("top-k, top-p and temperature belong to sampling; ask for sampling as well.")
        if min(self.prompt_tokens, self.batch, self.rounds) < 1 or self.new_tokens < 2:
            raise ConfigError("A benchmark needs at least 1 prompt token, 2 new tokens, 1 row and 1 round.")

    def inputs(self, model: PreTrainedModel) -> dict[str, torch.Tensor]:
        """Return random `input_ids` and their `attention_mask`, [batch, prompt_tokens] each.

        With left padding the first row is full and every further one shorter, down to about half.
        """
        ids = random_prompt(model, self.prompt_tokens, self.batch)
        mask = torch.ones_like(ids)
        if self.has_left_padding:
            for row in range(self.batch):
                mask[row, : self.prompt_tokens * row // (2 * self.batch)] = 0
        return {"input_ids": ids, "attention_mask": mask}

    def arguments(self, model: PreTrainedModel) -> dict[str, Any]:
        """Return the other arguments of `generate`."""
        config: Any = model.generation_config
        chosen = {name: getattr(self, name) for name in ("top_k", "top_p", "temperature")}
        pad = config.pad_token_id if config.pad_token_id is not None else 0
        given = {name: value for name, value in chosen.items() if value is not None}
        return given | {"do_sample": self.samples, "num_beams": 1, "pad_token_id": pad}
