"""A headless browser for tests: the few commands of W3C WebDriver that they need.

Debian's chromium-driver answers them over HTTP, so no driver library is needed.
"""

import base64
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest

# Keys, as the specification names them.
CONTROL, SHIFT, ENTER = "\ue009", "\ue008", "\ue007"
ESCAPE, LEFT, TAB = "\ue00c", "\ue012", "\ue004"


class Browser:
    """One page."""

    def __init__(self, client: httpx.Client, session: str):
        self._client, self._session = client, session

    def call(self, method: str, path: str, **body: Any) -> Any:
        """One command; its value."""
        content = body if method == "POST" else None
        answer = self._client.request(method, f"/session/{self._session}/{path}", json=content)
        value = answer.json()["value"]
        assert not (isinstance(value, dict) and "error" in value), value
        return value

    def open(self, url: str) -> None:
        """Load a page."""
        self.call("POST", "url", url=url)

    def run(self, script: str, *args: Any) -> Any:
        """What a function with this body returns."""
        return self.call("POST", "execute/sync", script=script, args=args)

    def wait(self, condition: str, seconds: float = 20) -> Any:
        """Wait until an expression is true; its value."""
        end = time.monotonic() + seconds
        while not (value := self.run(f"return {condition}")):
            assert time.monotonic() < end, f"{condition} did not come true"
            time.sleep(0.05)
        return value

    def keys(self, *keys: str) -> None:
        """Press keys, hold them all, and let go in reverse; a long string is typed."""
        if len(keys) == 1 and len(keys[0]) > 1:
            pressed = [(kind, key) for key in keys[0] for kind in ("keyDown", "keyUp")]
        else:
            pressed = [("keyDown", k) for k in keys] + [("keyUp", k) for k in reversed(keys)]
        actions = [{"type": kind, "value": key} for kind, key in pressed]
        self.call("POST", "actions", actions=[{"type": "key", "id": "keys", "actions": actions}])

    def point(self, x: float, y: float, click: bool = False) -> None:
        """Move the mouse to a place in the window."""
        actions: list[dict[str, Any]] = [
            {"type": "pointerMove", "duration": 0, "x": round(x), "y": round(y)}
        ]
        if click:
            actions += [{"type": kind, "button": 0} for kind in ("pointerDown", "pointerUp")]
        mouse = {"type": "pointer", "id": "mouse", "actions": actions}
        self.call("POST", "actions", actions=[mouse])

    def screenshot(self, path: Path) -> None:
        """Save what is seen as PNG."""
        path.write_bytes(base64.b64decode(self.call("GET", "screenshot")))


@contextmanager
def browser(width: int = 1200, height: int = 800, *flags: str) -> Iterator[Browser]:
    """A headless chromium; the test skips where there is none."""
    if not (shutil.which("chromedriver") and shutil.which("chromium")):
        pytest.skip("no chromium with its driver: apt-get install chromium chromium-driver")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    driver = subprocess.Popen(["chromedriver", f"--port={port}"], stdout=subprocess.DEVNULL)
    client = None
    try:
        client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False)
        for _ in range(200):
            try:
                client.get("/status")
                break
            except httpx.ConnectError:
                time.sleep(0.05)
        options = ["--headless=new", "--no-sandbox", f"--window-size={width},{height}", *flags]
        wanted = {"browserName": "chrome", "goog:chromeOptions": {"args": options}}
        wanted["goog:loggingPrefs"] = {"browser": "ALL"}
        made = client.post("/session", json={"capabilities": {"alwaysMatch": wanted}}).json()
        session = made["value"]["sessionId"]
        yield Browser(client, session)
        client.delete(f"/session/{session}")
    finally:
        if client is not None:
            client.close()
        driver.terminate()
        driver.wait()
