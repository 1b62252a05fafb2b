"""What a request asks for, whichever of the two forms it came in."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What one `generate` call is to do; None: as the model's own generation config says.

    new_tokens: at most. temperature: 0 is greedy. stop: texts that end the text and are not part of it. bias: what is
    added to the scores of tokens. logprobs: how many alternatives of each token are reported; None: nothing is.
    """

    choices: int = 1
    new_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    bias: dict[int, float] = field(default_factory=dict)
    logprobs: int | None = None

    @property
    def samples(self) -> bool | None:
        """Whether tokens are drawn; None: as the model's own generation config says.

        A request that names a temperature or a mass asks for drawing, but for a temperature of 0.
        """
        if self.temperature is None and self.top_p is None:
            return None
        return self.temperature != 0
