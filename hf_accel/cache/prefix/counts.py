"""What is counted of stored prompts."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field

MAXIMUM_TENANTS_COUNTED = 1024


@dataclass(frozen=True, kw_only=True)
class PrefixCounts:
    """Counts since the store was made, of calls, tokens or blocks; but `stored_blocks` and `bytes` are of now."""

    hits: int = 0  # calls of `match` that found at least one block
    misses: int = 0
    reused_tokens: int = 0  # that were not computed
    added_blocks: int = 0  # to memory, from `make` or from files
    evicted_blocks: int = 0
    cleared_blocks: int = 0
    stored_blocks: int = 0
    bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class PrefixStatistics(PrefixCounts):
    """The counts of all tenants together, of each that was active lately, and of files."""

    crossings: int = 0  # blocks that a tenant would have been given though another stored them; they were refused
    tenants: Mapping[str | None, PrefixCounts] = field(default_factory=dict)
    file_blocks_read: int = 0
    file_blocks_written: int = 0
    file_blocks_deleted: int = 0  # for the budget of the folder
    damaged: int = 0  # files that were truncated or altered, and deleted for that
    refused: int = 0  # what had a file's name and was no regular file, or that of another user, and was left alone
    files_stopped: str | None = None  # why blocks are no longer read from nor written to files


@dataclass
class Counting:
    """What is counted as it happens, of one tenant or of all."""

    hits: int = 0
    misses: int = 0
    reused_tokens: int = 0
    added_blocks: int = 0
    evicted_blocks: int = 0
    cleared_blocks: int = 0


class Counters:
    """What is counted of all tenants together and of each that was active lately; whoever calls holds a lock."""

    def __init__(self) -> None:
        self.total = Counting()
        self.tenants: OrderedDict[str | None, Counting] = OrderedDict()
        self.crossings = 0

    def add(self, tenant: str | None, **numbers: int) -> None:
        """Add numbers to the counts of these names, of a tenant and of all."""
        own = self.tenants.setdefault(tenant, Counting())
        self.tenants.move_to_end(tenant)
        if len(self.tenants) > MAXIMUM_TENANTS_COUNTED:
            self.tenants.popitem(last=False)
        for counts in (self.total, own):
            for name, number in numbers.items():
                setattr(counts, name, getattr(counts, name) + number)
