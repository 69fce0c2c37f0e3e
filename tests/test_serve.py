"""Tests of the server over HTTP, with a small run and real sockets."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2 as httpx
import jax.monitoring
import numpy as np
import pytest
from run_helpers import message
from serve_helpers import Live, serving, small_runs

import gptjax
from gptjax.cli.serve import is_loopback, parse_serve
from gptjax.runs.loaded import LoadedRun, load
from gptjax.serve import server
from gptjax.serve.app import Limits
from gptjax.serve.models import Served

DOCS = Path(__file__).resolve().parents[1] / "docs" / "serve.md"
GREEDY = {"temperature": 0, "max_tokens": 12}
ENDLESS = {"prompt": "a", "max_tokens": 65536, "seed": 1}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, play: str) -> Iterator[Path]:
    with small_runs(tmp_path_factory.mktemp("serve"), play) as runs:
        yield runs


@pytest.fixture(scope="module")
def run(runs: Path) -> LoadedRun:
    return load(runs / "small", "last")


@pytest.fixture(scope="module")
def live(runs: Path) -> Iterator[Live]:
    with serving(runs / "small", Limits(body_seconds=0.5)) as live:
        yield live


# ---------------------------------------------------------------------------------------------
# Answers


def alone(run: LoadedRun, prompt: str, tokens: int = 12, **settings: Any) -> Any:
    """What the library makes of one prompt, without a server or other requests."""
    [completion] = run.complete([run.request(prompt, tokens, **settings)])
    return completion


def test_an_answer_is_what_the_library_makes(live: Live, run: LoadedRun):
    answer = live.post(prompt="the king", **GREEDY)
    [choice] = answer["choices"]
    assert answer["model"] == f"small@{run.step}" and answer["object"] == "text_completion"
    sampling = gptjax.Sampling(temperature=0)
    assert choice["text"] == alone(run, "the king", sampling=sampling).text
    assert choice["finish_reason"] == "length" and choice["logprobs"] is None
    usage = {"prompt_tokens": 8, "completion_tokens": 12, "total_tokens": 20}
    assert answer["usage"] == usage


def test_a_stream_is_the_whole_answer(live: Live):
    asked = {"prompt": ["the king", "A"], "n": 2, "seed": 3, "max_tokens": 40, "logprobs": 2}
    whole = live.post(**asked)
    *chunks, last = live.stream(**asked, stream_options={"include_usage": True})
    assert last["choices"] == [] and last["usage"] == whole["usage"]
    assert all(chunk["usage"] is None and chunk["id"] == last["id"] for chunk in chunks)
    for i, choice in enumerate(whole["choices"]):
        parts = [c for chunk in chunks for c in chunk["choices"] if c["index"] == i]
        assert "".join(part["text"] for part in parts) == choice["text"]
        assert [p["finish_reason"] for p in parts] == [None] * (len(parts) - 1) + ["length"]
        for name, values in choice["logprobs"].items():
            assert [v for part in parts for v in part["logprobs"][name]] == values
    assert len({choice["text"] for choice in whole["choices"]}) == 4


def test_nothing_is_mixed_between_requests(live: Live, run: LoadedRun):
    """More clients than slots, each with its own prompt, seed and settings."""
    asked = [
        {
            "prompt": "the king and the fair night"[: 1 + i],
            "max_tokens": 5 + 7 * (i % 4),
            "seed": i,
            "temperature": (0, 0.5, 1)[i % 3],
            "top_k": (None, 3)[i % 2],
        }
        for i in range(12)
    ]
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda body: live.post(**body), asked))
    for body, answer in zip(asked, answers, strict=True):
        sampling = gptjax.Sampling(temperature=body["temperature"], top_k=body["top_k"])
        by_itself = alone(
            run, body["prompt"], body["max_tokens"], sampling=sampling, seed=body["seed"]
        )
        assert answer["choices"][0]["text"] == by_itself.text


def test_a_warm_server_compiles_nothing(live: Live):
    compiled: list[str] = []

    def listener(event: str, duration_secs: float, **_: Any) -> None:
        if "compile" in event:
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        jax.jit(lambda x: x + 1)(np.arange(3))
        assert compiled  # it does count
        compiled.clear()
        for body in (
            {"prompt": "a"},
            {"prompt": "b" * 31, "n": 3, "top_k": 4, "logprobs": 20},
            {"prompt": "c" * 100, "max_tokens": 90, "top_p": 0.5, "min_p": 0.1},
            {"prompt": "", "repetition_penalty": 1.3, "logit_bias": {"97": 5}, "stop": "ab"},
            {"prompt": [1, 2, 3], "temperature": 0},
        ):
            live.post(**body)
        assert compiled == []
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)


def test_the_log_probabilities_are_those_of_the_model(live: Live, run: LoadedRun):
    asked = {"prompt": "the king", "logprobs": 3, "max_tokens": 6, "temperature": 0.7, "seed": 2}
    [choice] = live.post(**asked)["choices"]
    found = choice["logprobs"]
    logits = run.logits("the king" + choice["text"]).astype(np.float64)
    logits = logits[7:-1, : run.tokenizer.vocab_size]
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    ids = run.tokenizer.encode(choice["text"])
    assert found["tokens"] == list(choice["text"])
    np.testing.assert_allclose(found["token_logprobs"], logprobs[range(6), ids], atol=1e-4)
    for row, top in zip(logprobs, found["top_logprobs"], strict=True):
        assert list(top.values()) == sorted(top.values(), reverse=True)
        np.testing.assert_allclose(
            list(top.values()), np.sort(row)[: -len(top) - 1 : -1], atol=1e-4
        )
    assert found["text_offset"] == list(range(6))


def test_a_stop_string_ends_a_text_before_it(live: Live):
    [choice] = live.post(prompt="the", seed=5, max_tokens=60)["choices"]
    text = choice["text"]
    stop = text[10:13]
    [stopped] = live.post(prompt="the", seed=5, max_tokens=60, stop=["\0never", stop])["choices"]
    assert stopped["text"] == text[: text.index(stop)] and stopped["finish_reason"] == "stop"
    events = live.stream(prompt="the", seed=5, max_tokens=60, stop=stop)
    assert "".join(e["choices"][0]["text"] for e in events) == stopped["text"]


def test_n_choices_are_the_samples_of_a_seed(live: Live, run: LoadedRun):
    texts = [
        choice["text"] for choice in live.post(prompt="a", max_tokens=9, n=3, seed=-1)["choices"]
    ]
    request = run.request("a", 9, sampling=gptjax.Sampling(temperature=1.0), seed=2**32 - 1)
    samples = run.complete([replace(request, sample=i) for i in range(3)])
    assert texts == [sample.text for sample in samples] and len(set(texts)) == 3


def test_a_bias_and_echo(live: Live, run: LoadedRun):
    a, b, c = run.tokenizer.encode("ABC").tolist()
    bias = {str(b): 100, str(c): 90}
    body = {"prompt": "A", "max_tokens": 4, "logit_bias": bias, "temperature": 0}
    assert live.post(**body, echo=True)["choices"][0]["text"] == "ABBBB"
    text = lambda events: "".join(e["choices"][0]["text"] for e in events)
    assert text(live.stream(**body, echo=True)) == "ABBBB"
    assert live.post(**body | {"prompt": [a]}, echo=True)["choices"][0]["text"] == "ABBBB"


def test_chat(live: Live, run: LoadedRun, monkeypatch: pytest.MonkeyPatch):
    written = lambda messages: "".join(f"{m['role']}: {m['content']}\n" for m in messages)

    class Template:
        encode = staticmethod(lambda messages: run.tokenizer.encode(written(messages)))

    monkeypatch.setattr(Served, "template", Template)
    hello = {"messages": [{"role": "user", "content": "the king"}], "seed": 3}
    asked = hello | {"max_completion_tokens": 9, "logprobs": True, "top_logprobs": 2}
    whole = live.post("chat/completions", **asked)
    same = live.post(prompt="user: the king\n", max_tokens=9, seed=3, logprobs=2)
    [choice], [plain] = whole["choices"], same["choices"]
    assert whole["object"] == "chat.completion" and whole["usage"] == same["usage"]
    assert choice["message"] == {"role": "assistant", "content": plain["text"], "refusal": None}
    content, logprobs = choice["logprobs"]["content"], plain["logprobs"]
    assert [token["token"] for token in content] == logprobs["tokens"] == list(plain["text"])
    assert [token["logprob"] for token in content] == logprobs["token_logprobs"]
    assert [bytes(token["bytes"]).decode() for token in content] == list(plain["text"])
    top = [{t["token"]: t["logprob"] for t in token["top_logprobs"]} for token in content]
    assert top == logprobs["top_logprobs"]
    first, *parts = [event["choices"][0] for event in live.stream("chat/completions", **asked)]
    assert first["delta"] == {"role": "assistant", "content": "", "refusal": None}
    assert "".join(part["delta"].get("content", "") for part in parts) == plain["text"]
    assert [t for part in parts if part["logprobs"] for t in part["logprobs"]["content"]] == content
    assert parts[-1]["finish_reason"] == "length"
    # Without a limit the answer fills the context; a conversation that does has no room for one.
    assert live.post("chat/completions", **hello)["usage"]["total_tokens"] == 32
    hello["messages"][0]["content"] = "a" * 32
    refused = live.client.post("/v1/chat/completions", json=hello)
    assert refused.status_code == 400
    assert refused.json()["error"]["code"] == "context_length_exceeded"


# ---------------------------------------------------------------------------------------------
# Models


def test_runs_and_checkpoints(runs: Path):
    with serving(runs / "small", most=2) as live:
        ids = [model["id"] for model in live.client.get("/v1/models").json()["data"]]
        assert ids == ["small", "<b>"]
        assert live.client.get("/v1/models/<b>").json()["id"] == "<b>"
        assert live.client.get("/v1/models/other").status_code == 404
        first = {"name": "small", "steps": [40, 80], "loaded": [80]}
        assert live.client.get("/runs").json()["runs"][0] == first
        texts = {}
        for name in ("small@40", "small", "<b>@last", "<b>@40", "small@best"):
            answer = live.post(model=name, prompt="the", **GREEDY)
            texts[name] = answer["choices"][0]["text"], answer["model"]
        assert texts["small"][1] == "small@80" and texts["<b>@last"][1] == "<b>@80"
        assert texts["small"][0] == texts["<b>@last"][0]  # the same training
        assert len(live.models._in_memory()) == 2
        for name in (
            "../small",
            "small@5",
            "small@",
            "small@../80",
            "@",
            str(runs / "small"),
            "x\0",
        ):
            assert "there" in live.refused(404, {"model": name, "prompt": "a"})


def test_a_run_that_trains_meanwhile(runs: Path, tmp_path: Path):
    """Its last whole checkpoint: what is being written has no number yet."""
    shutil.copytree(runs / "small", copy := tmp_path / "copy")
    shutil.move(copy / "checkpoints" / "80", tmp_path / "80")
    with serving(copy) as live:
        assert live.post(model="copy@last", prompt="a", **GREEDY)["model"] == "copy@40"
        shutil.move(tmp_path / "80", copy / "checkpoints" / "80")
        assert live.post(model="copy@last", prompt="a", **GREEDY)["model"] == "copy@80"
        assert live.post(model="copy", prompt="a", **GREEDY)["model"] == "copy@40"


# ---------------------------------------------------------------------------------------------
# Who may ask, and how much


def test_web_pages_from_elsewhere_are_refused(live: Live):
    body = {"prompt": "a", "max_tokens": 1}
    own = f"http://127.0.0.1:{live.port}"
    assert live.client.post("/v1/completions", json=body, headers={"origin": own}).is_success
    for origin in ("http://evil.example", "null", f"{own}0", f"http://localhost:{live.port}"):
        assert "from elsewhere" in live.refused(403, body, origin=origin)
    for host in (f"localhost:{live.port}", "localhost", "[::1]:80", "LOCALHOST"):
        assert live.client.get("/health", headers={"host": host}).is_success
    for host in ("evil.example", "127.0.0.1.evil.example:80", "localhost@evil", "", "[::1"):
        assert live.client.get("/", headers={"host": host}).status_code in (400, 403)


def test_an_api_key(runs: Path):
    with serving(runs / "small", Limits(api_key="s3cret")) as live:
        body = {"prompt": "a", "max_tokens": 1}
        assert "missing or wrong" in live.refused(401, body)
        assert "missing or wrong" in live.refused(401, body, authorization="Bearer s3cre")
        assert "missing or wrong" in live.refused(401, body, authorization="Basic s3cret")
        assert live.client.get("/runs").status_code == 401
        assert live.client.get("/").is_success  # the page asks for the key
        good = {"authorization": "Bearer s3cret"}
        assert live.client.post("/v1/completions", json=body, headers=good).is_success


def test_a_full_queue(runs: Path):
    with serving(runs / "small", queue=1) as live, ThreadPoolExecutor(2) as pool:
        for n in (4, 1):  # all slots, and one that waits
            body = {**ENDLESS, "n": n, "max_tokens": 2**14}
            pool.submit(
                lambda body: live.client.post("/v1/completions", json=body, timeout=2), body
            )
            end = time.monotonic() + 10
            while live.models._asked["small"].scheduler.idle:
                assert time.monotonic() < end
            time.sleep(0.2)
        answer = live.client.post("/v1/completions", json={"prompt": "a"})
        assert answer.status_code == 503 and answer.headers["retry-after"] == "1"
        assert "try again later" in answer.json()["error"]["message"]
        live.wait_until_idle()
        live.post(prompt="a", max_tokens=1)


def test_an_answer_that_takes_too_long(runs: Path):
    with serving(runs / "small", Limits(seconds=0.2)) as live:
        assert "takes too long" in live.refused(504, ENDLESS)
        *_, last = live.stream(**ENDLESS)
        assert "takes too long" in last["error"]["message"]
        live.wait_until_idle()


# ---------------------------------------------------------------------------------------------
# Garbage, and clients that leave


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "not JSON"),
        (b"\0" * 100, "not JSON"),
        (b"[" * 100_000, "not JSON"),
        ({"prompt": [1000]}, "token 1000 is not in 0 .. "),
        ({"prompt": [-1]}, "token -1 is not in"),
        ({"prompt": [10**30]}, "is not in"),
        ({"prompt": "\ud800\r\n"}, "2 unknown characters"),
        ({"prompt": "a", "logit_bias": {"1000": 1}}, "token 1000 is not below "),
        ({"prompt": "a", "stop": [1]}, "stop: expected"),
    ],
)
def test_garbage_in_a_body(live: Live, body: Any, said: str):
    assert said in live.refused(400, body)


def test_odd_prompts_that_are_text(live: Live):
    for prompt in ("", "\0", "<script>", "\U0001f600", "a" * 10_000):
        live.post(prompt=prompt, max_tokens=2)


def test_a_body_that_is_too_long(live: Live):
    assert "send 1048576 bytes or fewer" in live.refused(413, b'{"prompt": "' + b"a" * 2**20)
    live.refused(400, b" " * 2**20)  # as long as may be


@pytest.mark.parametrize(
    "sent",
    [
        b"\0\xff\xfe garbage\r\n\r\n",
        b"GET\r\n\r\n",
        b"GET / HTTP/1.1\r\nContent-Length: x\r\n\r\n",
        b"GET /" + b"a" * 66_000,
        b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n",
    ],
)
def test_garbage_in_place_of_http(live: Live, sent: bytes):
    assert live.raw(sent).startswith(b"HTTP/1.1 400 ")
    live.lives()


def test_unknown_paths_and_methods(live: Live):
    for method, path, status in (
        ("GET", "/nothing", 404),
        ("GET", "/v1/completions", 405),
        ("DELETE", "/", 405),
        ("GET", "/v1/../../etc/passwd", 404),
        ("POST", "/%00", 404),
    ):
        answer = live.client.request(method, path)
        assert answer.status_code == status and answer.json()["error"]["message"]


def test_slow_clients(live: Live, monkeypatch):
    monkeypatch.setattr(server, "HEAD_SECONDS", 0.3)
    assert live.raw(b"") == b""  # closed: nothing was asked
    assert live.raw(b"GET / HTTP/1.1\r\nHost: local") == b""
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n"
    assert live.raw(head + b"{").startswith(b"HTTP/1.1 408 ")
    live.lives()


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_slots(live: Live, stream: bool):
    body = json.dumps({**ENDLESS, "n": 4, "max_tokens": 2**14, "stream": stream}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n"
    for _ in range(3):
        with socket.create_connection(("127.0.0.1", live.port)) as connection:
            connection.sendall(head % len(body) + body)
            if stream:
                assert connection.recv(20).startswith(b"HTTP/1.1 200 ")
            else:
                time.sleep(0.1)
        live.wait_until_idle()
    live.post(prompt="a", max_tokens=1)


# ---------------------------------------------------------------------------------------------
# The official client


def test_the_official_client(live: Live, capsys: pytest.CaptureFixture[str]):
    openai = pytest.importorskip("openai", reason="the official client is not installed: openai")
    client = openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0)
    assert [model.id for model in client.models.list()] == ["small", "<b>"]
    asked = {"model": "small", "prompt": "the king", "max_tokens": 12, "temperature": 0}
    whole = client.completions.create(**asked, logprobs=2, stop=["\0"], seed=1, n=2)
    assert whole.usage.completion_tokens == 24
    assert len(whole.choices) == 2 and len(whole.choices[0].logprobs.top_logprobs[0]) >= 2
    parts = client.completions.create(**asked, stream=True, extra_body={"top_k": 1})
    assert "".join(part.choices[0].text for part in parts) == whole.choices[0].text
    hello = {"model": "small", "messages": [{"role": "user", "content": "Hello"}]}
    with pytest.raises(openai.BadRequestError, match="no chat template"):
        client.chat.completions.create(**hello)
    with pytest.raises(openai.NotFoundError, match="there is no model 'other'"):
        client.completions.create(model="other", prompt="a")
    with pytest.raises(openai.BadRequestError, match="unknown field 'colour'"):
        client.completions.create(**asked, extra_body={"colour": 1})
    client.close()
    # What the page of the documentation says.
    [code] = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
    exec(compile(code.replace("http://127.0.0.1:8000", live.url), "serve.md", "exec"), names := {})
    names["client"].close()
    assert len(capsys.readouterr().out) == 40 + 1 + 16


# ---------------------------------------------------------------------------------------------
# The command


def test_flags():
    assert parse_serve(["small", "--port", "0"]).run == "small"
    assert message(parse_serve, ["--port", "65536"]) == (
        "--port 65536 is out of range; give 0 to 65535"
    )
    assert "--slots 0 is out of range" in message(parse_serve, ["--slots", "0"])
    assert "--api-key is empty" in message(parse_serve, ["--api-key", ""])
    assert is_loopback("127.0.0.2") and is_loopback("::1") and is_loopback("localhost")
    assert not is_loopback("0.0.0.0") and not is_loopback("example.org")


def test_addresses_that_cannot_be_used():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert message(server.bind, "127.0.0.1", port) == (
            f"port {port} of 127.0.0.1 is in use; stop what listens there, or give another --port "
            f"(0: a free one)"
        )
    assert "is no address of this machine" in message(server.bind, "nowhere.invalid", 0)
    assert "cannot listen on port 0 of 192.0.2.1" in message(server.bind, "192.0.2.1", 0)
    listening = server.bind("0.0.0.0", 0)
    assert server.url(listening) == f"http://127.0.0.1:{listening.getsockname()[1]}"
    listening.close()


def test_the_command_serves_until_a_signal(runs: Path):
    """A stream that is at work then ends with an error; the process with 0 and no traceback."""
    argv = [sys.executable, "-m", "gptjax", "serve", "--port", "0", "--slots", "4"]
    environment = os.environ | {"GPTJAX_API_KEY": "k"}
    environment["JAX_NUM_CPU_DEVICES"] = "8"  # as here, so that the programs are in the cache
    with subprocess.Popen(argv, stderr=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stderr is not None
            line = process.stderr.readline()
            assert "@80, ready after " in line, line + process.stderr.read()
            url, key = line.split()[-1], {"authorization": "Bearer k"}
            body = {**ENDLESS, "stream": True}
            with httpx.Client(base_url=url, timeout=60, trust_env=False, headers=key) as client:
                with client.stream("POST", "/v1/completions", json=body) as answer:
                    lines = answer.iter_lines()
                    assert "text_completion" in next(lines)
                    process.send_signal(signal.SIGTERM)
                    events = [line for line in lines if line]
                assert "the server is stopping" in events[-2] or "length" in events[-2]
            assert process.wait(30) == 0
            assert "Traceback" not in process.stderr.read()
        finally:
            process.kill()
