"""What the three generations of FlashAttention have in common: how their packages are found and called.

Padded batches run with variable lengths: the rows' tokens one after the other, [sum of lengths, H, D], and where each
row begins (`cu_seqlens`), so that padding costs a copy and no arithmetic. Causal masks end in the lower right corner.
What a release can do beyond that is read from the signature of its functions.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, ClassVar, NamedTuple

import torch
from torch.nn import functional

from hf_accel.attention.kernel import HALF, AttentionKernel
from hf_accel.attention.question import Question, Visible
from hf_accel.core.calls.bands import Band
from hf_accel.errors import described

MAX_HEAD_DIM = 256
SINKS = ("learnable_sink", "s_aux")  # the names that releases have for sinks


class FlashFunctions(NamedTuple):
    """Attention of batches [B, T, H, D], and of rows one after the other; options: the keywords both take."""

    batched: Callable[..., Any]
    ragged: Callable[..., Any]
    options: frozenset[str]


class FlashAttention(AttentionKernel):
    """One generation. module: what its package is imported as; hub: its kernel for the package `kernels`."""

    extra = "flash"
    module: ClassVar[str]
    hub: ClassVar[str]
    hub_version: ClassVar[int]
    capability: ClassVar[tuple[int, int]]  # the oldest cards that it runs on
    newest: ClassVar[int] = 99
    devices: tuple[str, ...] = ("cuda",)

    def is_tried(self, device: torch.device) -> bool:
        # kernels from the hub are loaded where they are asked for by name: that may download them
        return device.type in self.devices and _is_installed(self.module)

    def missing(self) -> str | None:
        if _is_installed(self.module):
            return _failure(self.module)
        if find_spec("kernels") is None:
            return f"neither the package {self.module} nor kernels (for {self.hub}) is installed"
        found = _from_hub(self.hub, self.hub_version)
        return found if isinstance(found, str) else None

    def functions(self) -> FlashFunctions:
        """Return the package's functions. Raises: ImportError."""
        if _is_installed(self.module):
            return _functions(importlib.import_module(self.module))
        found = _from_hub(self.hub, self.hub_version)
        if isinstance(found, str):
            raise ImportError(found)
        return _functions(found)

    def obstacle(self, question: Question) -> str | None:
        if question.device.type not in self.devices:
            return f"FlashAttention is for CUDA, not for {question.device.type}"
        if question.device.type == "cuda":
            capability = torch.cuda.get_device_capability(question.device)
            if capability < self.capability or capability[0] > self.newest:
                name = torch.cuda.get_device_name(question.device)
                return f"it is not for a {name} (compute capability {capability[0]}.{capability[1]})"
        if question.dtype not in HALF:
            return f"it has no {str(question.dtype).removeprefix('torch.')}"
        if max(question.sizes) > MAX_HEAD_DIM or question.sizes[1] > question.sizes[0]:
            return f"heads of {question.sizes} values; it takes up to {MAX_HEAD_DIM}, values no larger than keys"
        if question.mask in ("boolean", "additive"):
            return "it takes no masks but causal ones, with padding and windows"
        try:
            options = self.functions().options
        except ImportError as error:
            return described(error)
        if question.softcap is not None and "softcap" not in options:
            return "this release caps no scores"
        if question.window is not None and "window_size" not in options:
            return "this release has no windows"
        return "this release has no sinks" if question.has_sinks and not options & {*SINKS} else None

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        visible: Visible,
        scale: float,
        softcap: float | None = None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        batched, ragged, options = self.functions()
        own: dict[str, Any] = {"softmax_scale": scale, "causal": visible.is_causal}
        if softcap is not None:
            own["softcap"] = softcap
        if visible.window is not None:
            own["window_size"] = (visible.window - 1, 0)  # columns to the left of a query's own
        if sinks is not None:
            own[next(name for name in SINKS if name in options)] = sinks.to(torch.bfloat16)
        size = value.shape[3]
        if size < query.shape[3]:
            value = functional.pad(value, (0, query.shape[3] - size))
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        if visible.starts is None or visible.band is None:
            return _output(batched(q, k, v, **own))[..., :size].contiguous()
        rows = _rows(visible.band, query.device)
        lengths = {"max_seqlen_q": rows.most_queries, "max_seqlen_k": rows.most_columns}
        own |= {name: length for name, length in lengths.items() if name in _parameters(ragged)}
        packed = (_packed(x, rows.queries if x is q else rows.columns) for x in (q, k, v))
        found = ragged(*packed, cu_seqlens_q=rows.query_ends, cu_seqlens_k=rows.column_ends, **own)
        output = query.new_zeros((q.shape[0] * q.shape[1], q.shape[2], size))
        output.index_copy_(0, rows.queries, _output(found)[..., :size])
        return output.view(q.shape[0], q.shape[1], q.shape[2], size)


class _Rows(NamedTuple):
    """Where the tokens of padded rows lie in a flat batch, and where each row ends in what is packed of them."""

    queries: torch.Tensor
    columns: torch.Tensor
    query_ends: torch.Tensor
    column_ends: torch.Tensor
    most_queries: int
    most_columns: int


def _rows(band: Band, device: torch.device) -> _Rows:
    """Return the rows of a band, found out once for all layers of a pass."""
    if FlashAttention not in band.kept:
        past = band.positions - band.tokens
        columns = [band.positions - start for start in band.starts]
        queries = [min(band.tokens, band.positions - max(past, start)) for start in band.starts]

        def flat(width: int, lengths: list[int]) -> torch.Tensor:
            ends = [torch.arange((b + 1) * width - n, (b + 1) * width) for b, n in enumerate(lengths)]
            return torch.cat(ends).to(device)

        def sums(lengths: list[int]) -> torch.Tensor:
            return functional.pad(torch.tensor(lengths).cumsum(0), (1, 0)).to(device, torch.int32)

        band.kept[FlashAttention] = _Rows(
            flat(band.tokens, queries), flat(band.positions, columns), sums(queries), sums(columns),
            max(queries), max(columns),
        )  # fmt: skip
    return band.kept[FlashAttention]  # type: ignore[no-any-return]


def _packed(states: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Return the tokens `index` of states [B, T, H, D], [n, H, D]."""
    return states.reshape(-1, *states.shape[2:]).index_select(0, index)


def _output(found: Any) -> torch.Tensor:
    """Return the output of a function that may return the log-sum-exp beside it."""
    return found[0] if isinstance(found, (tuple, list)) else found


def _functions(module: Any) -> FlashFunctions:
    batched, ragged = module.flash_attn_func, module.flash_attn_varlen_func
    return FlashFunctions(batched, ragged, _parameters(batched) & _parameters(ragged))


@functools.cache
def _parameters(function: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):  # its parent is missing, or was put in place by hand
        return False


def _failure(module: str) -> str | None:
    """Return why an installed package cannot be used: it may have been built for another torch."""
    try:
        _functions(importlib.import_module(module))
    except (ImportError, AttributeError, OSError) as error:
        return f"{module} cannot be used here ({described(error)})"
    return None


@functools.cache
def _from_hub(repository: str, version: int) -> Any:
    """Return a kernel of the hub, or why it cannot be had."""
    try:
        return importlib.import_module("kernels").get_kernel(repository, version=version)
    except Exception as error:  # the network, the build for this torch, the package itself
        return f"{repository} could not be loaded ({described(error)})"
