"""Helpers of the tests of the server: runs to serve, and a server in a thread."""

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
from run_helpers import CONFIG, QUIET, text_file

import gptjax
from gptjax.serve import server
from gptjax.serve.app import Limits, make_app
from gptjax.serve.models import Models


@contextmanager
def small_runs(here: Path, play: str) -> Iterator[Path]:
    """A folder runs/ with two runs of two checkpoints, `small` and `<b>`; it is the present one's
    meanwhile."""
    model = replace(CONFIG.model, block_size=32, n_embd=32, dropout=0.0)
    # Characters: a small model draws any of them, and each token is one. Some of them mean
    # something in HTML, and one takes two of JavaScript's units.
    data = text_file(here, play + "".join(map(chr, range(32, 127))) + "\0\U0001f600")
    # Trained far enough to depend on its prompt, or answers that are mixed up would go unseen.
    config = replace(CONFIG, steps=80, save_every=40, eval_every=80, data=data, model=model)
    config = replace(config, keep_last=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        for name in ("small", "<b>"):
            gptjax.train(config, f"runs/{name}", report=QUIET)
        yield here / "runs"


class Live:
    """A running server and a client of it."""

    def __init__(self, models: Models, listening: socket.socket):
        self.models, self.port = models, listening.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.client = httpx.Client(base_url=self.url, timeout=60, trust_env=False)

    def post(self, path: str = "completions", /, **body: Any) -> Any:
        """The JSON of an answer of status 200."""
        answer = self.client.post(f"/v1/{path}", json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def stream(self, path: str = "completions", /, **body: Any) -> list[Any]:
        """The events of a stream, which must end as it should."""
        answer = self.client.post(f"/v1/{path}", json={"stream": True, **body})
        assert answer.headers["content-type"].startswith("text/event-stream")
        *events, last, empty = answer.text.split("\n\n")
        assert (last, empty) == ("data: [DONE]", "")
        return [json.loads(event.removeprefix("data: ")) for event in events]

    def refused(self, status: int, content: bytes | dict[str, Any], **headers: str) -> str:
        """The message of a refusal in OpenAI's form; the server lives."""
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        answer = self.client.post("/v1/completions", content=body, headers=headers)
        assert answer.status_code == status, answer.text
        self.lives()
        return answer.json()["error"]["message"]

    def lives(self) -> None:
        assert self.client.get("/health").json() == {"status": "ok"}

    def raw(self, sent: bytes, seconds: float = 10) -> bytes:
        """What comes back on a connection of its own until the server closes it."""
        with socket.create_connection(("127.0.0.1", self.port), seconds) as connection:
            connection.sendall(sent)
            found = b""
            while piece := connection.recv(65536):
                found += piece
            return found

    def wait_until_idle(self) -> None:
        end = time.monotonic() + 20
        while any(not s.scheduler.idle for s in self.models._in_memory()):
            assert time.monotonic() < end, "a request of a client that left is still decoded"
            time.sleep(0.01)


@contextmanager
def serving(directory: Path, limits: Limits | None = None, **settings: Any) -> Iterator[Live]:
    models = Models(directory, "last", **{"slots": 4, **settings})
    models.open(models.default)
    listening = server.bind("127.0.0.1", 0)
    made = server.make(make_app(models, limits), models.close, grace=0)
    thread = threading.Thread(target=made.run, args=([listening],))
    thread.start()
    live = Live(models, listening)
    try:
        yield live
    finally:
        live.client.close()
        made.should_exit = True
        thread.join(30)
        assert not thread.is_alive()
