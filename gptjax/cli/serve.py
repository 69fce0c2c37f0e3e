"""`gptjax serve`."""

import os
import time
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path

from gptjax.cli.flags import POSITIONAL, parse
from gptjax.cli.recipe import parts_for_run, recipe_of_run
from gptjax.errors import UserError, note, optional_import
from gptjax.runs import folders

KEY = "GPTJAX_API_KEY"


@dataclass(frozen=True)
class ServeCommand:
    """Serve runs over HTTP: OpenAI's completions, and a page in the browser."""

    run: str | None = field(default=None, metadata=POSITIONAL)
    """Name in runs/, or path of a run's folder; None: the newest run. Requests may name other runs
    in runs/ too."""
    checkpoint: str = "best"
    """best (by validation loss), last, or a step: what a run named without one stands for."""
    config: str | None = None
    """Python file that the run's own model comes from; None: the model of its config."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0: all of this machine's, so that others can use the server."""
    port: int = 8000
    """Port to listen on; 0: a free one."""
    api_key: str | None = None
    """What clients must send as Authorization: Bearer KEY; None: the environment's GPTJAX_API_KEY
    if it is set, which, unlike this flag, other users of the machine cannot read."""
    allow_host: tuple[str, ...] = ()
    """More names by which the server may be called, such as that of a proxy."""
    slots: int = 8
    """Requests that are decoded together; more of them wait."""
    queue: int = 64
    """Requests that may wait for a slot; one more gets status 503."""
    models: int = 2
    """Checkpoints in memory at once."""
    timeout: float = 600
    """Seconds in which a request must be answered."""


def parse_serve(argv: list[str], prog: str = "gptjax serve") -> ServeCommand:
    """Read the arguments.

    Raises:
        UserError: an unknown flag or a bad value.
    """
    command = parse(ServeCommand, ServeCommand(), argv, prog)
    for name, low, high in (
        ("port", 0, 65535),
        ("slots", 1, 1024),
        ("queue", 0, 2**20),
        ("models", 1, 1024),
        ("timeout", 0.001, 86400),
    ):
        if not low <= (value := getattr(command, name)) <= high:
            raise UserError(f"--{name} {value} is out of range; give {low} to {high}")
    if command.api_key == "":
        raise UserError("--api-key is empty; give a key, or leave it out")
    return command


def is_loopback(host: str) -> bool:
    """Whether an address can be reached from this machine only."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def main(argv: list[str], prog: str) -> None:
    """Open the run, compile its programs, and serve until a signal."""
    command = parse_serve(argv, prog)
    for package in ("starlette", "uvicorn"):
        optional_import(package, "serve")
    recipe, directory = recipe_of_run(command.config), folders.find(command.run)
    from gptjax.serve import server

    listening = server.bind(command.host, command.port)
    own = parts_for_run(recipe, directory, "model")
    from gptjax.cli.compilation_cache import use_compilation_cache
    from gptjax.runs.loaded import LoadedRun, load
    from gptjax.serve.access import LOOPBACK
    from gptjax.serve.app import Limits, make_app
    from gptjax.serve.models import Models

    def open_run(path: Path, checkpoint: str) -> LoadedRun:
        return load(path, checkpoint, **(own if path == directory else {}))

    use_compilation_cache()
    models = Models(
        directory,
        command.checkpoint,
        slots=command.slots,
        queue=command.queue,
        most=command.models,
        open_run=open_run,
    )
    start = time.perf_counter()
    served = models.open(models.default)
    key = command.api_key or os.environ.get(KEY) or None
    local = is_loopback(command.host)
    if not local and key is None:
        note(f"warning: others can use this server, for {command.host} is not a loopback address")
    hosts = (*LOOPBACK, command.host, *command.allow_host) if local else None
    limits = Limits(hosts=hosts, api_key=key, seconds=command.timeout)
    note(
        f"serving {served.name}, ready after {time.perf_counter() - start:.1f} s, at "
        f"{server.url(listening)}\nthe page is there, OpenAI's interface at /v1; Ctrl-C ends it"
    )
    server.run(server.make(make_app(models, limits), models.close), listening)
