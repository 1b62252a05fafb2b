"""What a model does before and after its decoder layers, found by running it without them (`hollow`).

Which row of which table begins a token, which norm follows on the last layer, what becomes of the head's product: each
has few readings, and one that gives the model's own values bit by bit is taken. Cost: a pass of a few tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hf_accel.core.model.discovery.hollow import Hollow
from hf_accel.core.model.discovery.norms import NormForm, described_norm
from hf_accel.core.model.discovery.readings import Unexplained

TOKENS, START = 5, 3
OFFSETS = range(4)  # OPT's positions begin at the third row of their table


@dataclass(frozen=True)
class EndsForm:
    """Paths of modules and constants, as `hf_accel.kernels.native.StepEnds` says. norm: None where there is none."""

    embedding: str
    scale: float
    positions: str | None
    offset: int
    norm: NormForm | None
    head: str
    logit_scale: float
    softcap: float


def described_ends(hollow: Hollow) -> EndsForm:
    """Return what a model does around its layers. Raises: Unexplained with a clause for the user."""
    model, called = hollow.model, list[tuple[str, Any, Tensor, Tensor]]()
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    paths = {id(module): path for path, module in model.named_modules()}
    if not isinstance(embedding, nn.Embedding) or id(head) not in paths:
        raise Unexplained("the model has no table of tokens, or no head")

    def keep(path: str, module: Any, args: tuple[Any, ...], output: Any) -> None:
        if args and isinstance(args[0], Tensor) and isinstance(output, Tensor):
            called.append((path, module, args[0], output.clone()))

    ids = torch.randint(embedding.num_embeddings, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    hooks = [m.register_forward_hook(partial(keep, path)) for path, m in model.named_modules() if path]
    try:
        outputs, given = hollow.run(model, ids, START)
    finally:
        for hook in hooks:
            hook.remove()
    hidden = given[0][0]
    if not all(torch.equal(each, hidden) for each, _ in given):
        raise Unexplained("something stands between the layers")
    tables = [(path, m) for path, m in model.named_modules() if isinstance(m, nn.Embedding) and m is not embedding]
    scale, positions, offset = _beginning(hidden, ids, embedding, tables)
    read, product = next(((x, y) for _, module, x, y in called if module is head), (None, None))
    if read is None or product is None:
        raise Unexplained("the head is not called as a module")
    norm = None
    if not torch.equal(read, hidden):
        norms = [(p, m) for p, m, x, y in called if m is not head and x.shape == y.shape and torch.equal(x, hidden)
                 and torch.equal(y, read)]  # fmt: skip
        if not norms:
            raise Unexplained("what the head reads is no norm of the last layer's result")
        norm = described_norm(*norms[-1], hidden.shape[-1])
    values = [value for value in _numbers(model.config) if value > 0]
    logit_scale, softcap = _ending(product, outputs.logits, values)
    return EndsForm(paths[id(embedding)], scale, positions, offset, norm, paths[id(head)], logit_scale, softcap)


def _beginning(
    hidden: Tensor, ids: Tensor, embedding: nn.Embedding, tables: Iterable[tuple[str, Any]]
) -> tuple[float, str | None, int]:
    """Return scale, path of the table of positions and offset that make what the first layer is given."""
    rows = embedding.weight.detach()[ids]
    fitted = float((hidden.double() * rows.double()).sum() / rows.double().square().sum())
    for scale in (1.0, *(float(torch.tensor(s, dtype=rows.dtype)) for s in (fitted, rows.shape[-1] ** 0.5))):
        scaled = rows if scale == 1.0 else rows * scale
        if torch.equal(scaled, hidden):
            return scale, None, 0
        for path, table in tables:
            for offset in OFFSETS:
                at = torch.arange(START + offset, START + offset + ids.shape[1])
                fits = int(at[-1]) < table.num_embeddings and table.embedding_dim == rows.shape[-1]
                if fits and torch.equal(scaled + table.weight.detach()[at], hidden):
                    return scale, path, offset
    raise Unexplained("what the first layer is given is not a token's row, scaled, or with a position's")


def _ending(product: Tensor, logits: Any, values: list[float]) -> tuple[float, float]:
    """Return factor and cap that make the logits of the head's product."""
    for scale in (1.0, *values, *(1.0 / value for value in values)):
        scaled = product if scale == 1.0 else product * scale
        if torch.equal(scaled, logits):
            return scale, 0.0
        for cap in values:
            if torch.equal(torch.tanh(scaled / cap) * cap, logits):
                return scale, cap
    raise Unexplained("the logits are not the head's product, times a factor or capped")


def _numbers(config: Any) -> list[float]:
    """Return the numbers that a config holds, those of its text model included."""
    text = config.get_text_config(decoder=True)
    found = [*vars(config).values(), *vars(text).values()]
    return list(dict.fromkeys(float(v) for v in found if type(v) is float or (type(v) is int and v < 1000)))
