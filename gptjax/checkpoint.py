"""Checkpoints: the only room that knows orbax.

checkpoints/N/params, opt_state   orbax, after N updates; the folder gets its name when whole
              sha256.json         checksums of its files, for orbax loads a flipped byte gladly
"""

import errno
import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from gptjax.errors import UserError
from gptjax.runs import Record, read_file, write_atomically

MANIFEST = "sha256.json"

# A save that fails is one line of ours, not fifty tracebacks from orbax's threads.
logging.getLogger("absl").setLevel(logging.CRITICAL)


class Checkpoints:
    """The checkpoints of a run.

    Args:
        path: the folder that holds them; need not exist yet.
        keep: which of the steps on disk to keep once a newer one is whole.
    """

    def __init__(self, path: Path, keep: Callable[[list[int]], set[int]] = set):
        self.path = path
        self._keep = keep
        self._pending: tuple[int, Any] | None = None

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, oldest first."""
        if not self.path.is_dir():
            return []
        return sorted(int(p.name) for p in self.path.iterdir() if p.name.isdecimal())

    def save(self, step: int, params: Any, opt_state: Any, record: Record) -> None:
        """Start to save, in the background.

        Args:
            step: number of updates made.
            params: pytree of arrays.
            opt_state: pytree of arrays.
            record: the step's metrics, in case they are not logged before the next crash.

        Raises:
            UserError: this save, or the one before, found no room or permission.
        """
        self.finish_save()
        if step in self.steps():
            return  # it was resumed here
        # orbax refuses an item without leaves, such as the state of plain SGD; so the step is one.
        items = {"params": params, "training": {"step": step, "opt_state": opt_state}}
        with self._reporting(step):
            # Asked beforehand, for orbax takes seconds to find out.
            self.path.mkdir(exist_ok=True)
            with tempfile.TemporaryFile(dir=self.path):
                needed = sum(leaf.nbytes for leaf in jax.tree.leaves((params, opt_state)))
            if shutil.disk_usage(self.path).free < needed:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            response = ocp.save_checkpointables_async(
                str(self._folder(step)), items, custom_metadata={"record": {**record}}
            )
            self._pending = step, response

    def finish_save(self, wait: bool = True) -> None:
        """Seal the save under way with its checksums, then drop what need not be kept.

        Args:
            wait: for it to end; False: do nothing unless it has.

        Raises:
            UserError: the disk took no more; the checkpoints before it are untouched.
        """
        if self._pending is None:
            return
        step, response = self._pending
        with self._reporting(step):
            try:
                response.result(timeout=None if wait else 0)
            except TimeoutError:
                return
            except BaseException:
                self._pending = None
                raise
            self._pending = None
            folder = self._folder(step)
            write_atomically(folder / MANIFEST, json.dumps(_digests(folder), indent=0) + "\n")
        steps = self.steps()
        for old in set(steps) - self._keep(steps):
            shutil.rmtree(self._folder(old))

    @contextmanager
    def sealing(self) -> Iterator[None]:
        """Let no save be left unsealed, unless the program is being torn down."""
        try:
            yield
        except Exception:
            self.finish_save()
            raise
        self.finish_save()

    def set_aside(self, step: int) -> None:
        """Rename a damaged checkpoint, so that its step can be saved again and nothing is lost."""
        self._folder(step).rename(self._folder(step).with_suffix(f".damaged-{time.time_ns()}"))

    def sealed(self, step: int) -> bool:
        """Whether it has its checksums: a process killed right after a save leaves none."""
        return (self._folder(step) / MANIFEST).exists()

    def verify(self, step: int) -> None:
        """Compare a checkpoint's files with their checksums.

        Raises:
            UserError: naming the first file that is missing, changed or strange.
        """
        folder = self._folder(step)
        if not self.sealed(step):
            return  # whole, or it would not have its name; stopped before it was sealed
        wanted, found = read_file(folder / MANIFEST, json.loads), _digests(folder)
        for name in sorted(wanted.keys() | found.keys()):
            if found.get(name) != wanted.get(name):
                state = "is missing" if name not in found else "does not match its checksum"
                others = ", ".join(str(s) for s in self.steps() if s != step) or "none"
                raise UserError(
                    f"checkpoint {self.path / str(step)} is damaged: {name} {state}; "
                    f"other checkpoints: {others}"
                )

    def load(self, step: int, abstract: dict[str, Any]) -> dict[str, Any]:
        """Read parts of a checkpoint onto the devices that `abstract` names.

        Args:
            step: of the checkpoint.
            abstract: {"params": ..., "training": {"step": ..., "opt_state": ...}} or either; the
                leaves are `jax.ShapeDtypeStruct` with the sharding to load onto.

        Raises:
            UserError: damaged, or of other shapes than the model's.
        """
        self.verify(step)
        try:
            self._check_shapes(step, abstract)
            return ocp.load_checkpointables(str(self._folder(step)), abstract)
        except UserError:
            raise
        except Exception as error:  # orbax wraps what went wrong in kinds of its own
            raise UserError(
                f"checkpoint {self.path / str(step)} cannot be loaded: "
                f"{_reason(error.__cause__ or error)}"
            ) from error

    def _check_shapes(self, step: int, abstract: dict[str, Any]) -> None:
        """Compare shapes with what the checkpoint says of itself: orbax finds out while reading,
        and then leaves the other reads hanging."""
        found: Any = ocp.checkpointables_metadata(str(self._folder(step))).metadata
        for item, tree in abstract.items():
            wanted, stored = _shapes(tree), _shapes(found[item])
            for name in sorted(wanted.keys() | stored.keys()):
                if wanted.get(name) != stored.get(name):
                    raise UserError(
                        f"checkpoint {self.path / str(step)} cannot be loaded: {item}/{name} is "
                        f"{stored.get(name, 'not')} there and {wanted.get(name, 'not')} in this "
                        f"model and optimizer"
                    )

    def record(self, step: int) -> Record:
        """The step's own metrics, as saved with its checkpoint."""
        metadata: Any = ocp.checkpointables_metadata(str(self._folder(step))).custom_metadata
        return dict((metadata or {}).get("record", {"step": step, "seconds": 0.0}))

    def clean(self) -> None:
        """Remove what saves that were cut short have left."""
        for path in self.path.glob("*.orbax-checkpoint-tmp"):
            shutil.rmtree(path)

    def _folder(self, step: int) -> Path:
        return self.path.absolute() / str(step)

    @contextmanager
    def _reporting(self, step: int) -> Iterator[None]:
        """Turn whatever orbax makes of a failed save into one line."""
        try:
            yield
        except Exception as error:
            kept = [s for s in self.steps() if s != step]
            raise UserError(
                f"the checkpoint of step {step} could not be saved in {self.path} "
                f"({_reason(error)}); last one kept: {kept[-1] if kept else 'none'}; make room or "
                f"mend the permissions, then go on with --resume"
            ) from error


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    """The shape of each leaf, by its path."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): tuple(getattr(leaf, "shape", ()))
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _digests(folder: Path) -> dict[str, str]:
    """sha256 of every file below `folder`, by its path there."""
    digests = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != MANIFEST:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            digests[path.relative_to(folder).as_posix()] = digest
    return digests


def _reason(error: BaseException) -> str:
    """The first line of an error, without the noise behind it."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return (text.strip().splitlines() or [type(error).__name__])[0][:200]
