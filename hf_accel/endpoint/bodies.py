"""Bodies of requests: read up to a bound, and taken for JSON; and who sent them."""

from __future__ import annotations

import hmac
import json
from typing import Any

from fastapi import Request

from hf_accel.endpoint.errors import Refusal


async def read_json(request: Request, most_bytes: int) -> Any:
    """Return the body of a request.

    Raises:
        Refusal: it is larger than `most_bytes`, of which no more is read, or is no JSON.
    """
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > most_bytes:
            raise Refusal(f"The body has more than {most_bytes} bytes.", status=413, code="request_too_large")
    try:
        found = json.loads(body.decode())
        if b"\\ud" in body.lower():  # escapes of halves of characters, which only both together are text
            json.dumps(found, ensure_ascii=False).encode()
        return found
    except (ValueError, RecursionError) as error:
        raise Refusal(f"The body is not JSON in UTF-8 ({type(error).__name__}).") from error


def check_key(request: Request, key: str | None) -> None:
    """Compare what a client sent with the key, in a time that does not tell how much of it was right.

    Raises:
        Refusal: there is a key, and the client did not send it.
    """
    if key is None:
        return
    scheme, _, sent = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not hmac.compare_digest(sent.strip().encode(), key.encode()):
        raise Refusal("Send the key of this server: Authorization: Bearer KEY.", status=401, code="invalid_api_key")
