"""Tests of watching a training: trackers fed from the run's files, samples, warnings."""

import json
import os
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

import pytest
from run_helpers import CONFIG, message, records, text_file

from gptjax.console import Report
from gptjax.errors import UserError
from gptjax.runs import samples
from gptjax.runs.run import Run
from gptjax.text.tokenizers import CharTokenizer
from gptjax.track import diagnose, process, state
from gptjax.track.feed import feed, follow
from gptjax.track.points import Curve, Point, named
from gptjax.track.trackers import PACKAGES, check_installed, open_tracker
from gptjax.training import train

REPO = Path(__file__).resolve().parents[1]


def record(step: int, loss: float | None = 3.0, **more: Any) -> dict[str, Any]:
    """A line of metrics.jsonl."""
    training = {} if step == 0 else {"loss": loss, "grad_norm": 0.5, "lr": 1e-3}
    return {"step": step, **training, "seconds": step / 4, **more}


@pytest.fixture
def run(tmp_path) -> Path:
    """A run's folder with the metrics of 10 steps, two evaluations and a sample."""
    directory = tmp_path / "runs" / "mine"
    made = Run.create(directory, CONFIG, CharTokenizer("abc"))
    made.log([record(0, val_loss=4.0), *(record(i, 3.0 - i / 10) for i in range(1, 10))])
    made.log([record(10, 2.0, val_loss=2.5, **{"grad_norms/h/0": 0.25})])
    samples.append(directory, 10, "a `b`\nc")
    return directory


# ---------------------------------------------------------------------------------------------
# Records as points


def test_names_are_those_that_users_of_trackers_expect():
    found = named(
        record(8, val_loss=2.5, val_bits_per_byte=3.6, train_sampled_loss=2.4, aux=1)
        | {"val_sampled_loss": 2.6, "grad_norms/h/0": 0.1, "gone": None}
    )
    assert found == {
        "train/loss": 3.0,
        "grad_norm": 0.5,
        "lr": 1e-3,
        "val/loss": 2.5,
        "val/bits_per_byte": 3.6,
        "val/sampled_loss": 2.6,
        "train/sampled_loss": 2.4,
        "aux": 1.0,
        "grad_norms/h/0": 0.1,
    }
    assert named({"step": 3, "skipped": "loss nan", "seconds": 1.0}) == {"skipped": 1.0}


def test_the_rate_is_that_of_whole_dispatches():
    # Dispatches of 3 steps, which take 1 s each and have one time; then a session that resumed.
    curve = Curve(tokens_per_step=100, peaks={0: 600.0, 6: 1200.0})
    steps = [curve.point({"step": i, "seconds": float(-(-i // 3))}) for i in range(10)]
    assert [p.values["tokens"] for p in steps] == [100.0 * i for i in range(10)]
    rates = {p.step: p.values["tokens_per_second"] for p in steps if len(p.values) > 1}
    assert rates == {1: 100.0, 4: 300.0, 7: 300.0}
    assert [steps[i].values["mfu"] for i in (4, 7)] == [0.5, 0.25]
    assert "mfu" not in Curve(100, {}).point({"step": 9, "seconds": 9.0}).values


def test_following_a_file_that_grows(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\nrubbish\n{"step": "x"}\n{"step": 1}\n{"ste')
    found, looks = [], []

    def ended() -> bool:
        looks.append(len(found))
        if len(looks) == 2:
            with path.open("a") as file:
                file.write('p": 2}\n')
        return len(looks) == 3

    for some in follow(path, ended):
        found += some
    assert [r["step"] for r in found] == [0, 1, 2]
    assert looks == [0, 2, 3]


# ---------------------------------------------------------------------------------------------
# Feeding


class Kept:
    """A tracker that keeps what it is given."""

    def __init__(self) -> None:
        self.points: list[Point] = []
        self.closed = False

    def write(self, points: Any) -> None:
        self.points += points

    def close(self) -> None:
        self.closed = True


def test_feeding_gives_every_step_once_with_its_sample(run):
    kept = Kept()
    assert feed(run, "wandb", lambda: True, open_tracker=lambda name, place: kept) == 11
    assert [p.step for p in kept.points] == list(range(11)) and kept.closed
    assert kept.points[10].text == "a `b`\nc" and kept.points[9].text is None
    assert kept.points[10].values["val/loss"] == 2.5


def test_what_feeding_refuses_is_one_line(run, tmp_path):
    def fails(name: str, place: Any) -> Any:
        raise ConnectionError("no route\nto host")

    refused = message(feed, run, "wandb", lambda: True, open_tracker=fails)
    assert refused == "wandb failed: ConnectionError: no route"
    inside = lambda name, place: message(feed, run, name, lambda: True)
    seen: list[str] = []
    with pytest.raises(UserError):
        feed(run, "wandb", lambda: True, open_tracker=lambda *a: seen.append(inside(*a)))  # type: ignore
    assert seen and "another process feeds wandb" in seen[0]
    (run / "metrics.jsonl").unlink()
    assert "has no metrics yet" in message(feed, run, "wandb", lambda: True)


def test_a_run_keeps_its_name_for_trackers(run):
    first = state.read(run)
    assert state.read(run) == first
    state.begin(run, 0, 10.0)
    state.begin(run, 8, 20.0)
    state.begin(run, 4, None)  # resumed from an earlier step, on unknown devices
    assert state.read(run) == (first.id, {0: 10.0})
    (run / state.FOLDER / "state.json").write_text('{"id": "../x", "peaks": {}}')
    assert state.read(run).id.isalnum()


# ---------------------------------------------------------------------------------------------
# Trackers that fail while a run is training: `tensorboard` is a package that does


@pytest.fixture
def broken(tmp_path, monkeypatch):
    """A function that puts a package tensorboard, whose import runs some lines, on the path."""

    def make(lines: str) -> None:
        folder = tmp_path / "path" / "tensorboard"
        folder.mkdir(parents=True)
        (folder / "__init__.py").write_text(lines)
        monkeypatch.setenv("PYTHONPATH", str(folder.parent))
        monkeypatch.syspath_prepend(folder.parent)

    return make


def tracked(run: Path, seconds: float = 10.0) -> list[str]:
    """What is said while a run of that length is tracked; checked all the time."""
    said: list[str] = []
    with process.tracking(run, ["tensorboard"], said.append) as check:
        until = time.monotonic() + seconds
        while time.monotonic() < until and len(said) < 2:
            check()
            time.sleep(0.05)
    return said


@pytest.mark.parametrize(
    "lines, why",
    [
        ("raise ConnectionError('no route')", "ConnectionError: no route"),
        ("import os; os._exit(3)", "exit code 3"),
    ],
)
def test_a_tracker_that_dies_is_one_line(run, broken, lines, why):
    state.begin(run, 0, None)
    broken(lines)
    said = tracked(run)
    assert len(said) == 2 and said[0].startswith("tracking with tensorboard; to look: ")
    assert why in said[1] and "the training continues" in said[1]
    assert f"gptjax track {run} --to tensorboard" in said[1]


def test_a_tracker_that_hangs_is_left_behind(run, broken, monkeypatch):
    state.begin(run, 0, None)
    broken("import time; time.sleep(60)")
    monkeypatch.setattr(process, "PATIENCE", 0.1)
    started = []
    popen = subprocess.Popen
    monkeypatch.setattr(
        subprocess, "Popen", lambda *a, **k: started.append(popen(*a, **k)) or started[0]
    )
    try:
        [_, said] = tracked(run, seconds=0.0)
        assert "tensorboard is still writing" in said
    finally:
        started[0].kill()
        started[0].wait()


class Heard(Report):
    """A report that keeps the lines."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


def test_a_run_trains_on_when_its_tracker_dies(tmp_path, play, broken):
    broken("raise ConnectionError('no route')")
    config = replace(CONFIG, data=text_file(tmp_path, play), track=("tensorboard",))
    heard = Heard()
    train(config, tmp_path / "run", report=heard)
    assert sum("ConnectionError: no route" in line for line in heard.lines) == 1
    assert [r["step"] for r in records(tmp_path / "run")] == list(range(9))
    assert list(samples.read(tmp_path / "run")) == [0, 4, 8]
    assert state.read(tmp_path / "run").peaks.keys() == {0}
    assert Run(tmp_path / "run").config.track == ("tensorboard",)


def test_a_tracker_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(PACKAGES, "mlflow", ("no_such_package",))
    assert "pip install 'gptjax[mlflow]'" in message(check_installed, ["mlflow"])
    assert "unknown tracker 'csv'" in message(open_tracker, "csv", None)


# ---------------------------------------------------------------------------------------------
# The libraries. Each is fed twice, as a run that was killed and resumed: the second session writes
# other values from step 6 on, and fewer steps.


def of_tensorboard(run: Path) -> dict[str, list[tuple[int, float]]]:
    code = f"""
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
import json
found = EventAccumulator({str(run)!r}, size_guidance={{"scalars": 0, "tensors": 0}}).Reload()
scalars, texts = found.Tags()["scalars"], found.Tensors("sample")
curves = {{name: [(e.step, e.value) for e in found.Scalars(name)] for name in scalars}}
curves["sample"] = [(e.step, e.tensor_proto.string_val[0].decode()) for e in texts]
print(json.dumps(curves))
"""
    return json.loads(python("-c", code))


def of_trackio(run: Path) -> dict[str, list[tuple[int, float]]]:
    code = f"""
import json, os
os.environ["TRACKIO_DIR"] = {str(run.parent / "trackio")!r}
import trackio
from trackio.sqlite_storage import SQLiteStorage
curves = {{}}
for found in trackio.Api().runs("gptjax"):
    for line in SQLiteStorage.get_logs("gptjax", found.name, run_id=found.id):
        for name, x in line.items():
            curves.setdefault(name, []).append((line["step"], x))
print(json.dumps(curves))
"""
    return json.loads(python("-c", code).splitlines()[-1])


def of_mlflow(run: Path) -> dict[str, list[tuple[int, float]]]:
    code = f"""
import json
from mlflow import MlflowClient
client = MlflowClient("sqlite:///{run.parent / "mlflow.db"}")
experiment = client.get_experiment_by_name("gptjax").experiment_id
curves = {{}}
for found in client.search_runs([experiment]):
    for name in found.data.metrics:
        points = client.get_metric_history(found.info.run_id, name)
        curves.setdefault(name, []).extend((p.step, p.value) for p in points)
    curves["sample"] = [(0, str(client.list_artifacts(found.info.run_id, "samples")))]
print(json.dumps(curves))
"""
    return json.loads(python("-c", code))


def of_wandb(run: Path) -> dict[str, list[tuple[int, float]]]:
    """Of the offline folder: a log of records as LevelDB writes it."""
    code = f"""
import json, pathlib, struct
from wandb.proto.wandb_internal_pb2 import Record
curves = {{}}
for path in pathlib.Path({str(run.parent)!r}).glob("wandb/offline-run-*/*.wandb"):
    data, at, whole = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        length, part = struct.unpack("<HB", data[at + 4 : at + 7])
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if part in (1, 4):
            record, whole = Record.FromString(whole), b""
            items = {{i.key or "/".join(i.nested_key): json.loads(i.value_json)
                      for i in record.history.item}}
            for name, x in items.items():
                curves.setdefault(name, []).append((items["_step"], x))
print(json.dumps(curves))
"""
    return json.loads(python("-c", code))


def python(*words: str) -> str:
    """The standard output of a Python process."""
    names = "WANDB_MODE WANDB_DIR TRACKIO_DIR MLFLOW_TRACKING_URI"
    env = {k: v for k, v in os.environ.items() if k not in names.split()}
    ran = subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, env=env, cwd=REPO, timeout=120
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


@pytest.mark.parametrize(
    "name, read",
    [
        ("tensorboard", of_tensorboard),
        ("trackio", of_trackio),
        ("wandb", of_wandb),
        pytest.param("mlflow", of_mlflow, marks=pytest.mark.slow),  # it migrates its database
    ],
)
def test_a_tracker_holds_each_step_once(run, name, read):
    for package in PACKAGES[name]:
        if PathFinder.find_spec(package) is None:
            pytest.skip(f"needs {package}")
    replay = ("-m", "gptjax", "track", str(run), "--to", name)
    assert f"11 records of {run} are in {name}" in python(*replay)
    made = Run(run)
    made.rewind_metrics(5)
    made.log([record(i, 1.0 + i / 10) for i in range(6, 9)])
    samples.append(run, 8, "second")
    python(*replay)
    curves = read(run)
    steps = Counter(step for step, _ in curves["train/loss"])
    assert steps == Counter(range(1, 9))
    losses = dict(curves["train/loss"])
    assert losses[5] == pytest.approx(2.5) and losses[8] == pytest.approx(1.8)
    assert curves["val/loss"] == [[0, 4.0]]
    assert "sample" not in curves or "a `b`" not in str(curves["sample"])


# ---------------------------------------------------------------------------------------------
# Samples


def test_samples_are_kept_by_step(tmp_path):
    assert samples.read(tmp_path) == {}
    samples.append(tmp_path, 0, "none\n")
    samples.append(tmp_path, 4, "\u00e9 \U0001f600")
    with (tmp_path / samples.NAME).open("ab") as file:
        file.write(b'rubbish\n{"step": "5", "text": ""}\n[]\n{"step": 8, "te')
    assert samples.read(tmp_path) == {0: "none\n", 4: "\u00e9 \U0001f600"}
    samples.rewind(tmp_path, 3)
    assert (tmp_path / samples.NAME).read_text() == '{"step": 0, "text": "none\\n"}\n'


# ---------------------------------------------------------------------------------------------
# Warnings


def history(*evaluated: tuple[float, float], every: int = 20, **more: Any) -> list[dict[str, Any]]:
    """Records whose steps before each evaluation have one training loss: (loss, val_loss) each."""
    found = [record(0, val_loss=evaluated[0][1])]
    for i, (loss, val) in enumerate(evaluated[1:]):
        found += [record(i * every + j, loss, **more) for j in range(1, every + 1)]
        found[-1]["val_loss"] = val
    return found


LN_65 = 4.174
WELL = history((0, 4.2), (3.5, 3.0), (2.6, 2.5), (2.2, 2.2), (2.0, 2.21), (1.9, 2.19))
SAMPLED = [
    {("val_sampled_loss" if k == "val_loss" else k): x for k, x in r.items()}
    for r in history((0, 4.2), (2.5, 2.4), (2.4, 2.2), (2.3, 2.45), (2.2, 2.3), (2.1, 2.3))
]


@pytest.mark.parametrize(
    "lines, facts, words",
    [
        (WELL, {}, []),
        (SAMPLED, {}, []),  # 2.2 was luck
        ([], {}, []),
        (history((0, 9.0), (3.5, 3.0)), {}, ["before training is 9.00, a uniform guess has 4.17"]),
        (history((0, 2.0), (3.5, 3.0)), {}, ["cannot see", "has risen from 2.000"]),
        (history((0, 2.0), (1.5, 1.5)), {"chance": None}, []),  # pretrained
        (
            history((0, 4.2), (3.0, 3.0), (2.5, 2.8), (2.0, 3.0), (1.5, 3.2)),
            {},
            ["overfits: the validation loss has risen since about step 40 (2.8000 then, 3.2000"],
        ),
        (
            history((0, 4.2), (3.0, 3.0), (2.0, 2.0), (3.1, 3.1)),
            {},
            ["the mean loss has risen from 2.000 (up to step 40) to 3.100 (up to step 60)"],
        ),
        (history((0, 4.2), (50.0, 40.0)), {}, ["learning rate is probably too high"]),
        (
            history((0, 4.2), (3.0, 3.0), (2.9, 2.9), grad_norm=9.0),
            {"grad_clip": 1.0},
            ["nearly every gradient since step 1 was clipped (median norm 9"],
        ),
        (history((0, 4.2), (3.0, 3.0), (2.9, 2.9), grad_norm=9.0), {}, []),  # not clipped
        (
            history((0, 4.2), (3.0, 3.0), (2.9, 2.9), grad_norm=9.0),
            {"grad_clip": 1.0, "warmup_steps": 40},
            [],
        ),
    ],
)
def test_warnings(tmp_path, lines, facts, words):
    facts = diagnose.Facts(**{"chance": LN_65, **facts})
    said: list[str] = []
    watch = diagnose.Watch(facts, said.append, tmp_path / "metrics.jsonl")
    for start in range(0, len(lines), 7):  # as they come in a run
        watch.see(lines[start : start + 7])
    assert len(said) == len(words)
    for line, expected in zip(said, words, strict=True):
        assert expected in line and line.startswith("warning: ")


def test_a_resumed_run_remembers_what_came_before(run, tmp_path):
    # The first evaluations are in the file; only the last one is seen.
    found = history((0, 4.2), (3.0, 3.0), (2.5, 2.8), (2.0, 3.0), (1.5, 3.2))
    lines = "".join(json.dumps(r) + "\n" for r in found[:-10])
    (tmp_path / "metrics.jsonl").write_text(lines)
    said: list[str] = []
    diagnose.Watch(diagnose.Facts(), said.append, tmp_path / "metrics.jsonl").see(found[-10:])
    [line] = said
    assert "overfits" in line


def test_no_trackers_and_no_norms_by_default():
    assert (CONFIG.track, CONFIG.norms_every) == ((), None)
    assert "norms_every=0 is too small" in message(replace, CONFIG, norms_every=0)
