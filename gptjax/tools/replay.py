"""One step of a run made again, to look at: `python train.py --run NAME --replay STEP`.

A step follows from the state before it and from (seed, step), so any step can be made again from
the newest checkpoint before it. The states before steps that were skipped are kept for this:

    runs/NAME/bad/N             the state after N updates, as in checkpoints/
                  step-N+1.json the batch that the next one was to be made of
"""

import json
import math
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import optax

from gptjax.console import Report
from gptjax.errors import UserError
from gptjax.feed import Feed
from gptjax.interop import pretrained
from gptjax.parallel import distributed
from gptjax.programs import Programs
from gptjax.runs.checkpoint import Checkpoints
from gptjax.runs.files import write_atomically
from gptjax.runs.run import Run
from gptjax.step import TrainState
from gptjax.text.dataset import fingerprint, open_dataset

KEPT = 3  # newest states of skipped steps
LEAVES = 8  # of the gradient, shown
ROWS = 4  # of the batch, shown


def keep(run: Run, programs: Programs, state: TrainState, step: int, feed: Feed) -> None:
    """Keep what is needed to make a step again: the state before it, and its batch.

    Raises:
        UserError: no room or no permission.
    """
    batch = feed.batch(step - 1)
    kept = Checkpoints(run.bad_path, lambda steps: {*steps[-KEPT:]})
    distributed.first_does(kept.clean)
    kept.save(step - 1, *programs.stored(state), {"step": step - 1})
    kept.finish_save()
    rows = [run.tokenizer.decode(row) for row in batch]
    values = {"step": step, "tokens": batch.tolist(), "text": rows}
    path, text = run.bad_path / f"step-{step}.json", json.dumps(values)
    distributed.first_does(lambda: write_atomically(path, text))


def replay(
    directory: Path,
    step: int,
    *,
    model: nn.Module | None = None,
    optimizer: optax.GradientTransformation | None = None,
    report: Report | None = None,
) -> dict[str, float]:
    """Make a step again, and show its loss, its gradient and its batch; nothing is written.

    Args:
        directory: of the run.
        step: 1 is the first.
        model: your own, if the run was trained with one; None: the config's.
        optimizer: likewise.
        report: where to; None: standard output.

    Returns:
        Its "loss" and "grad_norm", bit for bit those of the run on as many devices of the kind.

    Raises:
        UserError: no such step, or no sound checkpoint where there are some.
    """
    report = report or Report()
    run = Run(directory)
    config = run.config
    if not 1 <= step <= config.steps:
        raise UserError(f"--replay {step} is not a step of this run; give 1 to {config.steps}")
    dataset = open_dataset(config.data, config.model.block_size, run.tokenizer)
    run.use_text(config.data.text, fingerprint(dataset))
    programs = Programs(config, dataset.tokenizer.vocab_size, model, optimizer)
    feed, seed_key = programs.training(dataset), programs.seed_key
    logged = {record["step"]: record for record in run.metrics()}
    checkpoints, first = _newest_before(run, step)
    if checkpoints:
        state = programs.restore(checkpoints, first)
    else:
        state = programs.start(pretrained.initial(config))
    report.say(f"step {step} again, from the state after step {first}")
    while first < step - 1:
        n = min(config.steps_per_dispatch, step - 1 - first)
        state, _ = programs.train_steps(state, feed(first, then=first + n), seed_key, n)
        if int(state.step) < first + n:  # it stopped before a step that was skipped
            state = programs.skip(state)
        first = int(state.step)

    batch = feed.batch(step - 1)
    _, gradient = programs.gradient(state.params, programs.put(batch), seed_key, step - 1)
    _, out = programs.train_steps(state, feed(step - 1), seed_key, 1)
    values = {name: float(x[0]) for name, x in out._asdict().items()}
    record = logged.get(step, {})
    rows = {
        name: f"{values[name]:.9g}, logged: {record.get(name, record.get('skipped', 'nothing'))}"
        for name in ("loss", "grad_norm")
    }
    report.summary(f"step {step}", rows)
    report.summary("the gradient's largest norms", _norms(gradient))
    shown = {f"row {i}": repr(run.tokenizer.decode(row)) for i, row in enumerate(batch[:ROWS])}
    report.summary(f"the batch, {min(ROWS, len(batch))} of {len(batch)} rows", shown)
    return values


def _newest_before(run: Run, step: int) -> tuple[Checkpoints | None, int]:
    """Where the newest sound state before a step lies, and how many updates it has had."""
    found = [
        (n, kept)
        for kept in (Checkpoints(run.checkpoints_path), Checkpoints(run.bad_path))
        for n in kept.steps()
        if n < step
    ]
    for n, kept in sorted(found, key=lambda pair: pair[0], reverse=True):
        try:
            kept.verify(n)
            return kept, n
        except UserError:
            continue  # an older one will do; verify and --resume tell about this one
    return None, 0


def _norms(gradient: Any) -> dict[str, str]:
    """The leaves with the largest norms; what is not finite comes first."""
    norms = {
        jax.tree_util.keystr(path, simple=True, separator="/"): float(np.linalg.norm(leaf))
        for path, leaf in jax.tree_util.tree_leaves_with_path(gradient)
    }
    order = sorted(norms, key=lambda name: (math.isfinite(norms[name]), -norms[name]))
    return {name: f"{norms[name]:.4g}" for name in order[:LEAVES]}
