"""Checkpoints of a run. Only this module imports orbax.

checkpoints/N/params, training             arrays, by orbax, after N updates
              config.json, tokenizer.json  backup copies of the run's files
              metrics.json, text.json      fingerprints of metrics.jsonl and of the tokens
              sha256.json                  checksums, because orbax does not detect corruption

The folder gets its name N last, so a folder with a number is complete, sealed and on the disk.
"""

import errno
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from orbax.checkpoint import v1 as ocp

from gptjax import optim
from gptjax.config import MeshConfig
from gptjax.errors import UserError
from gptjax.parallel import distributed, sharding
from gptjax.runs import arrays, files
from gptjax.runs.files import Damaged
from gptjax.runs.records import Record, as_record
from gptjax.step import TrainState

T = TypeVar("T")


class Checkpoints:
    """The checkpoints of a run.

    Args:
        path: the folder that holds them; need not exist yet.
        keep: which of the steps on disk to keep once a newer one is whole.
    """

    def __init__(self, path: Path, keep: Callable[[list[int]], set[int]] = set):
        self.path = path
        self._keep = keep
        self._pending: tuple[int, Future[None]] | None = None
        self._worker = ThreadPoolExecutor(1)  # hashing must not hold up the steps

    def steps(self) -> list[int]:
        """Steps of the checkpoints, oldest first."""
        return files.numbered(self.path)

    def exist(self) -> bool:
        """Whether there are checkpoints, also damaged, set aside or incomplete ones."""
        return self.path.is_dir() and any(self.path.iterdir())

    def save(
        self, step: int, state: TrainState, record: Record, texts: dict[str, str] | None = None
    ) -> None:
        """Start to save, in the background.

        Args:
            step: number of updates made.
            state: after it.
            record: the step's metrics, in case they are not logged before the next crash.
            texts: small files to keep in the folder, by their names; None: none.

        Raises:
            UserError: this save, or the one before, found no space or permission.
        """
        self.finish_save()
        if distributed.first_does(lambda: step in self.steps()):
            return  # it was resumed here
        # orbax refuses an item without leaves, such as the state of plain SGD; so the step is one.
        params, rest = state.weights, arrays.training_part(state)
        items = {"params": params, "training": {"step": step, "opt_state": rest}}
        distributed.first_does(lambda: self._check_room(step, (params, rest)))
        with self._reporting(step), _quiet_orbax():
            response = ocp.save_checkpointables_async(
                str(self._unsealed(step)), items, custom_metadata={"record": {**record}}
            )
            self._pending = step, self._worker.submit(self._seal, step, response, texts or {})

    def _check_room(self, step: int, trees: Any) -> None:
        """Refuse early: orbax takes seconds to find out."""
        with self._reporting(step):
            self.path.mkdir(exist_ok=True)
            with tempfile.TemporaryFile(dir=self.path):
                needed = sum(leaf.nbytes for leaf in jax.tree.leaves(trees))
            if shutil.disk_usage(self.path).free < needed:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _seal(self, step: int, response: Any, texts: dict[str, str]) -> None:
        """Add the texts and the checksums once orbax has finished, then rename the folder."""
        with _quiet_orbax():
            response.result()
        if not distributed.is_first():
            return
        folder = self._unsealed(step)
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")
        files.seal(folder)
        folder.rename(self._folder(step))
        files.sync_folder(self.path)

    def finish_save(self, wait: bool = True) -> None:
        """Complete the pending save, then prune old checkpoints.

        Args:
            wait: for it to end; False: do nothing unless it has.

        Raises:
            UserError: the disk took no more; the checkpoints before it are untouched.
        """
        if self._pending is None or not (wait or self._pending[1].done()):
            return
        step, sealed = self._pending
        self._pending = None
        with self._reporting(step):
            try:
                sealed.result()
            except Exception:
                self.clean()  # frees space on a full disk
                raise
            if not distributed.is_first():
                return
            steps = self.steps()
            for old in set(steps) - self._keep(steps):
                files.remove(self._folder(old))  # one that is read now goes at a later save

    @contextmanager
    def sealing(self) -> Iterator[None]:
        """Complete the pending save on exit, unless the process is being torn down."""
        try:
            yield
        except Exception:
            self.finish_save()
            raise
        self.finish_save()

    def read(self, choose: Callable[[list[int]], int], use: Callable[[int], T]) -> T:
        """Use a checkpoint of a run that may be trained, and pruned, at the same time.

        Args:
            choose: picks one of the steps that there are; called again if that one has gone.
            use: reads the checkpoint of a step, which is not pruned meanwhile.

        Raises:
            UserError: of `choose` or `use`.
        """
        while True:
            step = choose(self.steps())
            with files.held(self._folder(step)) as there:
                try:
                    if there:
                        return use(step)
                except UserError:  # where the file system has no locks, it may have gone
                    if self._folder(step).is_dir():
                        raise

    @contextmanager
    def held(self) -> Iterator[list[int]]:
        """The steps of the checkpoints, none of which is pruned while this lasts."""
        with ExitStack() as stack:
            hold = lambda step: stack.enter_context(files.held(self._folder(step)))
            steps = [step for step in self.steps() if hold(step)]
            while not steps and self.steps():  # those listed have gone, and there are others
                steps = [step for step in self.steps() if hold(step)]
            yield steps

    def set_aside(self, step: int) -> None:
        """Rename a damaged checkpoint, so that its step can be saved again and nothing is lost.

        Raises:
            UserError: no permission.
        """
        with files.writing(self.path / str(step)):
            self._folder(step).rename(self._folder(step).with_suffix(f".damaged-{time.time_ns()}"))

    def verify(self, step: int) -> None:
        """Compare a checkpoint's files with their checksums.

        Raises:
            UserError: of a newer format, or not to be read; `Damaged`: naming the first file that
                is missing, changed or strange.
        """
        place = self.path / str(step)
        try:
            files.check_seal(place)
        except Damaged as error:
            raise Damaged(f"checkpoint {place} is damaged: {error}") from None
        except UserError as error:
            raise UserError(f"checkpoint {place} cannot be used: {error}") from None

    def newest_sound(self) -> int | None:
        """The newest checkpoint that matches its checksums; None: there is none.

        Raises:
            UserError: a newer one is of a newer format, or may not be read.
        """
        for step in reversed(self.steps()):
            try:
                self.verify(step)
            except Damaged:
                continue
            return step
        return None

    def restore(self, step: int, layout: TrainState) -> TrainState:
        """The train state of a checkpoint, whatever devices it was saved on.

        `layout` has `jax.ShapeDtypeStruct` leaves with the sharding to load onto.

        Raises:
            UserError: damaged, or of other shapes or another step.
        """
        weights = optim.without_lora(optim.unite(layout.params, layout.frozen))
        training = {"step": layout.step, "opt_state": arrays.training_part(layout)}
        items = self.load(step, {"params": weights, "training": training})
        state = arrays.train_state(items["params"], items["training"], layout)
        self._check_number(step, int(state.step))
        return state

    def load_params(self, step: int, model: nn.Module, mesh: Mesh | None = None) -> Any:
        """The parameters to sample with, of a checkpoint, onto a mesh (None: one device).

        Raises:
            UserError: damaged, or of other shapes than the model's.
        """
        tokens = jnp.zeros((1, 1), jnp.int32)
        shapes = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
        layout = sharding.layout(mesh or sharding.mesh_of(MeshConfig()), shapes)
        return self.load(step, {"params": layout})["params"]

    def load(self, step: int, abstract: dict[str, Any]) -> dict[str, Any]:
        """Read parts of a checkpoint onto the devices that `abstract` names.

        Args:
            step: of the checkpoint.
            abstract: {"params": ..., "training": {"step": ..., "opt_state": ...}} or either; the
                leaves are `jax.ShapeDtypeStruct` with the sharding to load onto.

        Raises:
            UserError: damaged, or of other shapes than the model's.
        """
        distributed.first_does(lambda: self._verify_to_load(step))
        try:
            self._check_number(step, self._saved_record(step).get("step", step))
            self._check_shapes(step, abstract)
            return ocp.load_checkpointables(str(self._folder(step)), abstract)
        except UserError:
            raise
        except Exception as error:  # orbax wraps errors in its own
            raise UserError(
                f"checkpoint {self.path / str(step)} cannot be loaded: "
                f"{_reason(error.__cause__ or error)}"
            ) from error

    def _verify_to_load(self, step: int) -> None:
        try:
            self.verify(step)
        except Damaged as error:
            sound = self.newest_sound()
            offer = "none is intact" if sound is None else f"the newest intact one is {sound}"
            raise Damaged(f"{error}; {offer}") from None

    def _check_shapes(self, step: int, abstract: dict[str, Any]) -> None:
        """Compare shapes with the checkpoint's metadata: orbax notices a difference only while
        reading, and leaves its other reads hanging."""
        found: Any = ocp.checkpointables_metadata(str(self._folder(step))).metadata
        for item, tree in abstract.items():
            wanted, stored = arrays.shapes(tree), arrays.shapes(found[item])
            for name in sorted(wanted.keys() | stored.keys()):
                if wanted.get(name) != stored.get(name):
                    raise UserError(
                        f"checkpoint {self.path / str(step)} cannot be loaded: {item}/{name} is "
                        f"{stored.get(name, 'not')} there and {wanted.get(name, 'not')} in this "
                        f"model and optimizer"
                    )

    def record(self, step: int) -> Record:
        """The step's own metrics, as saved with its checkpoint."""
        return self._saved_record(step) or {"step": step, "seconds": 0.0}

    def _saved_record(self, step: int) -> Record:
        """The record in a checkpoint, or an empty one."""
        metadata: Any = ocp.checkpointables_metadata(str(self._folder(step))).custom_metadata
        try:
            return as_record((metadata or {})["record"])
        except (KeyError, TypeError, ValueError):
            return {}

    def _check_number(self, step: int, held: int) -> None:
        """Compare a checkpoint's name with the step that it was saved after."""
        if held != step:
            raise Damaged(
                f"checkpoint {self.path / str(step)} holds the state after step {held}; give the "
                f"folder that number again"
            )

    def clean(self) -> None:
        """Remove leftovers of interrupted saves and removals."""
        for pattern in ("*.orbax-checkpoint-tmp", "*.unsealed", "*.dropped"):
            for path in self.path.glob(pattern):
                shutil.rmtree(path, ignore_errors=True)

    def _folder(self, step: int) -> Path:
        return self.path.absolute() / str(step)

    def _unsealed(self, step: int) -> Path:
        return self._folder(step).with_suffix(".unsealed")

    @contextmanager
    def _reporting(self, step: int) -> Iterator[None]:
        """Turn any exception of a failed save into one line."""
        try:
            yield
        except Exception as error:
            kept = [s for s in self.steps() if s != step]
            raise UserError(
                f"the checkpoint of step {step} could not be saved in {self.path} "
                f"({_reason(error)}); last one kept: {kept[-1] if kept else 'none'}; "
                f"free disk space or fix the permissions, then continue with --resume"
            ) from error


@contextmanager
def _quiet_orbax() -> Iterator[None]:
    """Silence absl's logger meanwhile: a failed save is one line, not fifty tracebacks."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def _reason(error: BaseException) -> str:
    """The first line of an error, without the noise behind it."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return (text.strip().splitlines() or [type(error).__name__])[0][:200]
