"""`generate` for asyncio."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from typing import Any

from hf_accel.core.calls.cancelling import cancellable


async def agenerate(model: Any, *args: Any, **kwargs: Any) -> Any:
    """Await `model.generate(*args, **kwargs)`, which runs in a thread of its own and joins where `serving` is on.

    Where the task is cancelled, the call ends before its next pass, and its rows and cache are given up; without
    batching nothing looks whether it is still wanted, and it runs to its end unheard.

    Raises: what `generate` raises; asyncio.CancelledError, once the call has been told.
    """
    loop, switch = asyncio.get_running_loop(), threading.Event()
    found: asyncio.Future[Any] = loop.create_future()

    def settle(result: Any, error: BaseException | None) -> None:
        if found.done():  # nobody waits any more
            return
        if error is None:
            found.set_result(result)
        else:
            found.set_exception(error)

    def run() -> None:
        result, error = None, None
        try:
            with cancellable(switch):
                result = model.generate(*args, **kwargs)
        except BaseException as raised:
            error = raised
        if not loop.is_closed():
            loop.call_soon_threadsafe(settle, result, error)

    context = contextvars.copy_context()
    threading.Thread(target=context.run, args=(run,), name="hf_accel agenerate", daemon=True).start()
    try:
        return await found
    finally:
        switch.set()
