"""The trackers: each writes points through its own library, and holds each step once.

A tracker is made of a `Place` and has `write(points)` and `close()`. It begins with an empty curve,
whatever an earlier session left: a store on this machine is written again from the run's files;
what is at a server is continued. Libraries are imported here and nowhere else, in a process that
does not train.
"""

import html
import json
import os
import shutil
from collections.abc import Callable, Sequence
from importlib.machinery import PathFinder
from pathlib import Path
from shlex import quote
from typing import Any, NamedTuple, Protocol

from gptjax.errors import UserError, optional_import
from gptjax.track import state
from gptjax.track.points import Point

PROJECT = "gptjax"
OURS = ".gptjax"  # ends the names of our event files
METRICS_A_CALL = 1000  # what MLflow takes at once
SAMPLE = "sample"
# Packages by tracker; an extra has the tracker's name.
PACKAGES = {
    "tensorboard": ("tensorboard",),
    "wandb": ("wandb",),
    "trackio": ("trackio",),
    "mlflow": ("mlflow", "sqlalchemy", "alembic"),
}


class Place(NamedTuple):
    """A run as trackers see it.

    Attributes:
        directory: of the run.
        id: the run's own, the same in every session.
        config: the content of config.json.
        born: when the run was made, in seconds since 1970.
        loss_at: the training loss of a step as it is in metrics.jsonl now; None: there is none.
    """

    directory: Path
    id: str
    config: dict[str, Any]
    born: float
    loss_at: Callable[[int], float | None]

    @property
    def name(self) -> str:
        return self.directory.resolve().name

    @property
    def beside(self) -> Path:
        """The folder that the run lies in, where trackers keep what is of several runs."""
        return self.directory.resolve().parent


class Tracker(Protocol):
    def write(self, points: Sequence[Point]) -> None: ...

    def close(self) -> None: ...


def check_installed(names: Sequence[str]) -> None:
    """See that the packages of trackers are there, without importing them.

    Raises:
        UserError: one is not; names the extra.
    """
    for name in names:
        for package in PACKAGES[name]:
            if PathFinder.find_spec(package) is None:
                raise UserError(
                    f"tracking with {name} needs the package {package}: pip install "
                    f"'gptjax[{name}]' (from a checkout -e '.[{name}]'), or give --track without "
                    f"it"
                )


def open_tracker(name: str, place: Place) -> Tracker:
    """The tracker of this name, ready for the points of a run from its first one.

    Raises:
        UserError: its package is not installed.
    """
    os.environ.setdefault("DO_NOT_TRACK", "true")
    match name:
        case "tensorboard":
            return TensorBoard(place)
        case "wandb":
            return WandB(place)
        case "trackio":
            return Trackio(place)
        case "mlflow":
            return MLflow(place)
    raise UserError(f"unknown tracker {name!r}; give one of {', '.join(PACKAGES)}")


def how_to_look(name: str, directory: Path) -> str:
    """The command that shows what a tracker has."""
    beside = directory.parent
    match name:
        case "tensorboard":
            return f"tensorboard --logdir {quote(str(beside))}"
        case "wandb":
            folder = Path(os.environ.get("WANDB_DIR", beside)) / "wandb"
            return f"wandb sync {quote(str(folder))}/offline-run-*-{state.read(directory).id}"
        case "trackio":
            folder = quote(os.environ.get("TRACKIO_DIR", str(beside / "trackio")))
            return f"TRACKIO_DIR={folder} trackio show --project {PROJECT}"
    uri = os.environ.get("MLFLOW_TRACKING_URI", f"sqlite:///{beside}/mlflow.db")
    return f"mlflow ui --backend-store-uri {quote(uri)}"


class TensorBoard:
    """An event file in the run's folder."""

    def __init__(self, place: Place):
        writer = optional_import("tensorboard.summary.writer.event_file_writer", "tensorboard")
        self._events = optional_import("tensorboard.compat.proto.event_pb2", "tensorboard")
        self._summary = optional_import("tensorboard.compat.proto.summary_pb2", "tensorboard")
        self._text = optional_import("tensorboard.plugins.text.summary_v2", "tensorboard").text_pb
        self._born = place.born
        before = list(place.directory.glob(f"events.out.tfevents.*{OURS}"))
        folder = str(place.directory)
        self._writer = writer.EventFileWriter(folder, flush_secs=2, filename_suffix=OURS)
        # A reader that is open drops what it has read from step 0 on.
        start = self._events.SessionLog(status=self._events.SessionLog.START)
        self._add(0, 0.0, session_log=start)
        for path in before:
            path.unlink()
        config = json.dumps(place.config, indent=1)
        self._add(0, 0.0, summary=self._text("config", _fenced(config)))

    def write(self, points: Sequence[Point]) -> None:
        value = self._summary.Summary.Value
        for point in points:
            values = [value(tag=name, simple_value=x) for name, x in point.values.items()]
            self._add(point.step, point.seconds, summary=self._summary.Summary(value=values))
            if point.text is not None:
                text = self._text(SAMPLE, _fenced(point.text))
                self._add(point.step, point.seconds, summary=text)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()

    def _add(self, step: int, seconds: float, **what: Any) -> None:
        event = self._events.Event(step=step, wall_time=self._born + seconds, **what)
        self._writer.add_event(event)


class WandB:
    """A folder to be synchronised with the server; or the server, with WANDB_MODE=online."""

    def __init__(self, place: Place):
        mode = os.environ.setdefault("WANDB_MODE", "offline")
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        folder = Path(os.environ.setdefault("WANDB_DIR", str(place.beside)))
        self._wandb = wandb = optional_import("wandb", "wandb")
        if mode == "offline":
            for before in folder.glob(f"wandb/offline-run-*-{place.id}"):
                if not any(before.glob("*.synced")):
                    shutil.rmtree(before)
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=place.name,
            id=place.id,
            resume=None if mode == "offline" else "allow",
            config=place.config,
            mode=mode,
            dir=folder,
            settings=wandb.Settings(
                silent=True, console="off", disable_git=True, save_code=False, x_disable_stats=True
            ),
        )
        self._first = self._run.step  # a server keeps what it has

    def write(self, points: Sequence[Point]) -> None:
        for point in points:
            if point.step >= self._first:
                values: dict[str, Any] = dict(point.values)
                if point.text is not None:
                    values[SAMPLE] = self._wandb.Html(f"<pre>{html.escape(point.text)}</pre>")
                self._run.log(values, step=point.step)

    def close(self) -> None:
        self._run.finish()


class Trackio:
    """A database beside the runs, or in TRACKIO_DIR."""

    def __init__(self, place: Place):
        os.environ.setdefault("TRACKIO_DIR", str(place.beside / "trackio"))
        os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
        self._trackio = trackio = optional_import("trackio", "trackio")
        try:
            before = list(trackio.Api().runs(PROJECT))
        except ValueError:  # no such project yet
            before = []
        for run in before:
            if (run.config or {}).get("gptjax_id") == place.id:
                run.delete()
        self._run = trackio.init(
            project=PROJECT,
            name=place.name,
            config={**place.config, "gptjax_id": place.id},
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def write(self, points: Sequence[Point]) -> None:
        for point in points:
            values: dict[str, Any] = dict(point.values)
            if point.text is not None:
                values[SAMPLE] = self._trackio.Markdown(_fenced(point.text))
            self._run.log(values, step=point.step)

    def close(self) -> None:
        self._trackio.finish()


class MLflow:
    """A database beside the runs, or what MLFLOW_TRACKING_URI names."""

    def __init__(self, place: Place):
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        database = f"sqlite:///{place.beside / 'mlflow.db'}"
        os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
        uri = os.environ.get("MLFLOW_TRACKING_URI", database)
        client = optional_import("mlflow.tracking.client", "mlflow").MlflowClient
        self._entities = optional_import("mlflow.entities", "mlflow")
        self._born = place.born
        self._client = client(uri)
        experiment = self._client.get_experiment_by_name(PROJECT)
        artifacts = (place.beside / "mlflow").as_uri() if uri == database else None
        if experiment is not None:
            where = experiment.experiment_id
        else:
            where = self._client.create_experiment(PROJECT, artifacts)
        self._held: dict[str, set[int]] = {}
        self._id = self._sound_run(where, place)
        if self._id is None:
            tags = {"gptjax.id": place.id}
            self._id = self._client.create_run(where, run_name=place.name, tags=tags).info.run_id
            flat = _flat(place.config)
            params = [self._entities.Param(name, str(x)[:500]) for name, x in flat.items()]
            self._client.log_batch(self._id, params=params)
        else:
            self._client.update_run(self._id, status="RUNNING")

    def _sound_run(self, experiment: str, place: Place) -> str | None:
        """The run that an earlier session wrote, and what it holds; one with points that are not
        the run's any more is deleted."""
        for run in self._client.search_runs([experiment], f"tags.`gptjax.id` = '{place.id}'"):
            key = run.info.run_id
            history = {
                name: self._client.get_metric_history(key, name) for name in run.data.metrics
            }
            losses = history.get("train/loss", [])
            last = max((m.step for points in history.values() for m in points), default=0)
            sound = all(place.loss_at(m.step) == m.value for m in losses)
            if sound and last <= max((m.step for m in losses), default=0):
                self._held = {name: {m.step for m in points} for name, points in history.items()}
                return key
            self._client.delete_run(key)
        return None

    def write(self, points: Sequence[Point]) -> None:
        metrics = [
            self._entities.Metric(name, x, int(1e3 * (self._born + point.seconds)), point.step)
            for point in points
            for name, x in point.values.items()
            if point.step not in self._held.get(name, ())
        ]
        for i in range(0, len(metrics), METRICS_A_CALL):
            self._client.log_batch(self._id, metrics=metrics[i : i + METRICS_A_CALL])
        for point in points:
            if point.text is not None:
                name = f"samples/step-{point.step:09}.txt"
                self._client.log_text(self._id, point.text, name)

    def close(self) -> None:
        self._client.set_terminated(self._id)


def _fenced(text: str) -> str:
    """Text as a Markdown block that shows it as it is."""
    fence = "`" * 3
    while fence in text:
        fence += "`"
    return f"{fence}\n{text}\n{fence}"


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"model.n_layer": 4} of nested settings."""
    found: dict[str, Any] = {}
    for name, x in config.items():
        if isinstance(x, dict):
            found |= _flat(x, f"{prefix}{name}.")
        else:
            found[prefix + name] = x
    return found
