"""The local page: one file that loads nothing from elsewhere."""

import base64
import hashlib
import re
from functools import cache
from importlib.resources import files

from starlette.requests import Request
from starlette.responses import HTMLResponse, Response


@cache
def _html() -> str:
    return files("gptjax.serve").joinpath("page.html").read_text(encoding="utf-8")


@cache
def policy() -> str:
    """The Content-Security-Policy: the page's own script and style, and requests to this server."""

    def of(tag: str) -> str:
        contents = re.findall(rf"<{tag}>(.*?)</{tag}>", _html(), re.DOTALL)
        hashes = [base64.b64encode(hashlib.sha256(c.encode()).digest()).decode() for c in contents]
        return " ".join(f"'sha256-{h}'" for h in hashes)

    return (
        f"default-src 'none'; script-src {of('script')}; style-src {of('style')}; "
        f"connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
        f"frame-ancestors 'none'"
    )


async def respond(request: Request) -> Response:
    """The page."""
    headers = {
        "content-security-policy": policy(),
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cache-control": "no-cache",
    }
    return HTMLResponse(_html(), headers=headers)
