"""Make one step of a run again, to look at it: `python train.py --run NAME --replay STEP`.

A step follows from the state before it and from (seed, step), so any step can be recomputed from
the newest checkpoint before it, or from the state kept of a skipped one (`runs/bad_steps.py`).
"""

import math
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from gptjax import optim
from gptjax.assembly import Setup, assemble, make_source, prefetched, streams
from gptjax.batches import DROPOUT, Batch, Batches, Prefetched, random_key
from gptjax.batches import fingerprint as fingerprint_of_batches
from gptjax.console import Report
from gptjax.errors import UserError
from gptjax.interop import pretrained
from gptjax.loss import LossFn
from gptjax.model import Model
from gptjax.parallel import sharding
from gptjax.parallel.switches import pinned
from gptjax.runs import parts
from gptjax.runs.bad_steps import token_rows
from gptjax.runs.checkpoint import Checkpoints
from gptjax.runs.run import Run
from gptjax.step import NORMS, TrainState
from gptjax.text.dataset import fingerprint, named, open_dataset

LEAVES = 8  # of the gradient, shown
ROWS = 4  # of the batch, shown


@pinned()
def replay(
    directory: Path,
    step: int,
    *,
    model: Model | None = None,
    optimizer: optax.GradientTransformation | None = None,
    loss_fn: LossFn | None = None,
    batches: Batches | None = None,
    report: Report | None = None,
) -> dict[str, float]:
    """Make a step again, and show its loss, its gradient and its batch; nothing is written.

    Args:
        directory: of the run.
        step: 1 is the first.
        model, optimizer, loss_fn, batches: your own, if the run was trained with such.
        report: where to; None: standard output.

    Returns:
        Its metrics, bit for bit those of the run on the same number and type of devices.

    Raises:
        UserError: no such step, other parts than the run's, or no sound checkpoint where there are
            some.
    """
    report = report or Report()
    run = Run(directory)
    config, vocab_size = run.config, run.tokenizer.vocab_size
    if not 1 <= step <= config.steps:
        raise UserError(f"--replay {step} is not a step of this run; give 1 to {config.steps}")
    setup_of = lambda batch_at: assemble(
        config,
        vocab_size,
        model=model or parts.known_model(run),
        optimizer=optimizer,
        loss_fn=loss_fn,
        batch_at=batch_at,
    )
    parts.check(run, parts.describe(batches=batches), ("batches",))
    if batches is None:
        dataset = open_dataset(config.data, config.model.block_size, run.tokenizer)
        run.use_text(named(config.data), fingerprint(dataset))
        setup = setup_of(Prefetched.at if streams(config, dataset) else None)
        source = make_source(config, dataset, setup.mesh, setup.seed_key())
    else:
        run.use_text("of batches=", fingerprint_of_batches(batches))
        setup = setup_of(Prefetched.at)
        source = prefetched(config, batches, setup.mesh)
    given = parts.describe(model=setup.model, optimizer=optimizer, loss_fn=loss_fn, batches=batches)
    parts.check(run, given)
    logged = {record["step"]: record for record in run.metrics()}
    state, first = _state_before(run, setup, step)
    report.say(f"step {step} again, from the state after step {first}")
    key = setup.seed_key()
    while first < step - 1:
        n = min(config.steps_per_dispatch, step - 1 - first)
        state, _ = setup.steps(state, source.data(first, then=first + n), key, first, n)
        if int(state.step) < first + n:  # it stopped before a step that was skipped
            skipped = np.int32(int(state.step) + 1)
            state = state._replace(step=sharding.put(setup.mesh, skipped))
        first = int(state.step)

    batch = source.batch(step - 1)
    gradient = _gradient(setup, state, batch, step)
    _, out = setup.steps(state, source.data(step - 1), key, step - 1, 1)
    values = {name: float(x[0]) for name, x in out.items()}
    record = logged.get(step, {})
    rows = {
        name: f"{values[name]:.9g}, logged: {record.get(name, record.get('skipped', 'nothing'))}"
        for name in values
        if name != "lr" and not name.startswith(NORMS)
    }
    report.summary(f"step {step}", rows)
    report.summary("the gradient's largest norms", _norms(gradient))
    if isinstance(batch, Batch):
        tokens = token_rows(batch)
        shown = {f"row {i}": repr(run.tokenizer.decode(row)) for i, row in enumerate(tokens[:ROWS])}
        report.summary(f"the batch, {min(ROWS, len(tokens))} of {len(tokens)} rows", shown)
    return values


def _gradient(setup: Setup, state: TrainState, batch: Any, step: int) -> Any:
    """The gradient with respect to the trained parameters, of the batch as a whole."""

    @jax.jit
    def gradient(state: TrainState, batch: Any, seed_key: jax.Array) -> Any:
        def loss(params: Any) -> jax.Array:
            params, key = optim.join(params, state.frozen), random_key(seed_key, DROPOUT, step - 1)
            return setup.loss_fn(setup.applied, params, batch, key)[0]

        return jax.grad(loss)(state.params)

    return gradient(state, sharding.put(setup.mesh, batch, sharding.BATCH), setup.seed_key())


def _state_before(run: Run, setup: Setup, step: int) -> tuple[TrainState, int]:
    """The newest sound state before a step, and the step that it is of."""
    with ExitStack() as stack:
        found = [
            (n, kept)
            for kept in (Checkpoints(run.checkpoints_path), Checkpoints(run.bad_path))
            for n in stack.enter_context(kept.held())
            if n < step
        ]
        for n, kept in sorted(found, key=lambda pair: pair[0], reverse=True):
            try:
                kept.verify(n)
            except UserError:
                continue  # an older one will do; verify and --resume tell about this one
            return kept.restore(n, setup.layout), n
    return setup.start(pretrained.initial(run.config)), 0


def _norms(gradient: Any) -> dict[str, str]:
    """The leaves with the largest norms; what is not finite comes first."""
    norms = {
        jax.tree_util.keystr(path, simple=True, separator="/"): float(np.linalg.norm(leaf))
        for path, leaf in jax.tree_util.tree_leaves_with_path(gradient)
    }
    order = sorted(norms, key=lambda name: (math.isfinite(norms[name]), -norms[name]))
    return {name: f"{norms[name]:.4g}" for name in order[:LEAVES]}
