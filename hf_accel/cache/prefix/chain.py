"""By which keys the blocks of a prompt are found: a hash chain over its tokens, whose root is tenant and model."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence

from hf_accel.errors import ConfigError

Chain = list[tuple[bytes, bytes]]  # key and tokens of each whole block of a prompt, the first block first


def chain_of(tenant: str | None, root: bytes, tokens: Sequence[int], block_tokens: int) -> Chain:
    """Return keys and tokens (int64, little-endian) of the whole blocks of a prompt.

    Raises:
        ConfigError: the tenant is neither a string nor None, or the root is not bytes.
    """
    check_tenant(tenant)
    if not isinstance(root, bytes):
        raise ConfigError(f"The root of a prefix is bytes; {root!r} was given.")
    chain = []
    key = _digest_of(b"hf_accel prefix", _tenant_bytes(tenant), root, struct.pack("<q", block_tokens))
    for start in range(0, len(tokens) - block_tokens + 1, block_tokens):
        packed = struct.pack(f"<{block_tokens}q", *tokens[start : start + block_tokens])
        key = hashlib.sha256(key + packed).digest()
        chain.append((key, packed))
    return chain


def check_tenant(tenant: str | None) -> None:
    """Raise ConfigError if this can be no tenant."""
    if tenant is not None and not isinstance(tenant, str):
        raise ConfigError(f"A tenant is a string or None; {tenant!r} was given.")


def owner_digest(key: bytes, tenant: str | None) -> str:
    """Return what tells, in a file, whose it is: to those who know the tenant, and differently in every file."""
    return _digest_of(b"hf_accel owner", key, _tenant_bytes(tenant)).hex()


def tokens_digest(packed: bytes) -> str:
    """Return what tells, in a file, of which tokens it is."""
    return hashlib.sha256(packed).hexdigest()


def _tenant_bytes(tenant: str | None) -> bytes:
    return b"\0" if tenant is None else b"\1" + tenant.encode("utf-8", "surrogatepass")


def _digest_of(*parts: bytes) -> bytes:
    """Return the SHA-256 of byte strings; their lengths are hashed with them, so that no other ones have the same."""
    return hashlib.sha256(b"".join(struct.pack("<q", len(part)) + part for part in parts)).digest()
