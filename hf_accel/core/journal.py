"""The journal is the only code that writes to a model, so that everything written can be taken back.

Each write is recorded with its inverse; `undo` runs the inverses in reverse order (the stack of pytest's MonkeyPatch).
"""

from __future__ import annotations

import copyreg
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from hf_accel.errors import ConfigError, IrreversibleError

ORIGINALS = ("keep", "cpu", "drop")
_MISSING = object()


def subclass(mixin: type, original: type, **attributes: Any) -> type:
    """Return a class that behaves as `mixin` over `original` and is named, copied and pickled as `original`.

    The names matter: `save_pretrained` writes the class name into config.json and transformers reads the class's
    module to decide what a model supports. Copies and pickles are of the original class, so they neither need
    hf_accel nor share anything with the patched object. `attributes` live on the class, never on the instance, so
    `state_dict`, `__dict__` and copies do not see them.
    """

    copied_as = vars(original).get("_hf_accel_copied_as", original)  # beneath all mixins

    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        state = object.__reduce_ex__(self, max(2, protocol))
        # not `copyreg.__newobj__`: pickle insists that its class is the object's own
        return (copyreg._reconstructor, (copied_as, object, None), *state[2:])  # type: ignore[attr-defined]

    names = {name: getattr(original, name) for name in ("__module__", "__qualname__", "__doc__")}
    own = {"_hf_accel_copied_as": copied_as, "__reduce_ex__": __reduce_ex__}
    return type(original.__name__, (mixin, original), {**names, **attributes, **own})


def beneath(mixin: type, instance: Any, name: str) -> Any:
    """Return the method `name` that `instance` has beneath `mixin`, as `super()` would within the mixin.

    Another thread may take the mixin off while a method of it runs; then `super()` fails, and this gives the method
    that the instance has now.
    """
    classes = type(instance).__mro__
    if mixin in classes:
        classes = classes[classes.index(mixin) + 1 :]
    found = next(vars(cls)[name] for cls in classes if name in vars(cls))
    return found.__get__(instance)


class Journal:
    """The undo stack of one model.

    originals: what becomes of modules that lossy steps replace. "keep": they stay where they are, beside the
    replacement; "cpu": they wait in main memory; "drop": they are given up, and nothing can be undone any more.
    """

    def __init__(self, originals: str = "keep") -> None:
        if originals not in ORIGINALS:
            raise ConfigError(f"originals is one of {', '.join(ORIGINALS)}; {originals!r} was given.")
        self.originals = originals
        self.given_up: list[str] = []
        self._undo: list[Callable[[], None]] = []
        self._first: list[tuple[int, Callable[[], None]]] = []

    def __len__(self) -> int:
        return len(self._undo)

    def did(self, undo: Callable[[], None]) -> None:
        """Record that something was done which `undo` takes back."""
        self._undo.append(undo)

    def first(self, prepare: Callable[[], None]) -> None:
        """Record what `undo` has to do before anything else: where that raises, nothing is undone."""
        self._first.append((len(self._undo), prepare))

    def refuse(self, reason: str) -> None:
        """Refuse to undo everything: for this reason there is nothing to go back to. Later writes may be undone."""

        def refused() -> None:
            raise IrreversibleError(f"The model cannot be restored: {reason}. Load it anew.")

        self._first.insert(0, (0, refused))

    def set_attribute(self, owner: Any, name: str, value: Any) -> None:
        """Set `owner.name`; undoing restores the very object, or removes the attribute if the instance had none."""
        before = vars(owner).get(name, _MISSING)
        setattr(owner, name, value)
        self.did(lambda: delattr(owner, name) if before is _MISSING else setattr(owner, name, before))

    def swap_module(self, parent: nn.Module, name: str, module: nn.Module) -> None:
        """Replace the child `name` of `parent`; what becomes of it is said by `originals`."""
        before = parent._modules[name]
        parent._modules[name] = module
        if self.originals == "drop":
            self.given_up.append(name)
            return
        homes = self._move_to_cpu(before) if self.originals == "cpu" and before is not None else {}

        def undo() -> None:
            for parameter, device in homes.items():
                parameter.data = parameter.data.to(device)
            parent._modules[name] = before

        self.did(undo)

    def replace_module(self, parent: nn.Module, name: str, module: nn.Module) -> None:
        """Put `module` in the place of one that an earlier `swap_module` of this journal put there, which is given up.

        Undoing that swap puts back what was there before it.
        """
        parent._modules[name] = module

    def freeze(self, parameter: nn.Parameter) -> None:
        """Take `requires_grad` away from a parameter."""
        if parameter.requires_grad:
            parameter.requires_grad_(False)
            self.did(lambda: setattr(parameter, "requires_grad", True))

    @staticmethod
    def _move_to_cpu(module: nn.Module) -> dict[nn.Parameter, torch.device]:
        homes = {p: p.device for p in module.parameters() if p.device.type != "cpu"}
        for parameter in homes:
            parameter.data = parameter.data.cpu()
        return homes

    def swap_class(self, instance: Any, cls: type) -> None:
        """Give `instance` the class `cls`, a `subclass` of its own."""
        before = type(instance)
        instance.__class__ = cls

        def undo() -> None:
            instance.__class__ = before

        self.did(undo)

    def undo(self, down_to: int = 0) -> None:
        """Take back every write after the first `down_to`, the latest first.

        Raises:
            IrreversibleError: originals were given up or lost; nothing was undone.
        """
        if self.given_up:
            raise IrreversibleError(
                f'{len(self.given_up)} original modules were given up (originals="drop"), so the model cannot be '
                'restored. Load it anew, or optimise with originals="keep" or "cpu".'
            )
        for place, prepare in self._first:
            if place >= down_to:
                prepare()
        self._first = [(place, prepare) for place, prepare in self._first if place < down_to]
        while len(self._undo) > down_to:
            self._undo.pop()()
