"""The token loop of greedy decoding and sampling, over inputs, processors and criteria that stock `generate` prepared.

Cost: one forward pass and about 60 µs of Python per token. Everything that changes the result (processors, sampling,
stopping criteria, padding of finished rows) is done in stock's order and precision, so scores and tokens are stock's.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.generation.utils import GenerateDecoderOnlyOutput

from hf_accel.core.calls.call import Call
from hf_accel.core.calls.doors import MAKERS, Door
from hf_accel.core.calls.drafting import Speculation
from hf_accel.core.calls.forward import recording, stop_recording
from hf_accel.core.calls.hosting import Host
from hf_accel.core.config import Config
from hf_accel.core.drift import CACHE
from hf_accel.core.steps.goal import Gain
from hf_accel.core.steps.patcher import Change, Fidelity, Patcher, Stage
from hf_accel.core.steps.setting import Setting
from hf_accel.decoding.steps import PlainSteps, Step, Steps
from hf_accel.decoding.verification import VerifiedSteps, verification_objection


@dataclass(frozen=True, kw_only=True)
class DecodingConfig(Config):
    """Greedy decoding and sampling through a token loop of our own; other strategies stay with stock `generate`."""


class DecodingPatcher(Patcher[DecodingConfig], config=DecodingConfig):
    stage = Stage.DECODING
    fidelity = Fidelity.EXACT
    occupies = "token loop"
    gain = Gain.OVERHEAD

    def obstacles(self, setting: Setting) -> list[str]:
        return []

    def patch(self, setting: Setting, host: Host) -> Change:
        host.stand(Door.TOKEN_LOOP, TokenLoop())
        return Change("greedy decoding and sampling run in our token loop")


@dataclass
class Collected:
    """What `return_dict_in_generate` asks to keep of every step; a tuple per kind, None where not asked for."""

    scores: tuple[Any, ...] | None = None
    logits: tuple[Any, ...] | None = None
    attentions: tuple[Any, ...] | None = None
    hidden_states: tuple[Any, ...] | None = None
    wanted: dict[str, bool] = field(default_factory=dict)

    @classmethod
    def for_config(cls, config: Any) -> Collected:
        names = ("scores", "logits", "attentions", "hidden_states")
        wanted = {name: bool(config.return_dict_in_generate and getattr(config, f"output_{name}")) for name in names}
        return cls(**{name: () if wanted[name] else None for name in names}, wanted=wanted)  # type: ignore[arg-type]

    def add(self, step: Step) -> None:
        if self.scores is not None:
            self.scores += (step.scores,)
        if self.logits is not None:
            self.logits += (step.logits,)
        if self.attentions is not None:
            self.attentions += (step.outputs.attentions,)
        if self.hidden_states is not None:
            self.hidden_states += (step.outputs.hidden_states,)


class TokenLoop:
    """Serves the calls that `obstacle` lets through."""

    def obstacle(self, call: Call) -> str | None:
        """Return why stock must serve this call, None if this loop does."""
        if call.synced_gpus:
            return "synced_gpus"
        if call.model._valid_auto_compile_criteria(call.model_kwargs, call.generation_config):
            return "the caller's cache and compile settings ask for a compiled forward"
        if call.input_ids.device.type == "mps":
            return "deferred stopping on mps"
        return None

    def run(self, call: Call) -> Any:
        """Generate; returns what stock's `_sample` would: ids [B, S], or a GenerateDecoderOnlyOutput."""
        speculation = self._speculation(call)
        with recording(call.model_kwargs[CACHE]) if speculation else nullcontext():
            return self._write(call, speculation)

    def _write(self, call: Call, speculation: Speculation | None) -> Any:
        model, config, input_ids, streamer = call.model, call.generation_config, call.input_ids, call.streamer
        criteria = call.stopping_criteria
        pad: Any = config._pad_token_tensor
        pad = pad.to(input_ids.device) if pad is not None else None
        pads_finished_rows = any(hasattr(criterion, "eos_token_id") for criterion in criteria)
        unfinished = torch.ones(input_ids.shape[0], dtype=torch.long, device=input_ids.device)
        kept = Collected.for_config(config)
        keeps_any = any(kept.wanted.values())

        outputs = model._prefill(input_ids, config, call.model_kwargs, is_first_iteration=not config.is_assistant)
        steps = self._steps(call, speculation, outputs)
        del outputs
        with model._optimize_model_for_decode():
            while True:
                step = steps.next(input_ids, unfinished)
                if keeps_any:
                    kept.add(step)
                tokens = step.tokens
                if pads_finished_rows:
                    tokens = tokens * unfinished + pad * (1 - unfinished)
                del step
                input_ids = torch.cat([input_ids, tokens[:, None]], dim=-1)
                unfinished = unfinished & ~criteria(input_ids, kept.scores)
                if streamer is not None:
                    streamer.put(tokens.cpu())
                if not unfinished.any():
                    break
        steps.close(input_ids)
        if streamer is not None:
            streamer.end()
        if not config.return_dict_in_generate:
            return input_ids
        return GenerateDecoderOnlyOutput(
            sequences=input_ids,  # type: ignore[arg-type]
            scores=kept.scores,
            logits=kept.logits,
            attentions=kept.attentions,
            hidden_states=kept.hidden_states,
            **{CACHE: steps.cache},
        )

    @staticmethod
    def _speculation(call: Call) -> Speculation | None:
        """Return what speculates in this call, None for plain decoding."""
        speculation: Speculation | None = call.doors.get(Door.DRAFTS)
        if speculation is None:
            return None
        reason = verification_objection(call) or speculation.objection(call)
        if reason is None:
            return speculation
        speculation.skip(reason)
        return None

    @staticmethod
    def _steps(call: Call, speculation: Speculation | None, outputs: Any) -> Steps:
        if speculation is None:
            return PlainSteps(call, outputs)
        reason = VerifiedSteps.objection(call, outputs)
        if reason is None:
            return VerifiedSteps(call, speculation, outputs)
        speculation.skip(reason)
        if not call.has_callers_cache:  # whose windows may record for reasons of the caller's
            stop_recording(call.model_kwargs[CACHE].layers)
        return PlainSteps(call, outputs)


MAKERS[Door.TOKEN_LOOP] = TokenLoop
