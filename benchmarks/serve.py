"""Throughput and first token of `gptjax serve`: `python -m benchmarks.serve --run NAME`.

wrk asks for completions with 1, 8 and 32 connections. In turns with it: the same weights exported
to transformers, whose `generate` makes one text after the other, and a batch of as many.
"""

import json
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from benchmarks import measure
from gptjax import cli
from gptjax.errors import UserError, one_line_errors

SideName = Literal["serve", "one-slot", "library", "transformers", "transformers-batch"]
PROMPT = "KING"
# wrk counts answers; each has exactly --tokens tokens, for nothing ends a text before.
SCRIPT = """
wrk.method = "POST"
wrk.headers["Content-Type"] = "application/json"
wrk.body = '{"prompt": "%s", "max_tokens": %d, "temperature": 1, "top_k": 50, "seed": 1}'
"""


@dataclass(frozen=True)
class ServeBenchmark:
    """Measure tokens per second over all clients, and the time to the first token."""

    run: str | None = None
    """Name in runs/, or path of a run's folder; None: the newest run."""
    sides: tuple[SideName, ...] = (
        "serve",
        "one-slot",
        "library",
        "transformers",
        "transformers-batch",
    )
    """serve; the same with one slot, so that requests are decoded one after the other; the library
    without a server, one after the other; transformers' generate, one after the other; the same
    with all requests as one batch."""
    clients: tuple[int, ...] = (1, 8, 32)
    """Numbers of clients that ask at the same time."""
    tokens: int = 50
    """Tokens of each answer."""
    slots: int = 32
    """Of the server."""
    rounds: int = 3
    """Number of turns per side."""
    seconds: float = 5.0
    """Duration of one turn."""
    out: Path | None = None
    """Results file (default: benchmarks/results/serve.json)."""


def server(run: str | None, slots: int, tokens: int) -> Callable[..., Any]:
    """A side that serves, in a thread, and is asked by wrk, or once by each of some clients."""
    from gptjax.runs import folders
    from gptjax.serve import server
    from gptjax.serve.app import make_app
    from gptjax.serve.models import Models

    models = Models(folders.find(run), slots=slots)
    models.open(models.default)
    listening = server.bind("127.0.0.1", 0)
    app = server.make(make_app(models), models.close)
    threading.Thread(target=app.run, args=([listening],), daemon=True).start()
    url = f"{server.url(listening)}/v1/completions"
    script = Path(tempfile.mkdtemp()) / "ask.lua"
    script.write_text(SCRIPT % (PROMPT, tokens))
    ask = lambda **more: {"prompt": PROMPT, "max_tokens": tokens, "top_k": 50, "seed": 1} | more

    def post(body: Any) -> Any:
        request = urllib.request.Request(url, json.dumps(body).encode())
        return urllib.request.urlopen(request, timeout=120)

    def first_token() -> float:
        start = time.perf_counter()
        with post(ask(stream=True)) as answer:
            answer.readline()
            found = time.perf_counter() - start
            answer.read()
        return found

    def measured(what: str, clients: int, seconds: float) -> Any:
        if what == "text":
            with post(ask(temperature=0)) as answer:
                return json.load(answer)["choices"][0]["text"]
        if what == "first":
            with ThreadPoolExecutor(clients) as pool:
                return list(pool.map(lambda _: first_token(), range(clients)))
        return wrk(url, script, clients, seconds, tokens)

    return measured


def wrk(url: str, script: Path, clients: int, seconds: float, tokens: int) -> dict[str, float]:
    """Tokens per second, requests, and those that failed, as wrk counts them."""
    words = ["wrk", "-t1", f"-c{clients}", f"-d{seconds:g}s", "--timeout", "60s", "-s", str(script)]
    said = subprocess.run([*words, url], capture_output=True, text=True, check=True).stdout
    [(requests, spent)] = re.findall(r"(\d+) requests in ([\d.]+)s", said)
    failed = sum(map(int, re.findall(r"Non-2xx or 3xx responses: (\d+)", said)))
    for numbers in re.findall(r"Socket errors: (.*)", said):
        failed += sum(map(int, re.findall(r"\d+", numbers)))
    rate = int(requests) * tokens / float(spent)
    return {"rate": rate, "requests": int(requests), "failed": failed}


def library(run: str | None, tokens: int) -> Callable[..., Any]:
    """A side that decodes one text after the other, without a server."""
    import gptjax

    loaded = gptjax.load(run)
    how = lambda temperature: gptjax.Sampling(temperature=temperature, top_k=50)

    def complete(temperature: float = 1.0) -> Any:
        request = loaded.request(PROMPT, tokens, sampling=how(temperature), seed=1)
        return loaded.complete([request])[0]

    def measured(what: str, clients: int, seconds: float) -> Any:
        if what == "text":
            return complete(0).text
        return rate(measure.work(lambda: len(complete().tokens), seconds), tokens)

    complete()
    return measured


def transformers(folder: Path, tokens: int, batched: bool) -> Callable[..., Any]:
    """A side that runs transformers' generate on the exported weights."""
    import torch  # pyright: ignore[reportMissingImports]
    from transformers import AutoModelForCausalLM  # pyright: ignore[reportMissingImports]

    model: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = torch.tensor(json.loads((folder / "prompt.json").read_text()))

    @torch.no_grad()
    def generate(batch: int, **how: Any) -> Any:
        rows = ids[None].repeat(batch, 1)
        made = model.generate(
            rows,
            attention_mask=torch.ones_like(rows),
            min_new_tokens=tokens,
            max_new_tokens=tokens,
            pad_token_id=0,
            **how,
        )
        return made[:, len(ids) :]

    def measured(what: str, clients: int, seconds: float) -> Any:
        if what == "text":
            return generate(1, do_sample=False)[0].tolist()
        batch = clients if batched else 1
        one = lambda: generate(batch, do_sample=True, top_k=50).numel()
        return rate(measure.work(one, seconds), tokens)

    # One thread or all, whichever is faster, as in benchmarks/sampling.py.
    seconds = {}
    for threads in (1, measure.cores()):
        torch.set_num_threads(threads)
        seconds[threads] = measure.best_seconds(lambda: generate(8 if batched else 1), 2)
    torch.set_num_threads(min(seconds, key=lambda n: seconds[n]))
    return measured


def rate(visit: measure.Visit, tokens: int) -> dict[str, float]:
    return {
        "rate": visit.count / visit.seconds,
        "requests": visit.count // tokens,
        "failed": 0,
    }


def compare(command: ServeBenchmark) -> list[dict[str, Any]]:
    """Measure all sides, a row for each number of clients."""
    import gptjax
    from gptjax.interop.export import export

    run = gptjax.load(command.run)
    with tempfile.TemporaryDirectory() as here:
        folder = Path(here) / "exported"
        export(run.directory, folder)
        ids = run.tokenizer.encode(PROMPT)
        (folder / "prompt.json").write_text(json.dumps(ids.tolist()))
        made = {
            "serve": (server, command.run, command.slots, command.tokens),
            "one-slot": (server, command.run, 1, command.tokens),
            "library": (library, command.run, command.tokens),
            "transformers": (transformers, folder, command.tokens, False),
            "transformers-batch": (transformers, folder, command.tokens, True),
        }
        with measure.sides({name: made[name] for name in command.sides}) as sides:
            check_texts({name: side("text", 1, 0.0) for name, side in sides.items()}, run)
            return [row(command, sides, clients) for clients in command.clients]


def check_texts(texts: dict[str, Any], run: Any) -> None:
    """See that all sides make the same likeliest text."""
    decoded = {
        name: text if isinstance(text, str) else run.tokenizer.decode(text)
        for name, text in texts.items()
    }
    if len(set(decoded.values())) > 1:
        raise RuntimeError(f"the sides make other greedy texts: {decoded}")


def row(command: ServeBenchmark, sides: dict[str, measure.Side], clients: int) -> dict[str, Any]:
    """One number of clients."""
    answers = measure.take_turns(sides, command.rounds, "work", clients, command.seconds)
    firsts = []
    if "serve" in sides:
        firsts = [s for _ in range(command.rounds) for s in sides["serve"]("first", clients, 0.0)]
    return {
        "clients": clients,
        "tokens_per_second": {n: [a["rate"] for a in found] for n, found in answers.items()},
        "requests": {n: sum(a["requests"] for a in found) for n, found in answers.items()},
        "failed": {n: sum(a["failed"] for a in found) for n, found in answers.items()},
        "first_token_ms": [1000 * seconds for seconds in firsts],
    }


def print_tables(rows: list[dict[str, Any]], names: tuple[str, ...]) -> None:
    """Print the rates; then the first tokens, and requests of all sides."""
    rates = [
        [str(row["clients"]), *(str(measure.spread(row["tokens_per_second"][n])) for n in names)]
        for row in rows
    ]
    measure.show("tokens/s over all clients", ["clients", *names], rates)
    others = []
    for row in rows:
        firsts, failed = row["first_token_ms"], sum(row["failed"].values())
        spread = str(measure.spread(firsts)) if firsts else "-"
        others.append(
            [str(row["clients"]), spread, f"{sum(row['requests'].values()):,}", f"{failed}"]
        )
    head = ["clients", "ms to the first token, of all at once", "requests", "failed"]
    measure.show("serve", head, others)


def main(argv: list[str]) -> None:
    """Measure all sides and print the table."""
    command = cli.parse(ServeBenchmark, ServeBenchmark(), argv, "benchmarks.serve", "")
    measure.at_least(
        rounds=command.rounds, seconds=command.seconds, tokens=command.tokens, slots=command.slots
    )
    if any(name.startswith("transformers") for name in command.sides):
        measure.need("torch", "transformers", instead="--sides serve one-slot library")
    if {"serve", "one-slot"} & set(command.sides) and shutil.which("wrk") is None:
        raise UserError("the load comes from wrk, not installed here: apt-get install wrk")
    here = measure.begin("serve")
    rows = compare(command)
    print_tables(rows, command.sides)
    measure.console.print(measure.LEGEND)
    measure.save(command.out, "serve", here, command, rows)


if __name__ == "__main__":
    with one_line_errors("benchmarks.serve"):
        main(sys.argv[1:])
