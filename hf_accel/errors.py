"""Every error of hf_accel, in one tree.

    HfAccelError
    ├── ConfigError (ValueError)            a goal, config or value that does not exist or does not fit
    ├── UnsupportedModelError (TypeError)   a model that cannot be optimised, or not in the way that was asked
    ├── ConflictError (RuntimeError)        two steps that claim the same place, or a model already optimised
    ├── MissingDependencyError (ImportError) an optional package is needed; names the extra that brings it
    ├── VerificationError (RuntimeError)    a patched model broke its promise; everything was undone
    ├── IrreversibleError (RuntimeError)    `restore` of a model whose originals were given up
    ├── CheckpointError (RuntimeError)      a file that is damaged, truncated or of another format
    ├── StorageError (RuntimeError)         a cache or experts find no room, or lost what they had moved to a file
    ├── CancelledCallError (RuntimeError)   a call of `generate` that whoever made it wants no longer
    └── ReplicaError (RuntimeError)         no replica answered a request, or none could be started

Each message says what was asked, what was found and what to do. After any of them the model is as it was before,
but for an error in the middle of a step with originals="drop", which says so. A StorageError or a CancelledCallError
ends one call of `generate`; others are not affected.
"""


class HfAccelError(Exception):
    """Base of every error that hf_accel raises on purpose."""


class ConfigError(HfAccelError, ValueError):
    """A goal, a config or one of its values does not exist or does not fit."""


class UnsupportedModelError(HfAccelError, TypeError):
    """The model cannot be optimised, or not in the way that was asked for."""


class ConflictError(HfAccelError, RuntimeError):
    """Two steps claim the same place of the model, or the model is already optimised."""


class MissingDependencyError(HfAccelError, ImportError):
    """An optional package is missing; the message names the extra of hf-accel that installs it."""


class VerificationError(HfAccelError, RuntimeError):
    """The patched model did not keep its promise. The model has been restored."""


class IrreversibleError(HfAccelError, RuntimeError):
    """The originals were given up, so the model cannot be restored."""


class CheckpointError(HfAccelError, RuntimeError):
    """A checkpoint file is damaged, truncated or of another format; the message names file and tensor."""


class StorageError(HfAccelError, RuntimeError):
    """Cache blocks or experts do not fit where they were told to go, or their file was damaged or lost."""


class CancelledCallError(HfAccelError, RuntimeError):
    """The call was cancelled by whoever made it."""


class ReplicaError(HfAccelError, RuntimeError):
    """No replica answered a request within its tries or its time, or replicas could not be started."""


def described(error: BaseException) -> str:
    """Return kind and first line of an error that is not of this tree, for a sentence about what failed."""
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
