"""The HTTP interface: OpenAI's endpoints, the list of runs, and the page."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from gptjax.errors import UserError
from gptjax.serve import answers, page, prompts, schema
from gptjax.serve.access import LOOPBACK, Access
from gptjax.serve.answers import CHAT, COMPLETIONS, Answer, Shape
from gptjax.serve.models import Models
from gptjax.serve.responses import Events, Json, refusal
from gptjax.serve.scheduler import Busy, Group, Stopped

READ_SECONDS = 20  # for a client to read the end of a stream
DRAIN = 16  # times the longest body that are read before a longer one is refused


@dataclass(frozen=True)
class Limits:
    """What the server allows."""

    hosts: Sequence[str] | None = LOOPBACK
    """Names by which it may be called; None: any."""
    api_key: str | None = None
    body: int = 2**20
    """Bytes of a body."""
    body_seconds: float = 20
    """In which a body must arrive."""
    seconds: float = 600
    """In which a request must be answered."""


def make_app(models: Models, limits: Limits | None = None) -> Starlette:
    """The ASGI application.

    Args:
        models: the runs to serve.
        limits: what is allowed; None: the defaults.
    """
    limits = limits or Limits()

    def endpoint(read: Callable[[dict[str, Any]], schema.Ask], shape: Shape):
        async def post(request: Request) -> Response:
            ask = read(schema.parse_json(await _body(request, limits)))
            return await _answer(request, models, ask, shape, limits.seconds)

        return post

    async def list_models(request: Request) -> Response:
        data = [_model(name, models) for name in models.runs()]
        return Json({"object": "list", "data": data})

    async def one_model(request: Request) -> Response:
        return Json(_model(models.check(request.path_params["name"]), models))

    async def runs(request: Request) -> Response:
        return Json({"default": models.default, "runs": await asyncio.to_thread(models.catalogue)})

    async def health(request: Request) -> Response:
        return Json({"status": "ok"})

    routes = [
        Route("/", page.respond),
        Route("/health", health),
        Route("/runs", runs),
        Route("/v1/models", list_models),
        Route("/v1/models/{name:path}", one_model),
        Route("/v1/completions", endpoint(schema.completions, COMPLETIONS), methods=["POST"]),
        Route("/v1/chat/completions", endpoint(schema.chat, CHAT), methods=["POST"]),
    ]
    return Starlette(
        routes=routes,
        middleware=[Middleware(Access, hosts=limits.hosts, api_key=limits.api_key)],
        exception_handlers={
            kind: _refuse
            for kind in (HTTPException, UserError, Busy, Stopped, ClientDisconnect, Exception)
        },
    )


async def _body(request: Request, limits: Limits) -> bytes:
    """The body of a request.

    Raises:
        HTTPException: 413, it is too long; 408, it did not arrive in time.
    """
    body, length = bytearray(), 0
    try:
        async with asyncio.timeout(limits.body_seconds):
            async for piece in request.stream():
                length += len(piece)
                if length <= limits.body:
                    body += piece
                elif length > DRAIN * limits.body:  # a client that still sends reads no answer
                    break
    except TimeoutError:
        raise HTTPException(408, f"no whole body came within {limits.body_seconds:g} s") from None
    if length > limits.body:
        raise HTTPException(413, f"the body is too long; send {limits.body} bytes or fewer")
    return bytes(body)


async def _answer(
    request: Request, models: Models, ask: schema.Ask, shape: Shape, seconds: float
) -> Response:
    """Decode what a client asks for; stop when it leaves."""
    served = await models.get(ask.model)
    requests = await asyncio.to_thread(prompts.requests, ask, served)
    answer = Answer(shape, ask, requests, served.name, served.texts)
    group = served.scheduler.submit(requests)
    values = _values(answer, group, asyncio.get_running_loop().time() + seconds)
    if ask.stream:
        return Events(_with_errors(values), seconds + READ_SECONDS, group.cancel)
    try:
        return await _unless_left(request, _whole(answer, values))
    finally:
        group.cancel()


async def _values(answer: Answer, group: Group, deadline: float) -> AsyncIterator[answers.Json]:
    """The chunks of an answer.

    Raises:
        HTTPException: 504, it is late.
        Exception: what ended the decoding.
    """
    for value in answer.begin():
        yield value
    pieces = aiter(group)
    while True:
        try:
            async with asyncio.timeout_at(deadline):
                index, piece = await anext(pieces)
        except StopAsyncIteration:
            break
        except TimeoutError:
            raise HTTPException(
                504, "the answer takes too long; ask for fewer tokens, or raise --timeout"
            ) from None
        for value in answer.add(index, piece):
            yield value
    for value in answer.end():
        yield value


async def _with_errors(values: AsyncIterator[answers.Json]) -> AsyncIterator[answers.Json]:
    """The values, and what ends them before their time as the last one."""
    try:
        async for value in values:
            yield value
    except Exception as error:
        yield refusal(error).value


async def _whole(answer: Answer, values: AsyncIterator[answers.Json]) -> Response:
    async for _ in values:
        pass
    return Json(answer.whole())


async def _unless_left(request: Request, answer: Coroutine[Any, Any, Response]) -> Response:
    """Wait for an answer, as long as the client does.

    Raises:
        ClientDisconnect: it has left.
    """
    working, leaving = asyncio.create_task(answer), asyncio.ensure_future(request.receive())
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return await working
    finally:
        working.cancel()
        leaving.cancel()


def _model(name: str, models: Models) -> answers.Json:
    """A run in the list of models."""
    with suppress(OSError):
        made = int((models.runs()[name] / "config.json").stat().st_mtime)
        return {"id": name, "object": "model", "created": made, "owned_by": "gptjax"}
    return {"id": name, "object": "model", "created": 0, "owned_by": "gptjax"}


def _refuse(request: Request, error: Exception) -> Response:
    return refusal(error)
