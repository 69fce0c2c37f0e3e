"""Multi-process runs with `jax.distributed`, on one machine or many.

Every process runs the same program on its own devices. Only process 0 writes files and prints
(`first_does`); the others receive its result or its error.
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
SILENT = 60  # heartbeat timeout in seconds, after which a process counts as dead
LOST = r"Gloo|NCCL|peer|coordination|heartbeat|UNAVAILABLE|DEADLINE_EXCEEDED"  # in XLA's errors


class Place(NamedTuple):
    """A process's rank, the number of processes, and the coordinator's address."""

    number: int
    count: int
    host: str
    port: int

    @property
    def address(self) -> str:
        return f"{self.host}:{self.port}"


def parse(text: str) -> Place:
    """Parse `RANK/WORLD@HOST:PORT`.

    Raises:
        UserError: another format, or a rank that is not below the world size.
    """
    found = re.fullmatch(r"(\d{1,6})/(\d{1,6})@(.+):(\d{1,5})", text)
    if not found or int(found[1]) >= int(found[2]) or not 0 < int(found[4]) < 2**16:
        raise UserError(
            f"--distributed {text} is not understood; give auto or RANK/WORLD@HOST:PORT: this "
            f"process's rank from 0, the number of processes, and the address of process 0"
        )
    return Place(int(found[1]), int(found[2]), found[3].strip("[]"), int(found[4]))


@contextmanager
def joined(distributed: str | None, wait: int, prog: str) -> Iterator[None]:
    """Join a multi-process run; if one process fails, all exit with an error line.

    Args:
        distributed: `RANK/WORLD@HOST:PORT`; "auto": detect SLURM, Open MPI, Kubernetes or a TPU
            pod; None: a single process.
        wait: timeout in seconds for all processes to join.
        prog: the command's name, for the error line.

    Raises:
        UserError: a process is missing, or two have the same rank.
    """
    if distributed is None:
        yield
        return
    # `signals.Stop` handles signals, so that all processes stop at the same step.
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
            f"--distributed auto found no known launcher ({error}); give RANK/WORLD@HOST:PORT"
        ) from None
    try:
        yield
    except UserError as error:
        _end(prog, str(error), 2)
    except BaseException as error:
        if not re.search(LOST, str(error)):
            traceback.print_exc()
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        lost = f"another process has ended ({reason}); see its output, then continue with --resume"
        _end(prog, lost if re.search(LOST, str(error)) else reason, 3)
    jax.distributed.shutdown()


def _end(prog: str, message: str, code: int) -> NoReturn:
    """Print the reason and exit without JAX's shutdown, which would wait for the others."""
    print(f"{prog}: process {jax.process_index()}: error: {message}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(code)


def first_does(work: Callable[[], T]) -> T:
    """Run `work` on process 0 and broadcast its result.

    Args:
        work: its result must be serialisable as JSON; tuples come back as lists.

    Raises:
        UserError: raised by `work`, on all processes.
    """
    if jax.process_count() == 1:
        return work()
    outcome: dict[str, Any] = {}
    if jax.process_index() == 0:
        try:
            outcome = {"result": work()}
        except UserError as error:
            outcome = {"error": str(error)}
    data = np.frombuffer(json.dumps(outcome).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(data.size)))
    data = multihost_utils.broadcast_one_to_all(np.resize(data, size))
    outcome = json.loads(np.asarray(data, np.uint8).tobytes())
    if "error" in outcome:
        raise UserError(outcome["error"])
    return outcome["result"]


def first_then_all(work: Callable[[], T]) -> T:
    """Run `work` on process 0 and then on the others, which can use the files that it wrote.

    Raises:
        UserError: raised by `work` on process 0, on all processes.
    """
    done: list[T] = []
    first_does(lambda: done.append(work()))
    return done[0] if done else work()


def is_first() -> bool:
    """Whether this is process 0, which writes files and prints."""
    return jax.process_index() == 0


def check_same(what: str, described: Callable[[], str]) -> None:
    """Check that all processes have the same value.

    Args:
        what: the value's name, for the error.
        described: returns the value as text.

    Raises:
        UserError: naming the processes whose value differs from process 0's.
    """
    if jax.process_count() == 1:
        return
    digest = hashlib.sha256(described().encode()).digest()
    digests = multihost_utils.process_allgather(np.frombuffer(digest, np.uint8))
    others = np.flatnonzero((digests != digests[0]).any(axis=1))
    if len(others):
        raise UserError(
            f"process {', '.join(map(str, others))} has {what} different from process 0; start all "
            f"with the same command and the same files"
        )


def roll_call(place: Place, wait: float) -> None:
    """Wait until every process has connected to process 0, and check their ranks.

    JAX waits too, but does not say which process is missing.

    Raises:
        UserError: naming processes that are missing, share a rank, or have another world size.
    """
    deadline = time.monotonic() + wait
    if place.number == 0:
        _call(place, deadline, wait)
    else:
        _answer(place, deadline, wait)


def _call(place: Place, deadline: float, wait: float) -> None:
    """Process 0: accept a connection from every other process, then answer them all."""
    connected: dict[int, socket.socket] = {}
    with socket.socket(socket.AF_INET6 if ":" in place.host else socket.AF_INET) as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            server.bind(("", place.port))
        except OSError as error:
            raise UserError(
                f"process 0 cannot listen at {place.address}: {error.strerror}; give another port, "
                f"or stop the other process 0"
            ) from None
        server.listen(place.count)
        problem = ""
        while len(connected) < place.count - 1 and not problem:
            server.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                other, _ = server.accept()
            except TimeoutError:
                missing = [str(i) for i in range(1, place.count) if i not in connected]
                i = missing[0]
                problem = (
                    f"process {', '.join(missing)} of {place.count} did not connect to "
                    f"{place.address} within {wait:g} s; start it with --distributed "
                    f"{i}/{place.count}@{place.address}, or raise --distributed-wait"
                )
                continue
            try:
                other.settimeout(5)
                number, count = map(int, other.recv(100).split())
            except (OSError, ValueError):  # not a gptjax process
                other.close()
                continue
            if count != place.count:
                problem = (
                    f"process {number} expects {count} processes, and process 0 expects "
                    f"{place.count}; give all the same number"
                )
            elif number in connected or number == 0:
                problem = f"two processes have rank {number} of {count}; give each its own"
            connected[-1 if problem else number] = other
        for other in connected.values():
            with other, suppress(OSError):
                other.sendall(problem.encode() or b"all here")
                other.shutdown(socket.SHUT_WR)
                other.recv(1)  # wait until it closes: JAX needs this port next
    if problem:
        raise UserError(problem)


def _answer(place: Place, deadline: float, wait: float) -> None:
    """The other processes: report to process 0 and wait for its answer."""
    problem = b""
    while not problem:
        try:
            with socket.create_connection((place.host, place.port), timeout=5) as first:
                first.sendall(f"{place.number} {place.count}\n".encode())
                first.settimeout(wait + 10)
                problem = first.recv(1000)
        except OSError:
            pass  # it is not listening yet
        if not problem:
            if time.monotonic() > deadline:
                raise UserError(
                    f"process {place.number} found no process 0 at {place.address} within "
                    f"{wait:g} s; start it, or correct the address"
                )
            time.sleep(0.2)
    if problem != b"all here":
        raise UserError(problem.decode(errors="replace"))
