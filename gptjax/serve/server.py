"""Listening on an address, and serving an app there until a signal."""

import asyncio
import errno
import signal
import socket
from collections.abc import Callable
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from gptjax.errors import UserError

HEAD_SECONDS = 10  # in which the head of a request must arrive
CONNECTIONS = 512  # at once; one more gets 503
GRACE = 5.0  # seconds that running requests have after a signal


def bind(host: str, port: int) -> socket.socket:
    """A socket that listens on an address.

    Args:
        host: a name or an address of this machine.
        port: 0 takes a free one.

    Raises:
        UserError: the port is in use or not allowed, or the host is not this machine.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", error)
        raise UserError(f"--host {host!r} is no address of this machine: {reason}") from None
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen()
    except OSError as error:
        listening.close()
        if error.errno == errno.EADDRINUSE:
            raise UserError(
                f"port {port} of {host} is in use; stop what listens there, or give another --port "
                f"(0: a free one)"
            ) from None
        raise UserError(
            f"cannot listen on port {port} of {host}: {error.strerror}; give another --host or "
            f"--port"
        ) from None
    return listening


def url(listening: socket.socket) -> str:
    """The address of a listening socket, for a browser on this machine."""
    host, port = listening.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host) or host
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def make(app: Any, close: Callable[[], None], grace: float = GRACE) -> uvicorn.Server:
    """A server of an app, not yet running.

    Args:
        app: an ASGI app.
        close: stops the app's work, so that every request ends; called in a thread.
        grace: seconds that running requests have to end once the server is to stop.
    """
    config = uvicorn.Config(
        app,
        http=_Protocol,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        limit_concurrency=CONNECTIONS,
        timeout_graceful_shutdown=int(grace) + 5,
    )
    return _Server(config, close, grace)


def run(server: uvicorn.Server, listening: socket.socket) -> None:
    """Serve on a socket until SIGINT or SIGTERM; then requests are ended in order."""
    # uvicorn sends itself the signals again once it has ended, for the handlers from before.
    ended = {number: signal.signal(number, _ignore) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        server.run([listening])
    finally:
        for number, handler in ended.items():
            signal.signal(number, handler)


def _ignore(number: int, frame: Any) -> None:
    pass


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, close: Callable[[], None], grace: float):
        super().__init__(config)
        self._close, self._grace = close, grace

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End the connections; those that are at work after the grace lose it."""
        ending = asyncio.create_task(self._end())
        await super().shutdown(sockets)
        ending.cancel()
        await asyncio.to_thread(self._close)

    async def _end(self) -> None:
        await asyncio.sleep(self._grace)
        await asyncio.to_thread(self._close)


class _Protocol(H11Protocol):
    """uvicorn's, which waits for the head of a request as long as a client likes."""

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Begin to wait for the first head."""
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        """Take in a part of a request."""
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop waiting."""
        super().connection_lost(exc)
        if self._timer is not None:
            self._timer.cancel()

    def _watch(self) -> None:
        if self.conn.their_state is not h11.IDLE and self._timer is not None:
            self._timer.cancel()
            self._timer = None
        elif self.conn.their_state is h11.IDLE and self._timer is None:
            self._timer = self.loop.call_later(HEAD_SECONDS, self.transport.close)
