"""Responses: JSON, errors in OpenAI's form, and streams of events that end with their client."""

import asyncio
import json
import traceback
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import suppress
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from gptjax.errors import UserError
from gptjax.serve.models import UnknownModel
from gptjax.serve.scheduler import Busy, Stopped
from gptjax.serve.schema import BadRequest


def dumps(value: Any) -> str:
    """JSON in ASCII, so that a lone surrogate of a character model's text can be sent too."""
    return json.dumps(value, allow_nan=False, separators=(",", ":"))


class Json(Response):
    """A value as JSON."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """See `dumps`."""
        return dumps(content).encode("ascii")


class Refusal(Json):
    """An error in OpenAI's form; those of 500 and above are the server's.

    Attributes:
        value: the JSON.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        kind = "server_error" if status >= 500 else "invalid_request_error"
        self.value = {"error": {"message": message, "type": kind, "param": param, "code": code}}
        super().__init__(self.value, status, headers)


def refusal(error: Exception) -> Refusal:
    """The response to a request that ended with an error."""
    match error:
        case BadRequest():
            return Refusal(400, str(error), error.param, error.code)
        case UnknownModel():
            return Refusal(404, str(error), "model", "model_not_found")
        case UserError():
            return Refusal(400, str(error))
        case Busy() | Stopped():
            return Refusal(503, str(error), headers={"retry-after": "1"})
        case HTTPException():
            return Refusal(error.status_code, error.detail, headers=error.headers)
        case ClientDisconnect():
            return Refusal(499, "the client has left")  # nginx's status; nobody reads it
    traceback.print_exception(error)
    return Refusal(500, "a fault of the server, which it has printed; the server lives on")


class Events(StreamingResponse):
    """Server-sent events, each a JSON value, then [DONE].

    Args:
        values: of the events; an exception of theirs must have become a value.
        seconds: that the client has to read them.
        close: called when the stream ends, for whatever reason: the client may have left.
    """

    media_type = "text/event-stream"

    def __init__(self, values: AsyncIterator[Any], seconds: float, close: Callable[[], None]):
        super().__init__(_lines(values), headers={"cache-control": "no-cache"})
        self._seconds, self._close = seconds, close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        try:
            with suppress(TimeoutError):  # the stream is cut off, so its connection is closed
                async with asyncio.timeout(self._seconds):
                    await super().__call__(scope, receive, send)
        finally:
            self._close()


async def _lines(values: AsyncIterator[Any]) -> AsyncIterator[str]:
    async for value in values:
        yield f"data: {dumps(value)}\n\n"
    yield "data: [DONE]\n\n"
