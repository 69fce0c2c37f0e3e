"""Who may use the server: its own page and programs, not a web page from elsewhere."""

import hmac
import re
from collections.abc import Collection

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from gptjax.serve.responses import Refusal

LOOPBACK = ("localhost", "127.0.0.1", "::1")


class Access:
    """Checks of every request before the app sees it.

    A browser lets any web page send requests to 127.0.0.1. Such a request has the page's origin,
    or, after the page's name was pointed here (DNS rebinding), that name as its host; both are
    refused.

    Args:
        app: what is guarded.
        hosts: names by which the server may be called; None: any.
        api_key: that a request for anything but the page must bring as `Authorization: Bearer
            KEY`; None: none.
    """

    def __init__(self, app: ASGIApp, hosts: Collection[str] | None, api_key: str | None):
        self._app, self._hosts = app, hosts
        self._key = None if api_key is None else api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            headers = Headers(scope=scope)
            if (refused := self._refuse(headers, scope["path"])) is not None:
                await refused(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _refuse(self, headers: Headers, path: str) -> ASGIApp | None:
        host = headers.get("host", "").lower()
        if self._hosts is not None and _name(host) not in self._hosts:
            return Refusal(
                403,
                f"this server does not answer to the name {host[:100]!r}; start it with "
                f"--allow-host NAME to add one",
            )
        origin = headers.get("origin")
        if origin is not None and origin.lower().partition("://")[2] != host:
            return Refusal(403, "this server does not answer web pages from elsewhere")
        if self._key is not None and path not in ("/", "/health"):
            scheme, _, given = headers.get("authorization", "").partition(" ")
            good = hmac.compare_digest(given.strip().encode("latin-1", "replace"), self._key)
            if scheme.lower() != "bearer" or not good:
                return Refusal(
                    401,
                    "the API key is missing or wrong; send Authorization: Bearer KEY",
                    code="invalid_api_key",
                    headers={"www-authenticate": "Bearer"},
                )
        return None


def _name(host: str) -> str | None:
    """The name in a Host header: without the port, and an IPv6 address without its brackets."""
    found = re.fullmatch(r"(?:\[([0-9a-f:.]+)\]|([^\s:/@\[\]]+))(?::\d+)?", host)
    return found and (found[1] or found[2])
