"""A run's folder: the unit of exchange between training, sampling and you.

    runs/NAME/config.json     what was asked for
              tokenizer.json  how text becomes ids
              metrics.jsonl   one JSON object for each step, in order
              checkpoints/    see checkpoint.py
              bad/            states and batches of steps that were skipped, if any

No pickle, and nothing outside the folder.
"""

import json
import math
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import filelock

from gptjax import config_json
from gptjax import tokenizer as tokenizer_module
from gptjax.config import Config, differences
from gptjax.errors import UserError
from gptjax.tokenizer import Tokenizer

RUNS = Path("runs")
LOCK = ".lock"
MAX_JSON = 64 * 2**20  # bytes of a config or tokenizer worth reading

Record = dict[str, Any]  # "step": int, and floats by name


def find(name: str | None, like: str | None = None) -> Path:
    """The folder of a run that exists.

    Args:
        name: a name in runs/, or a path; None: the newest run.
        like: with no name, only runs named after this preset.

    Raises:
        UserError: no such run.
    """
    if name is not None:
        _check_name(name)
        directory = next((p for p in (RUNS / name, Path(name)) if p.exists()), RUNS / name)
        if not (directory / "config.json").is_file():
            raise UserError(
                f"{directory} is not a run's folder (it has no config.json); runs here: "
                f"{', '.join(_names()) or 'none'}"
            )
        return directory
    pattern = rf"{re.escape(_base_name(like))}(-\d+)?" if like else r".*"
    found = [RUNS / n for n in _names() if re.fullmatch(pattern, n)]
    if not found:
        kind = f"run of preset {like}" if like else "run"
        raise UserError(f"there is no {kind} in {RUNS}/; make one with python train.py")
    return max(found, key=lambda d: max(p.stat().st_mtime_ns for p in d.iterdir()))


def new_directory(name: str | None, preset: str) -> Path:
    """A folder for a new run, not yet made: `name`, or the preset's with the first free number.

    Raises:
        UserError: the folder holds something already.
    """
    if name is None:
        base = _base_name(preset)
        directory, number = RUNS / base, 2
        while directory.exists():
            directory, number = RUNS / f"{base}-{number}", number + 1
        return directory
    _check_name(name)
    directory = Path(name) if os.sep in name else RUNS / name
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise _taken(directory)
    return directory


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Let no other process train this run meanwhile; a process that dies leaves no lock behind.

    Raises:
        UserError: another process is training it, or the folder cannot be written.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(directory / LOCK, timeout=0)
        lock.acquire()
    except filelock.Timeout:
        raise UserError(
            f"another process is training {directory}; wait until it ends, or stop it"
        ) from None
    except OSError as error:
        raise _unwritable(directory, error) from None
    with lock:
        yield


def _taken(directory: Path) -> UserError:
    return UserError(
        f"{directory} holds another run already; go on with it (--run {run_name(directory)} "
        f"--resume) or give another name"
    )


def _unwritable(directory: Path, error: OSError) -> UserError:
    return UserError(
        f"cannot write the run's folder {directory}: {error.strerror}; give another with "
        f"--run, or mend its permissions"
    )


def run_name(directory: Path) -> str:
    """What to type for `--run`."""
    return directory.name if directory.parent == RUNS else str(directory)


def read_config(directory: Path) -> Config:
    """The run's config.

    Raises:
        UserError: missing or damaged.
    """
    return read_file(directory / "config.json", config_json.from_json)


class Run:
    """An open run folder: `config`, `tokenizer`, and the metrics.

    Args:
        directory: that holds config.json and tokenizer.json.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        self.config = read_config(directory)
        self.tokenizer: Tokenizer = read_file(
            directory / "tokenizer.json", tokenizer_module.from_json
        )

    @classmethod
    def create(cls, directory: Path, config: Config, tokenizer: Tokenizer) -> "Run":
        """Make the folder of a new run.

        Raises:
            UserError: no permission, a disk that takes no more, or a run that is there already.
        """
        if (directory / "config.json").exists():
            raise _taken(directory)
        try:
            directory.mkdir(parents=True, exist_ok=True)
            write_atomically(directory / "tokenizer.json", tokenizer.to_json())
            write_atomically(directory / "config.json", config_json.to_json(config))
        except OSError as error:
            raise _unwritable(directory, error) from None
        return cls(directory)

    def change_config(self, config: Config) -> dict[str, tuple[Any, Any]]:
        """Go on with other settings.

        Returns:
            What changed: {"steps": (old, new)}.

        Raises:
            UserError: the model or the data would be others.
        """
        changed = differences(self.config, config)
        for name, (old, new) in changed.items():
            if name.startswith(("model.", "data.")) and name not in ("model.dtype", "model.remat"):
                raise UserError(
                    f"cannot resume {self.directory} with {name}={new}: it was trained with "
                    f"{name}={old}; start a new run for that"
                )
        if changed:
            write_atomically(self.directory / "config.json", config_json.to_json(config))
        self.config = config
        return changed

    @property
    def checkpoints_path(self) -> Path:
        return self.directory / "checkpoints"

    @property
    def bad_path(self) -> Path:
        """States and batches of steps that were skipped."""
        return self.directory / "bad"

    @property
    def metrics_path(self) -> Path:
        return self.directory / "metrics.jsonl"

    def log(self, records: list[Record]) -> None:
        """Append one line for each record; every record has its "step"."""
        with self.metrics_path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)

    def metrics(self) -> list[Record]:
        """The records, in order, up to the first line that is not one (a write cut short)."""
        records: list[Record] = []
        if self.metrics_path.exists():
            with self.metrics_path.open(encoding="utf-8", errors="replace") as file:
                for line in file:
                    try:
                        record = json.loads(line)
                    except (ValueError, RecursionError):
                        break
                    if not isinstance(record, dict) or type(record.get("step")) is not int:
                        break
                    records.append(record)
        return records

    def rewind_metrics(self, step: int) -> list[Record]:
        """Drop the records after `step`, which a resumed run will write again; return the rest."""
        kept = [record for record in self.metrics() if record["step"] <= step]
        lines = "".join(json.dumps(record) + "\n" for record in kept)
        write_atomically(self.metrics_path, lines)
        return kept

    def best_step(self, steps: list[int]) -> int | None:
        """Which of `steps` has the lowest validation loss; None if none was evaluated."""
        key = "val_loss" if self.config.eval_batches is None else "val_sampled_loss"
        losses = [
            (record[key], record["step"])
            for record in self.metrics()
            if record["step"] in steps and math.isfinite(record.get(key, math.nan))
        ]
        return min(losses)[1] if losses else None

    def keep(self, steps: list[int]) -> set[int]:
        """The checkpoints worth keeping: the newest `keep_last`, and the best."""
        best = self.best_step(steps)
        return {*steps[-self.config.keep_last :]} | ({best} if best is not None else set())

    def choose(self, which: str, steps: list[int]) -> int:
        """The checkpoint that "best", "last" or a number names.

        Raises:
            UserError: no checkpoint yet, or not that one.
        """
        if not steps:
            raise UserError(
                f"{self.directory} has no checkpoint yet; the first is saved after step "
                f"{min(self.config.save_every, self.config.steps)}"
            )
        if which == "last":
            return steps[-1]
        if which == "best":
            best = self.best_step(steps)
            return steps[-1] if best is None else best
        if which.isdecimal() and int(which) in steps:
            return int(which)
        raise UserError(
            f"{self.directory} has no checkpoint {which!r}; give best, last, or one of "
            f"{', '.join(map(str, steps))}"
        )


def write_atomically(path: Path, text: str) -> None:
    """Write so that, whatever happens, the file is the old one or the new one, whole."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def read_file(path: Path, parse: Callable[[str], Any]) -> Any:
    """What `parse` makes of a small text file of the run.

    Raises:
        UserError: it cannot be read, or not parsed.
    """
    try:
        if path.stat().st_size > MAX_JSON:
            raise UserError(f"it has over {MAX_JSON} bytes")
        return parse(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # a UserError is a ValueError
        raise UserError(f"{path} is damaged: {error}") from None


def _check_name(name: str) -> None:
    if not name or "\0" in name or any(len(os.fsencode(p)) > 255 for p in Path(name).parts):
        raise UserError(f"--run {name[:40]!r} cannot name a folder; give 1 to 255 characters")


def _base_name(preset: str) -> str:
    return preset.replace("/", "-")


def _names() -> list[str]:
    return sorted(p.parent.name for p in RUNS.glob("*/config.json"))
