"""What steps are applied in: the model as it is now, and what belongs to one session of optimising it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from hf_accel.core.journal import Journal
from hf_accel.core.model.anatomy import Anatomy


class Setting:
    """One session over one model.

    anatomy: the model as it is now; steps that change its architecture make it be described anew.
    draft_model: a smaller model with the same tokenizer, if the user has one.
    progress: called after each part of a step that takes long.
    originals: what becomes of weights that steps replace, see `Journal`.
    is_glance: nothing will be applied, so that what takes a run of the model to know is not asked.
    calibration: the text that the user gave, a `hf_accel.measure.quality.CalibrationText`, if any.
    """

    def __init__(
        self,
        anatomy: Anatomy,
        *,
        draft_model: Any = None,
        progress: Callable[[], None] | None = None,
        originals: str = "keep",
    ) -> None:
        """Begin a session.

        Raises:
            ConfigError: originals is none of "keep", "cpu" and "drop".
        """
        Journal(originals)  # refuses what it does not know before anything is measured
        self.anatomy, self.draft_model, self.progress, self.originals = anatomy, draft_model, progress, originals
        self.calibration: Any = None
        self.is_glance = False
        # what was made of a weight, or found out about a layer, by the weight, which copies of the model share
        self._prepared: WeakIdKeyDictionary | None = None

    @classmethod
    def of(cls, model: Any, **session: Any) -> Setting:
        """Begin a session over `model`, looking through PEFT wrappers and pipelines.

        Raises:
            UnsupportedModelError: it cannot generate text token by token, is split over devices or not in memory.
            ConfigError: an argument does not fit.
        """
        return cls(Anatomy.of(model), **session)

    @property
    def model(self) -> Any:
        return self.anatomy.model

    def over(self, model: Any, *, originals: str = "keep") -> Setting:
        """Return a session over a copy of the model that shares its tensors, with what was prepared for them."""
        found = Setting(
            Anatomy.of(model, self.anatomy.known),
            draft_model=self.draft_model,
            progress=self.progress,
            originals=originals,
        )
        found._prepared, found.calibration = self._prepared, self.calibration
        return found

    def describe_anew(self) -> None:
        """Describe the model again: a step has changed what it is made of."""
        self.anatomy = Anatomy.of(self.model)

    def advance(self) -> None:
        """Tell the user that a part of a long step is done."""
        if self.progress is not None:
            self.progress()

    def keep_prepared(self) -> None:
        """Keep from now on what steps make of weights and find out about layers: they are applied again and again."""
        if self._prepared is None:
            self._prepared = WeakIdKeyDictionary()

    @property
    def keeps_prepared(self) -> bool:
        return self._prepared is not None

    def prepared_for(self, module: nn.Module) -> dict[Any, Any]:
        """Return what is kept for a module, by its first weight; a dictionary of no use where nothing is kept."""
        weight = next(module.parameters(), None)
        if self._prepared is None or weight is None:
            return {}
        found: dict[Any, Any] = self._prepared.setdefault(weight, {})
        return found
