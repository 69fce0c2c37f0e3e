"""Tests of multi-process runs on this machine, through gloo, each process with its own devices."""

import contextlib
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

import gptjax
from gptjax.cli.train import parse_train
from gptjax.config import MeshConfig
from gptjax.console import Report
from gptjax.errors import UserError
from gptjax.parallel import distributed
from gptjax.parallel.distributed import Place, roll_call
from gptjax.training import train

ROOT = Path(__file__).resolve().parents[1]
FLAGS = (
    *("--config", "tiny", "--data.text", "play.txt", "--batch-size", "8", "--steps", "12"),
    *("--eval-every", "6", "--save-every", "6", "--steps-per-dispatch", "2"),
    *("--model.n-layer", "1", "--model.n-embd", "16", "--model.block-size", "8"),
    *("--model.dropout", "0.1", "--optim.accumulate", "2"),
)


def free_port(first: int | None = None) -> int:
    """Any free port, or the lowest free one from `first` on."""
    for port in itertools.count(first) if first else [0]:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            return probe.getsockname()[1]
    raise AssertionError("no port is free")


class Started:
    """Processes of one run in a folder, each with its own log.

    `launched` returns the environment that a launcher would set for a process; they then use
    `--distributed auto`.
    """

    def __init__(
        self,
        folder: Path,
        *flags: tuple[str, ...],
        devices: int = 1,
        launched: Callable[[int], dict[str, str]] | None = None,
    ):
        count = len(flags)
        self.folder, port = folder, free_port()
        env = {**os.environ, "JAX_NUM_CPU_DEVICES": str(devices), "PYTHONPATH": str(ROOT)}
        self.logs = [folder / f"log-{i}.txt" for i in range(count)]
        self.children = []
        for i, log in enumerate(self.logs):
            place = "auto" if launched else f"{i}/{count}@localhost:{port}"
            its_env = env | (launched(i) if launched else {})
            words = [str(ROOT / "train.py"), *flags[i], "--distributed", place]
            with log.open("w") as file:
                self.children.append(
                    subprocess.Popen(
                        [sys.executable, "-u", *words, "--distributed-wait", "120"],
                        **{"cwd": folder, "env": its_env, "stdout": file, "stderr": file},
                    )
                )

    def end(self, timeout: float = 300) -> list[int]:
        """Wait for all processes and return their exit codes."""
        try:
            return [child.wait(timeout) for child in self.children]
        finally:
            for child in self.children:
                child.kill()

    def said(self, i: int) -> str:
        """Output of a process, without gloo's connection message."""
        return re.sub(r"^\[Gloo\].*\n", "", self.logs[i].read_text(), flags=re.MULTILINE)

    def wait_for(self, found: Callable[[], bool], timeout: float = 240) -> None:
        deadline = time.monotonic() + timeout
        while not found():
            assert time.monotonic() < deadline and self.children[0].poll() is None, self.said(0)
            time.sleep(0.05)


def losses(folder: Path, run: str) -> dict[int, dict[str, float]]:
    """Logged losses by step; each step occurs once."""
    lines = (folder / "runs" / run / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [r["step"] for r in records] == list(range(len(records)))
    return {r["step"]: {k: v for k, v in r.items() if "loss" in k} for r in records}


def alone(folder: Path, run: str, *flags: str, resume: bool = False) -> None:
    """Train in this process, on one device."""
    command = parse_train([*FLAGS, *flags, "--mesh.data", "1"])
    settings = replace(command.settings, mesh=MeshConfig(data=1))
    train(settings, folder / "runs" / run, resume=resume, report=Report(quiet=True))


def assert_same(one: dict[int, dict[str, float]], other: dict[int, dict[str, float]]) -> None:
    assert one.keys() == other.keys()
    for step, values in one.items():
        assert other[step] == pytest.approx(values, abs=1e-5), step


@pytest.fixture
def folder(tmp_path: Path, play: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "play.txt").write_text(play, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_two_processes_train_like_one(folder):
    """Same losses as one process, one log, one metrics file."""
    both = Started(folder, *2 * [(*FLAGS, "--run", "two")])
    alone(folder, "one")
    assert both.end() == [0, 0], both.said(0) + both.said(1)
    assert both.said(1) == ""
    assert "devices" in both.said(0) and "data 2" in both.said(0)
    assert_same(losses(folder, "one"), losses(folder, "two"))
    assert sorted(p.name for p in (folder / "runs/two/checkpoints").iterdir()) == ["12", "6"]


def test_a_launcher_is_recognised(folder):
    """SLURM's variables, as `srun` sets them; JAX derives the port from the job ID."""
    job = free_port(61440) - 61440

    def srun(i: int) -> dict[str, str]:
        there = {"JOB_ID": job, "STEP_NODELIST": "localhost", "NTASKS": 2, "PROCID": i}
        return {f"SLURM_{k}": str(v) for k, v in there.items()} | {"SLURM_LOCALID": str(i)}

    both = Started(folder, *2 * [(*FLAGS, "--run", "two")], launched=srun)
    assert both.end() == [0, 0], both.said(0) + both.said(1)
    assert both.said(1) == "" and "data 2" in both.said(0)
    assert losses(folder, "two").keys() == set(range(13))


@pytest.mark.slow
def test_one_process_samples_and_resumes_a_run_of_two(folder):
    both = Started(folder, *2 * [(*FLAGS, "--run", "two")])
    alone(folder, "one")
    assert both.end() == [0, 0], both.said(0) + both.said(1)

    def greedy(run: str) -> str:
        return "".join(gptjax.load(run).generate(max_new_tokens=40, temperature=0.0))

    assert greedy("two") == greedy("one")
    for run in ("one", "two"):
        alone(folder, run, "--steps", "18", resume=True)
    assert_same(losses(folder, "one"), losses(folder, "two"))


@pytest.mark.slow
def test_two_processes_resume_a_run_of_four(folder):
    """Two devices each, sharded along all axes."""
    mesh = ("--mesh.data", "2", "--mesh.fsdp", "2", "--mesh.tensor", "2", "--optim.ema", "0.5")
    flags = (*mesh, "--optim.kind", "muon")
    four = Started(folder, *4 * [(*FLAGS, *flags, "--run", "four")], devices=2)
    assert four.end() == [0] * 4, "".join(map(four.said, range(4)))
    assert [four.said(i) for i in (1, 2, 3)] == [""] * 3
    flags = ("--optim.ema", "0.5", "--optim.kind", "muon")
    alone(folder, "one", *flags)
    assert_same(losses(folder, "one"), losses(folder, "four"))
    again = ("--run", "four", "--resume", "--steps", "18", "--mesh.data", "2", "--mesh.tensor", "1")
    two = Started(folder, *2 * [again], devices=2)
    assert two.end() == [0, 0], two.said(0) + two.said(1)
    alone(folder, "one", *flags, "--steps", "18", resume=True)
    assert_same(losses(folder, "one"), losses(folder, "four"))


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_at_the_same_step(folder):
    flags = (*FLAGS, "--steps", "4000", "--eval-every", "4000", "--save-every", "4000")
    both = Started(folder, *2 * [(*flags, "--run", "two")])
    both.wait_for(lambda: "loss: train sampled" in both.said(0))
    time.sleep(3)
    both.children[1].send_signal(signal.SIGTERM)
    assert both.end() == [0, 0], both.said(0) + both.said(1)
    [step] = map(int, re.findall(r"stopped after step (\d+);", both.said(0)))
    assert 0 < step < 4000
    assert [p.name for p in (folder / "runs/two/checkpoints").iterdir()] == [str(step)]
    assert max(losses(folder, "two")) == step
    assert both.said(1).strip().startswith("finishing this step and saving")


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_others_and_the_run_resumes(folder, victim):
    flags = (*FLAGS, "--steps", "4000", "--eval-every", "4000", "--save-every", "100")
    both = Started(folder, *2 * [(*flags, "--run", "two")])
    both.wait_for(lambda: (folder / "runs/two/checkpoints/100").exists())
    both.children[victim].kill()
    killed = time.monotonic()
    codes = both.end(timeout=90)
    assert time.monotonic() - killed < 80
    assert codes[victim] == -signal.SIGKILL and codes[1 - victim] not in (0, None)
    said = both.said(1 - victim)
    assert f"process {1 - victim}: error: another process has ended" in said or (
        "another task died" in said  # JAX's own message, if the coordinator is gone
    )
    step = max(int(p.name) for p in (folder / "runs/two/checkpoints").iterdir() if p.name.isdigit())
    again = ("--run", "two", "--resume", "--steps", str(step + 8))
    four = Started(folder, *4 * [again])
    assert four.end() == [0] * 4, "".join(map(four.said, range(4)))
    assert max(losses(folder, "two")) == step + 8


@pytest.mark.slow
def test_another_seed_in_one_process_is_named(folder):
    flags = [(*FLAGS, "--run", "two", "--seed", seed) for seed in "12"]
    both = Started(folder, *flags)
    assert both.end() == [2, 2], both.said(0)
    error = both.said(0)
    assert error.startswith("train.py: process 0: error: process 1 has a text or settings")
    assert "different from process 0" in error and error.count("\n") == 1


# ---------------------------------------------------------------------------------------------
# The roll call


def call(*places: Place, wait: float = 5) -> list[str]:
    """Run the roll call for each process; its error, or "" if all are present."""
    errors = [""] * len(places)

    def connect(i: int) -> None:
        try:
            roll_call(places[i], wait)
        except UserError as error:
            errors[i] = str(error)

    threads = [threading.Thread(target=connect, args=(i,)) for i in range(len(places))]
    for thread in threads:
        thread.start()
        time.sleep(0.1)  # in this order
    for thread in threads:
        thread.join()
    return errors


@pytest.fixture
def port() -> int:
    return free_port()


def test_a_roll_call_of_all_processes_succeeds(port):
    assert call(*[Place(i, 4, "localhost", port) for i in (3, 0, 1, 2)]) == [""] * 4
    assert call(*[Place(i, 2, "localhost", port) for i in range(2)]) == [""] * 2  # and again


def test_missing_processes_are_named_on_all_processes(port):
    errors = call(Place(0, 4, "localhost", port), Place(2, 4, "localhost", port), wait=0.5)
    assert errors[0].startswith(f"process 1, 3 of 4 did not connect to localhost:{port} within 0.5")
    assert f"--distributed 1/4@localhost:{port}" in errors[0]
    assert "--distributed-wait" in errors[0] and errors[1] == errors[0]


def test_a_duplicate_rank_is_named_on_all_processes(port):
    errors = call(*[Place(i, 3, "localhost", port) for i in (0, 1, 1)])
    assert errors[0].startswith("two processes have rank 1 of 3") and len(set(errors)) == 1


def test_another_world_size_is_named_on_all_processes(port):
    errors = call(Place(0, 2, "localhost", port), Place(1, 3, "localhost", port))
    assert errors[0].startswith("process 1 expects 3 processes, and process 0 expects 2")
    assert errors[1] == errors[0]


def test_a_second_process_0_is_refused(port):
    first, second, other = call(*[Place(i, 2, "localhost", port) for i in (0, 0, 1)])
    assert first == other == ""
    assert second.startswith(f"process 0 cannot listen at localhost:{port}: Address already in use")


def test_a_missing_process_0_is_reported(port):
    [error] = call(Place(1, 2, "localhost", port), wait=0.3)
    assert error.startswith(f"process 1 found no process 0 at localhost:{port} within 0.3 s")


def test_a_foreign_connection_changes_nothing(port):
    def visit() -> None:
        time.sleep(0.05)
        with socket.create_connection(("localhost", port)) as stranger:
            stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")

    visitor = threading.Thread(target=visit)
    visitor.start()
    assert call(*[Place(i, 2, "localhost", port) for i in range(2)]) == ["", ""]
    visitor.join()


@pytest.mark.parametrize(
    "text", ["", "2/2@host:1", "1/2@host", "1/2@host:0", "1/2@host:99999", "x/2@host:1", "1/2"]
)
def test_malformed_addresses_are_refused(text):
    with pytest.raises(UserError) as caught:
        distributed.parse(text)
    message = str(caught.value)
    assert message.startswith(f"--distributed {text} is not understood")
    assert "auto or RANK/WORLD@HOST:PORT" in message


def test_addresses_are_parsed():
    assert distributed.parse("1/2@10.0.0.1:8476") == Place(1, 2, "10.0.0.1", 8476)
    assert distributed.parse("0/16@node-0.gpt:1234").address == "node-0.gpt:1234"
    assert distributed.parse("0/2@[::1]:99").host == "::1"
