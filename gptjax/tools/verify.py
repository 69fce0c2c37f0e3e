"""Is a run sound? The library of `gptjax verify`; it reads the run's folder and writes nothing.

Config, tokenizer, metrics, the files of every checkpoint against their checksums, shapes, finite
numbers; and last a loss that was logged is measured again from the state that was stored.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

from gptjax.assembly import assemble, evaluate_random, evaluate_split, resident
from gptjax.config import MeshConfig, ModelConfig
from gptjax.errors import UserError
from gptjax.model import Model
from gptjax.parallel.switches import pinned
from gptjax.runs import folders, parts
from gptjax.runs.checkpoint import Checkpoints
from gptjax.runs.records import read as read_records
from gptjax.runs.run import Run, read_config
from gptjax.text.dataset import fingerprint, named, open_dataset

TOLERANCE = 1e-4  # nats: another machine or device count rounds otherwise


@dataclass(frozen=True)
class Check:
    """One check and its result; `sound` is None where it could not be decided."""

    name: str
    sound: bool | None
    found: str


@pinned()
def verify(
    name: str | None = None,
    *,
    model: Model | None = None,
    optimizer: optax.GradientTransformation | None = None,
) -> list[Check]:
    """All checks of a run, as far as each can go.

    Args:
        name: of the run; None: the newest.
        model, optimizer: your own, if the run was trained with such: what needs them is checked
            only if they are given.

    Raises:
        UserError: there is no such run.
    """
    directory = folders.find(name)
    checks: list[Check] = []

    def check(name: str, look: Callable[[], str]) -> bool:
        try:
            checks.append(Check(name, True, look()))
        except UserError as error:
            checks.append(Check(name, False, str(error)))
        return bool(checks[-1].sound)

    if not (
        check("config", lambda: _described(read_config(directory).model))
        and check("tokenizer", lambda: f"{Run(directory).tokenizer.vocab_size} tokens")
    ):
        return checks
    run = Run(directory)
    check("metrics", lambda: _metrics(run))
    checkpoints = Checkpoints(run.checkpoints_path)
    load = _loader(run, checkpoints, model, optimizer, checks)
    with checkpoints.held() as steps:
        sound = []
        for step in steps:
            if check(f"checkpoint {step}", lambda step=step: _checkpoint(checkpoints, step, load)):
                sound.append(step)
            elif step not in checkpoints.steps():
                checks.pop()  # a training process removed it, where files cannot be held
        if not steps:
            checks.append(Check("checkpoints", False, "there is none"))
        for step in reversed(sound):
            if logged := _logged_loss(run, step):
                checks.append(_loss(run, checkpoints, step, model, *logged))
                break
        else:
            checks.append(Check("loss", None, "no loss was logged at a checkpoint that is sound"))
    return checks


def _loader(
    run: Run,
    checkpoints: Checkpoints,
    model: Model | None,
    optimizer: optax.GradientTransformation | None,
    checks: list[Check],
) -> Callable[[int], Any]:
    """The function that reads as much of a checkpoint as can be read: with parts missing that were
    the caller's own, only its parameters, or only its files."""
    try:
        made = parts.run_model(run, model)
    except UserError as error:
        checks.append(Check("model", None, f"its arrays are not checked: {error}"))
        return lambda step: None
    if "optimizer" in run.parts and optimizer is None:
        checks.append(Check("optimizer", None, "not gptjax's; its state is not checked"))
        return lambda step: checkpoints.load_params(step, made)
    # On as many devices as are here: where a run was trained decides no number.
    here = replace(run.config, mesh=MeshConfig())
    setup = assemble(here, run.tokenizer.vocab_size, model=made, optimizer=optimizer)
    return lambda step: checkpoints.restore(step, setup.layout)


def _described(model: ModelConfig) -> str:
    return f"{model.n_layer} layers, width {model.n_embd}"


def _metrics(run: Run) -> str:
    """Each step once, in order, from 0 on; every line a record."""
    records, damage = read_records(run.metrics_path)
    if damage:
        raise UserError(damage)
    if not _ends_with_a_line(run.metrics_path):
        time.sleep(1.0)  # a training process may be at it
        if not _ends_with_a_line(run.metrics_path):
            raise UserError(f"{run.metrics_path}: the last line was cut short; --resume fixes it")
    if run.metrics_have_changed():
        raise UserError(f"{run.metrics_path} does not match its checksum")
    skipped = sum("skipped" in record for record in records)
    return f"steps 0 to {len(records) - 1}" + (f", {skipped} skipped" if skipped else "")


def _ends_with_a_line(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read().endswith(b"\n")


def _checkpoint(checkpoints: Checkpoints, step: int, load: Callable[[int], Any]) -> str:
    """Files, shapes, and finite numbers of one checkpoint."""
    checkpoints.verify(step)
    state = load(step)
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        if jnp.issubdtype(leaf.dtype, jnp.floating) and not bool(jnp.isfinite(leaf).all()):
            where = jax.tree_util.keystr(path, simple=True, separator="/")
            raise UserError(f"checkpoint {checkpoints.path / str(step)}: {where} is not finite")
    return f"{len(jax.tree.leaves(state))} arrays"


def _logged_loss(run: Run, step: int) -> tuple[str, float] | None:
    """A validation loss that was logged after this step, by its name."""
    for record in run.metrics():
        if record["step"] == step:
            for name in ("val_loss", "val_sampled_loss"):
                if isinstance(record.get(name), float):
                    return name, record[name]
    return None


def _loss(
    run: Run, checkpoints: Checkpoints, step: int, model: Model | None, name: str, logged: float
) -> Check:
    """Measure that loss again."""
    if "batches" in run.parts:
        return Check("loss", None, "not measured again: the batches are not gptjax's")
    try:
        dataset = open_dataset(run.config.data, run.config.model.block_size, run.tokenizer)
        run.use_text(named(run.config.data), fingerprint(dataset))
        made = parts.run_model(run, model)
    except UserError as error:
        return Check("loss", None, f"not measured again: {error}")
    here = replace(run.config, mesh=MeshConfig())
    setup = assemble(here, run.tokenizer.vocab_size, model=made)
    params = checkpoints.load_params(step, made, setup.mesh)
    tokens = resident(setup, dataset.val)
    if name == "val_loss":
        again = evaluate_split(setup, params, tokens)["loss"]
    else:
        n = run.config.eval_batches or 1
        again = evaluate_random(setup, params, tokens, step, n)["loss"]
    found = f"{name} of step {step}: logged {logged:.6f}, again {again:.6f}"
    return Check("loss", abs(again - logged) < TOLERANCE, found)
