"""A run's folder: the unit of exchange between training, sampling and you.

    runs/NAME/config.json     what was asked for
              tokenizer.json  how text becomes ids
              metrics.jsonl   one JSON object for each step, in order
              checkpoints/N/  orbax: params and opt_state after N updates, and their sha256

No pickle, and nothing outside the folder. orbax is imported only where arrays are read or written.
"""

import hashlib
import json
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gptjax import config as config_module
from gptjax import tokenizer as tokenizer_module
from gptjax.config import Config
from gptjax.errors import UserError
from gptjax.tokenizer import CharTokenizer

RUNS = Path("runs")
MANIFEST = "sha256.json"
MAX_JSON = 64 * 2**20  # bytes of a config or tokenizer worth reading

Record = dict[str, float | int]


def find(name: str | None, like: str | None = None) -> Path:
    """The folder of a run that exists.

    Args:
        name: a name in runs/, or a path; None: the newest run.
        like: with no name, only runs named after this preset.

    Raises:
        UserError: no such run.
    """
    if name is not None:
        directory = next((p for p in (RUNS / name, Path(name)) if p.exists()), RUNS / name)
        if not (directory / "config.json").is_file():
            raise UserError(
                f"{directory} is not a run's folder (no config.json there); "
                f"runs here: {', '.join(_names()) or 'none'}"
            )
        return directory
    pattern = rf"{re.escape(like)}(-\d+)?" if like else r".*"
    found = [RUNS / n for n in _names() if re.fullmatch(pattern, n)]
    if not found:
        wanted = f"run of preset {like}" if like else "run"
        raise UserError(
            f"there is no {wanted} in {RUNS}/; make one with python train.py, or name one"
        )
    return max(found, key=lambda d: max(p.stat().st_mtime_ns for p in d.iterdir()))


def new_directory(name: str | None, preset: str) -> Path:
    """A folder for a new run, not yet made: `name`, or the preset's with the first free number.

    Raises:
        UserError: the folder holds something already.
    """
    if name is None:
        taken, number = RUNS / preset, 2
        while taken.exists():
            taken, number = RUNS / f"{preset}-{number}", number + 1
        return taken
    directory = Path(name) if os.sep in name else RUNS / name
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UserError(
            f"{directory} holds another run already; go on with it (--run {name} --resume) or "
            f"give another name"
        )
    return directory


def read_config(directory: Path) -> Config:
    """The run's config.

    Raises:
        UserError: missing or damaged.
    """
    return _read(directory / "config.json", config_module.from_json)


class Run:
    """An open run folder.

    Args:
        directory: that holds config.json and tokenizer.json.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        self.config = read_config(directory)
        self.tokenizer: CharTokenizer = _read(
            directory / "tokenizer.json", tokenizer_module.from_json
        )
        self._checkpointer: Any = None
        self._pending: tuple[int, Any] | None = None

    @classmethod
    def create(cls, directory: Path, config: Config, tokenizer: CharTokenizer) -> "Run":
        """Make the folder of a new run.

        Raises:
            UserError: no permission, or a disk that takes no more.
        """
        try:
            directory.mkdir(parents=True, exist_ok=True)
            write_atomically(directory / "tokenizer.json", tokenizer.to_json())
            write_atomically(directory / "config.json", config_module.to_json(config))
        except OSError as error:
            raise UserError(
                f"cannot write the run's folder {directory}: {error.strerror}; choose another "
                f"with --run, or mend its permissions"
            ) from None
        return cls(directory)

    def change_config(self, config: Config) -> None:
        """Go on with other settings.

        Raises:
            UserError: the model or the data would be others.
        """
        changed = config_module.differences(self.config, config)
        for name, (old, new) in changed.items():
            if name.startswith(("model.", "data.")) and name not in ("model.dtype", "model.remat"):
                raise UserError(
                    f"cannot resume {self.directory} with {name}={new}: it was trained with "
                    f"{name}={old}; start a new run for that"
                )
        if changed:
            write_atomically(self.directory / "config.json", config_module.to_json(config))
        self.config = config

    # Metrics

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
                    except ValueError:
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

    # Checkpoints

    @property
    def checkpoints_path(self) -> Path:
        return self.directory / "checkpoints"

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, oldest first."""
        if not self.checkpoints_path.is_dir():
            return []
        return sorted(int(p.name) for p in self.checkpoints_path.iterdir() if p.name.isdecimal())

    def best_step(self) -> int | None:
        """The step of the checkpoint with the lowest validation loss, or None if none has one."""
        key = "val_loss" if self.config.eval_batches is None else "val_sampled_loss"
        have = set(self.steps())
        losses = [
            (record[key], record["step"])
            for record in self.metrics()
            if record["step"] in have and math.isfinite(record.get(key, math.nan))
        ]
        return int(min(losses)[1]) if losses else None

    def choose(self, which: str) -> int:
        """The step that "best", "last" or a number names.

        Raises:
            UserError: no checkpoint yet, or not that one.
        """
        steps = self.steps()
        if not steps:
            raise UserError(
                f"{self.directory} has no checkpoint yet; the first is saved at step "
                f"{min(self.config.save_every, self.config.steps)}"
            )
        if which == "last":
            return steps[-1]
        if which == "best":
            best = self.best_step()
            return steps[-1] if best is None else best
        if which.isdecimal() and int(which) in steps:
            return int(which)
        raise UserError(
            f"{self.directory} has no checkpoint {which!r}; give best, last, or one of "
            f"{', '.join(map(str, steps))}"
        )

    def save(self, step: int, params: Any, opt_state: Any, record: Record) -> None:
        """Start to save, in the background; the folder appears under its name when it is whole.

        Args:
            step: number of updates made.
            params: pytree of arrays.
            opt_state: pytree of arrays.
            record: the step's metrics, for a resume before they are logged.

        Raises:
            UserError: this save, or the one before, found no room or permission.
        """
        self.finish_save()
        if step in self.steps():
            return  # resumed exactly here
        items = {"params": params, "opt_state": opt_state}
        metadata = {"record": record}
        self._guard(
            step,
            lambda: self._open().save_checkpointables_async(step, items, custom_metadata=metadata),
        )

    def finish_save(self, wait: bool = True) -> int | None:
        """Seal the save under way with its checksums, then drop what need not be kept.

        Args:
            wait: for it to end; False: do nothing unless it has.

        Returns:
            The step that was sealed, or None.

        Raises:
            UserError: the disk took no more; the checkpoints before it are untouched.
        """
        if self._pending is None:
            return None
        step, response = self._pending
        if not wait and self._open().is_saving_in_progress():
            return None
        self._pending = None
        self._guard(step, response.result, pending=False)
        folder = self.checkpoints_path / str(step)
        write_atomically(folder / MANIFEST, json.dumps(_digests(folder), indent=0) + "\n")
        self._prune()
        return step

    def _guard(self, step: int, action: Callable[[], Any], pending: bool = True) -> None:
        try:
            result = action()
        except Exception as error:  # orbax passes on OSError, ValueError and its own kinds
            last = self.steps()
            kept = f"step {last[-1]} is kept" if last else "there is none before it"
            reason = str(error).strip().splitlines()[0][:300]
            raise UserError(
                f"the checkpoint of step {step} could not be saved ({reason}); {kept}: make room "
                f"or mend permissions, then go on with --resume"
            ) from error
        if pending:
            self._pending = step, result

    def _prune(self) -> None:
        """Keep the newest keep_last and the best; called when the newest is known to be whole."""
        steps = self.steps()
        keep = {*steps[-self.config.keep_last :], self.best_step()}
        for step in steps:
            if step not in keep:
                self._open().delete(step)

    def verify(self, step: int) -> None:
        """Compare a checkpoint's files with their checksums.

        Raises:
            UserError: naming the first file that is missing, changed or strange.
        """
        folder = self.checkpoints_path / str(step)
        if not (folder / MANIFEST).exists():
            return  # complete (orbax renames a folder when it is), but stopped before sealing
        wanted = _read(folder / MANIFEST, json.loads)
        found = _digests(folder)
        for name in sorted(wanted.keys() | found.keys()):
            if found.get(name) != wanted.get(name):
                state = "is missing" if name not in found else "does not match its checksum"
                sound = [s for s in self.steps() if s != step]
                raise UserError(
                    f"checkpoint {step} of {self.directory} is damaged: {folder / name} {state}; "
                    f"other checkpoints: {', '.join(map(str, sound)) or 'none'}"
                )

    def load(self, step: int, abstract: dict[str, Any]) -> dict[str, Any]:
        """Read parts of a checkpoint onto the devices that `abstract` names.

        Args:
            step: of the checkpoint.
            abstract: {"params": ..., "opt_state": ...} or either; leaves are
                `jax.ShapeDtypeStruct` with the sharding to load onto.

        Raises:
            UserError: damaged, or of other shapes than the model's.
        """
        self.verify(step)
        try:
            return self._open().load_checkpointables(step, abstract)
        except Exception as error:  # orbax wraps what went wrong in kinds of its own
            reason = str(error.__cause__ or error).strip().splitlines()[0][:300]
            raise UserError(
                f"checkpoint {step} of {self.directory} cannot be loaded: {reason}"
            ) from error

    def record_of(self, step: int) -> Record:
        """The step's own metrics, as saved with its checkpoint."""
        metadata = self._open().checkpointables_metadata(step).custom_metadata
        return dict((metadata or {}).get("record", {"step": step}))

    def close(self) -> None:
        """Wait for the save under way and seal it."""
        self.finish_save()
        if self._checkpointer is not None:
            self._checkpointer.close()
            self._checkpointer = None

    def _open(self) -> Any:
        if self._checkpointer is None:
            from orbax.checkpoint import v1 as ocp

            self._checkpointer = ocp.training.Checkpointer(
                self.checkpoints_path.absolute(),
                save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
                cleanup_tmp_directories=True,
            )
        return self._checkpointer


def write_atomically(path: Path, text: str) -> None:
    """Write so that, whatever happens, the file is the old one or the new one, whole."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _names() -> list[str]:
    return sorted(p.parent.name for p in RUNS.glob("*/config.json"))


def _digests(folder: Path) -> dict[str, str]:
    """sha256 of every file below `folder`, by its path there."""
    digests = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != MANIFEST:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            digests[path.relative_to(folder).as_posix()] = digest
    return digests


def _read(path: Path, parse: Callable[[str], Any]) -> Any:
    try:
        if path.stat().st_size > MAX_JSON:
            raise UserError(f"{path} is too large to be what it should be")
        return parse(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # UserError, bad JSON, bad UTF-8
        raise UserError(f"{path} is damaged: {error}") from None
