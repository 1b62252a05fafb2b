"""The step that has recurrent mixers take a single token in one native call between their projections.

Stock makes 20 to 60 small operators of it per layer and token, each of which reads and writes the state or parts of it
as a whole. The native call reads and writes the states once, where the cache holds them.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from hf_accel.core.calls.hosting import Host
from hf_accel.core.config import Config
from hf_accel.core.journal import subclass
from hf_accel.core.model.watching import Surroundings
from hf_accel.core.steps.patcher import Change, Fidelity, Patcher, Stage
from hf_accel.core.steps.setting import Setting
from hf_accel.errors import VerificationError
from hf_accel.kernels import native
from hf_accel.recurrent.audit import audited
from hf_accel.recurrent.forms import Form
from hf_accel.recurrent.mixers import mixers_of
from hf_accel.recurrent.step import MixerStep, NativeMixer, native_forward
from hf_accel.recurrent.trial import MARGIN, share_of_time

_AUDITED = "audited as a recurrent mixer"


@dataclass(frozen=True, kw_only=True)
class RecurrentStepConfig(Config):
    """Recurrent mixers (gated delta rule, Mamba, Mamba-2, short convolutions) take a single token natively.

    Mixers of a kind that a short trial shows not to be faster so run as they are.
    """


class RecurrentStepPatcher(Patcher[RecurrentStepConfig], config=RecurrentStepConfig):
    stage = Stage.ATTENTION
    fidelity = Fidelity.EXACT
    occupies = "recurrent mixers"
    is_preferred = True

    def obstacles(self, setting: Setting) -> list[str]:
        anatomy = setting.anatomy
        found = native.obstacles(anatomy.device)
        if anatomy.dtype not in native.DTYPES:
            found.append(f"the native library has no {anatomy.dtype} mixers.")
        if not mixers_of(anatomy.model):
            found.append("the model has no recurrent mixers.")
        return found

    def patch(self, setting: Setting, host: Host) -> Change:
        mixers = mixers_of(setting.model)
        forms, skipped = self._forms(setting, mixers)
        chosen = {path: form for path, form in forms.items() if form is not None}
        modules = [part for path, form in chosen.items() for part in (mixers[path], *form.read(mixers[path]))]
        surroundings = Surroundings(modules)
        counts: Counter[str] = Counter()
        for index, (path, form) in enumerate(chosen.items()):
            module = mixers[path]
            try:
                step = MixerStep(module, form, index, surroundings)
            except (ValueError, RuntimeError) as error:
                skipped.append(f"the mixer {path} runs as it is: {error}")
                continue
            if step.watch.is_hooked():
                skipped.append(f"the mixer {path} is hooked, and runs as it is as long as it is")
            made = subclass(NativeMixer, type(module), step=step, forward=native_forward(step, type(module)))
            host.journal.swap_class(module, made)
            counts[form.title] += 1
        if not counts:
            raise VerificationError(
                f"None of the model's {len(mixers)} recurrent mixers runs natively: {'; '.join(skipped)}. "
                "Leave RecurrentStepConfig out for this model."
            )
        kinds = ", ".join(f"{count} of the {title}" for title, count in counts.items())
        return Change(f"{sum(counts.values())} mixers take a token natively: {kinds}", skipped=tuple(skipped))

    def _forms(self, setting: Setting, mixers: dict[str, Any]) -> tuple[dict[str, Form | None], list[str]]:
        """Return path -> form, None of mixers that stay as they are, and sentences on these."""
        kept = {path: setting.prepared_for(module) for path, module in mixers.items()}
        if not all(_AUDITED in found for found in kept.values()):
            for path, mixer in audited(setting.model).items():
                form, reason = mixer.form, mixer.reason
                share = 0.0 if form is None else share_of_time(mixer, form)
                if share > MARGIN:
                    form, reason = None, f"a native step takes {share:.0%} of the time of its own"
                kept[path][_AUDITED] = form, reason
        found = {path: kept[path][_AUDITED] for path in mixers}
        reasons = Counter(reason for form, reason in found.values() if form is None)
        skipped = [f"{count} mixers run as they are: {reason}" for reason, count in reasons.items()]
        return {path: form for path, (form, _) in found.items()}, skipped
