"""Refusals in the form that OpenAI's clients read: status, message, type, the field they are about, and a code."""

from __future__ import annotations

from typing import Any

from hf_accel.errors import HfAccelError

_TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
}


class Refusal(HfAccelError):
    """A request that is not served, or not to its end.

    status: of HTTP. param: the field of the request that it is about. code: a word that programs may compare.
    retry_s: after how many seconds another try may be worth it.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        retry_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code, self.retry_s = status, param, code, retry_s

    def body(self) -> dict[str, Any]:
        """Return what is sent."""
        kind = _TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        """Return the headers that go with it."""
        found = {} if self.retry_s is None else {"Retry-After": str(self.retry_s)}
        return found | ({"WWW-Authenticate": "Bearer"} if self.status == 401 else {})


def failed(error: BaseException) -> Refusal:
    """Return what a client is told of an error within a `generate` call: its kind, and no text of others."""
    if isinstance(error, Refusal):
        return error
    return Refusal(f"The model failed ({type(error).__name__}); the server's log says more.", status=500)
