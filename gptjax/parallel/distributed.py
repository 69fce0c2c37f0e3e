"""Several processes that make one run, on one machine or many, by `jax.distributed`.

Each runs the same program on its own devices. What touches files or the screen is done by the
first alone (`first_does`), and all go on with its result, or stop with its error.
"""

import hashlib
import json
import os
import re
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple, NoReturn, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from gptjax.errors import UserError

T = TypeVar("T")
SILENT = 60  # seconds without a sign of life after which a process counts as dead
LOST = r"Gloo|NCCL|peer|coordination|heartbeat|UNAVAILABLE|DEADLINE_EXCEEDED"  # in XLA's errors


class Place(NamedTuple):
    """Of a process: its number, of how many, and where the first can be reached."""

    number: int
    count: int
    host: str
    port: int

    @property
    def address(self) -> str:
        return f"{self.host}:{self.port}"


def parse(text: str) -> Place:
    """Read `I/N@HOST:PORT`.

    Raises:
        UserError: it is something else.
    """
    found = re.fullmatch(r"(\d{1,6})/(\d{1,6})@(.+):(\d{1,5})", text)
    if not found or int(found[1]) >= int(found[2]) or not 0 < int(found[4]) < 2**16:
        raise UserError(
            f"--distributed {text} is not understood; give auto, or I/N@HOST:PORT: the number of "
            f"this process, from 0, of how many, and where process 0 can be reached"
        )
    return Place(int(found[1]), int(found[2]), found[3].strip("[]"), int(found[4]))


@contextmanager
def joined(distributed: str | None, wait: int, prog: str) -> Iterator[None]:
    """Be one of several processes; if one of them fails, all end, each with a line.

    Args:
        distributed: `I/N@HOST:PORT`; "auto": as SLURM, Open MPI, Kubernetes or a TPU pod say; None:
            this process is the only one.
        wait: seconds in which all must have come.
        prog: the command's name, for that line.

    Raises:
        UserError: a process that did not come, or has another's number.
    """
    if distributed is None:
        yield
        return
    # Signals are the run's own business: all stop at the same step (`train.py`).
    jax.config.update("jax_enable_preemption_service", False)
    where: dict[str, Any] = {}
    if distributed != "auto":
        place = parse(distributed)
        roll_call(place, wait)
        where = {
            "coordinator_address": place.address,
            "num_processes": place.count,
            "process_id": place.number,
            "cluster_detection_method": "deactivate",
        }
    try:
        jax.distributed.initialize(
            **where, initialization_timeout=wait, heartbeat_timeout_seconds=SILENT
        )
    except ValueError as error:
        raise UserError(
            f"--distributed auto found no launcher that it knows ({error}); give I/N@HOST:PORT"
        ) from None
    try:
        yield
    except UserError as error:
        _end(prog, str(error), 2)
    except BaseException as error:
        if not re.search(LOST, str(error)):
            traceback.print_exc()
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        lost = f"another process has ended ({reason}); see its last lines, then go on with --resume"
        _end(prog, lost if re.search(LOST, str(error)) else reason, 3)
    jax.distributed.shutdown()


def _end(prog: str, message: str, code: int) -> NoReturn:
    """Say why and end at once: the others notice by that, and JAX's own end would wait for them."""
    print(f"{prog}: process {jax.process_index()}: error: {message}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(code)


def first_does(work: Callable[[], T]) -> T:
    """Let the first process do something, and give its result to all.

    Args:
        work: its result must have a JSON form; tuples come back as lists.

    Raises:
        UserError: the first process's, on all.
    """
    if jax.process_count() == 1:
        return work()
    told: dict[str, Any] = {}
    if jax.process_index() == 0:
        try:
            told = {"result": work()}
        except UserError as error:
            told = {"error": str(error)}
    data = np.frombuffer(json.dumps(told).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(data.size)))
    data = multihost_utils.broadcast_one_to_all(np.resize(data, size))
    told = json.loads(np.asarray(data, np.uint8).tobytes())
    if "error" in told:
        raise UserError(told["error"])
    return told["result"]


def first_then_all(work: Callable[[], T]) -> T:
    """Let the first process do something that leaves files behind for the others, then those.

    Raises:
        UserError: the first process's, on all.
    """
    done: list[T] = []
    first_does(lambda: done.append(work()))
    return done[0] if done else work()


def is_first() -> bool:
    """Whether this process is the one that writes and prints."""
    return jax.process_index() == 0


def check_same(what: str, told: Callable[[], str]) -> None:
    """Make sure that all processes have the same of something.

    Raises:
        UserError: naming those that have another than the first.
    """
    if jax.process_count() == 1:
        return
    digest = hashlib.sha256(told().encode()).digest()
    all_of_them = multihost_utils.process_allgather(np.frombuffer(digest, np.uint8))
    others = np.flatnonzero((all_of_them != all_of_them[0]).any(axis=1))
    if len(others):
        raise UserError(
            f"process {', '.join(map(str, others))} has {what} that process 0 has not; start all "
            f"with the same command, and let them read the same files"
        )


def roll_call(place: Place, wait: float) -> None:
    """Wait until every process has come to the first one, and see that each has its own number.

    JAX waits too, but ends without a word on who is missing.

    Raises:
        UserError: naming who did not come, or came twice, or counts otherwise.
    """
    deadline = time.monotonic() + wait
    if place.number == 0:
        _call(place, deadline, wait)
    else:
        _answer(place, deadline, wait)


def _call(place: Place, deadline: float, wait: float) -> None:
    """The first process's part."""
    there: dict[int, socket.socket] = {}
    with socket.socket(socket.AF_INET6 if ":" in place.host else socket.AF_INET) as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            server.bind(("", place.port))
        except OSError as error:
            raise UserError(
                f"process 0 cannot listen at {place.address}: {error.strerror}; give another port, "
                f"or look for a second process 0"
            ) from None
        server.listen(place.count)
        problem = ""
        while len(there) < place.count - 1 and not problem:
            server.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                other, _ = server.accept()
            except TimeoutError:
                missing = [str(i) for i in range(1, place.count) if i not in there]
                i = missing[0]
                problem = (
                    f"process {', '.join(missing)} of {place.count} did not come to "
                    f"{place.address} within {wait:g} s; start it with --distributed "
                    f"{i}/{place.count}@{place.address}, or give more --distributed-wait"
                )
                continue
            try:
                other.settimeout(5)
                number, count = map(int, other.recv(100).split())
            except (OSError, ValueError):  # a stranger at the port
                other.close()
                continue
            if count != place.count:
                problem = (
                    f"process {number} was told of {count} processes, and process 0 of "
                    f"{place.count}; give all the same number"
                )
            elif number in there or number == 0:
                problem = f"two processes have the number {number} of {count}; give each its own"
            there[-1 if problem else number] = other
        for other in there.values():
            with other, suppress(OSError):
                other.sendall(problem.encode() or b"all here")
                other.shutdown(socket.SHUT_WR)
                other.recv(1)  # until it has closed, for JAX is to listen at this port
    if problem:
        raise UserError(problem)


def _answer(place: Place, deadline: float, wait: float) -> None:
    """Every other process's part."""
    problem = b""
    while not problem:
        try:
            with socket.create_connection((place.host, place.port), timeout=5) as first:
                first.sendall(f"{place.number} {place.count}\n".encode())
                first.settimeout(wait + 10)
                problem = first.recv(1000)
        except OSError:
            pass  # it has not come yet
        if not problem:
            if time.monotonic() > deadline:
                raise UserError(
                    f"process {place.number} found no process 0 at {place.address} within "
                    f"{wait:g} s; start that one, or mend the address"
                )
            time.sleep(0.2)
    if problem != b"all here":
        raise UserError(problem.decode(errors="replace"))
