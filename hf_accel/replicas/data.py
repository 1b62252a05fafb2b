"""Text for every row of a data set, on Ray Data's pool of actors: each has one model, and Ray replaces dead ones."""

from __future__ import annotations

from typing import Any

import numpy as np
import xxhash

from hf_accel.errors import ConfigError, HfAccelError, described
from hf_accel.replicas.batch import texts_of
from hf_accel.replicas.package import ray_module
from hf_accel.replicas.recipe import ModelRecipe
from hf_accel.replicas.threads import use_granted


class Batches:
    """What `map_batches` calls, in an actor of its own: it adds columns to a batch, and keeps rows and their order.

    Args:
        recipe: how the model is made.
        column: the column with the texts that are written on; output: the new column, with what follows on each.
        errors: "raise": a row that cannot be written on is an error of the whole; "column": its output is None, and the
            column `error` says why, None for the other rows.
        seed: of what is drawn; batches of other texts draw otherwise.
        options: of `generate`.

    Raises:
        ConfigError: a value does not fit.
    """

    def __init__(
        self,
        recipe: ModelRecipe,
        column: str = "prompt",
        output: str = "text",
        errors: str = "raise",
        seed: int = 0,
        **options: Any,
    ) -> None:
        check_errors(errors)
        self.column, self.output, self.errors = column, output, errors
        self.seed, self.options = seed, options
        use_granted(ray_module().get_runtime_context(), recipe.threads)
        made = recipe.make()
        if made.tokenizer is None:
            raise ConfigError("Rows are texts, and the recipe gives no tokenizer: name one with tokenizer=...")
        self.model, self.tokenizer = made

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return the batch with its new columns.

        Raises:
            ConfigError: there is no such column, or, with errors="raise", a row that is no text.
            Others: with errors="raise", as `generate`.
        """
        if self.column not in batch:
            raise ConfigError(f"There is no column {self.column!r}; the data set has {', '.join(batch)}.")
        rows = list(batch[self.column])
        seed = xxhash.xxh3_64_intdigest(repr([self.seed, rows]).encode()) >> 1
        failed: list[str | None] = [None] * len(rows)
        found: list[str | None]
        try:
            found = [*texts_of(self.model, self.tokenizer, rows, seed, self.options)]
        except Exception:
            if self.errors == "raise":
                raise
            found = [None] * len(rows)
            for place, row in enumerate(rows):
                found[place], failed[place] = self._one(row, seed)
        added = {self.output: np.array(found, dtype=object)}
        if self.errors == "column":
            added["error"] = np.array(failed, dtype=object)
        return {**batch, **added}

    def _one(self, row: Any, seed: int) -> tuple[str | None, str | None]:
        try:
            return texts_of(self.model, self.tokenizer, [row], seed, self.options)[0], None
        except Exception as error:
            return None, str(error) if isinstance(error, HfAccelError) else described(error)


def check_errors(errors: str) -> None:
    """Check the name of what becomes of rows that fail.

    Raises:
        ConfigError: there is no such way.
    """
    if errors not in ("raise", "column"):
        raise ConfigError(f'errors is {errors!r}; it is "raise" or "column".')


def generate(
    dataset: Any, recipe: ModelRecipe, *, workers: int = 2, cpus: int = 1, batch_size: int = 8, **options: Any
) -> Any:
    """Return the data set with a column of texts, which a pool of actors writes as it is read; rows keep their order.

    Args:
        dataset: a `ray.data.Dataset`.
        recipe: how each actor makes its model.
        workers: actors in the pool; cpus: CPUs, and so threads, of each.
        batch_size: rows that are written together, padded on the left.
        options: of `Batches`: `column`, `output`, `errors`, `seed`, and those of `generate`.

    Raises:
        MissingDependencyError: ray is not installed.
        ConfigError: `errors` does not fit. What goes wrong in a row is raised where the data set is read.
    """
    data = ray_module("ray.data")
    check_errors(options.get("errors", "raise"))
    found = dataset.map_batches(
        Batches,
        fn_constructor_args=(recipe,),
        fn_constructor_kwargs=options,
        compute=data.ActorPoolStrategy(size=workers),
        num_cpus=cpus,
        batch_size=batch_size,
    )
    found.context.execution_options.preserve_order = True
    return found
