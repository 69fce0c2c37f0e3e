"""The training loop: train until something is due, then save, evaluate and log."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gptjax import console
from gptjax.assembly import Setup
from gptjax.batches import Source
from gptjax.config import Config
from gptjax.console import Clock, Report
from gptjax.errors import UserError
from gptjax.parallel import distributed, sharding
from gptjax.parallel.signals import Stop, until_signal
from gptjax.parallel.tracing import Profile
from gptjax.runs import bad_steps, samples
from gptjax.runs.checkpoint import Checkpoints
from gptjax.runs.folders import run_flag
from gptjax.runs.records import Record
from gptjax.runs.run import Run
from gptjax.step import NORMS, TrainState
from gptjax.text.dataset import Dataset
from gptjax.track.diagnose import Facts, Watch
from gptjax.track.process import tracking
from gptjax.track.state import begin as begin_tracking

FIRST = ("loss", "grad_norm", "lr")  # the order of a record's metrics


class Job(NamedTuple):
    """A run, and what it is trained with."""

    setup: Setup
    run: Run
    checkpoints: Checkpoints
    dataset: Dataset | None
    source: Source
    key: jax.Array
    evaluate: Callable[[Any, int, bool], dict[str, float]]
    report: Report
    trace: Profile
    sample: Callable[[Any], str] | None = None


def run_job(job: Job, state: TrainState, start: int) -> tuple[Record, TrainState]:
    """From step `start` to the last one, or until a signal."""
    setup, run, checkpoints, report = job.setup, job.run, job.checkpoints, job.report
    config = setup.config
    report.summary(f"run {run.directory}", console.before(setup, run.tokenizer, job.dataset, start))
    if warning := console.warning(setup, job.dataset):
        report.say(warning)
    record, logged, skips = _last_record(job, start)
    watch = Watch(_facts(job), report.say, run.metrics_path)
    clock = Clock(record.get("seconds") or 0.0)
    step, stopped = start, False
    with (
        until_signal() as asked,
        report.progress(start, config),
        checkpoints.sealing(),
        job.trace.ending(),
        _tracking(job, start) as check_trackers,
    ):
        stop = Stop(lambda: asked() or report.lost is not None, setup.mesh)
        if not logged:
            record = _finish(job, state, record, stopped=False)
            watch.see([record])
        clock.start()
        while step < config.steps and not stopped:
            state, records, bad = _advance(job, state, step, clock, stop)
            step = records[-1]["step"]
            if bad:
                skips = skips + 1 if len(records) == 1 else 1
                state = _skip(job, state, step, bad)
            else:
                skips = 0
            _log(run, records[:-1])
            if skips == config.stop_after_skips:
                _log(run, records[-1:])
                raise UserError(
                    f"the loss or the gradient was not finite for {skips} steps in a row, up to "
                    f"step {step} ({bad}): training has diverged; look at it with --replay {step}, "
                    f"or continue from the last checkpoint with --resume and a lower "
                    f"--optim.learning-rate"
                )
            with clock.stopped():
                stopped = stop.now()
                record = _finish(job, state, records[-1], stopped)
                watch.see([*records[:-1], record])
                check_trackers()
    if step < config.steps:
        again = f"to continue: python train.py {run_flag(run.directory)} --resume"
        report.say(f"stopped after step {step}; {again}")
    else:
        again = f"the run is complete; its losses are in {run.metrics_path}"
        report.summary("done", console.after(setup, run, record))
    if report.lost:
        raise UserError(
            f"the output cannot be written ({report.lost.strerror}); saved after step {step}; "
            f"{again}"
        )
    return record, state


def _advance(
    job: Job, state: TrainState, step: int, clock: Clock, stop: Stop
) -> tuple[TrainState, list[Record], str | None]:
    """Train until something is due, a signal, or a step that is not finite.

    The metrics of each dispatch are read while the device computes the next one.

    Returns:
        The state (before a step that is not finite), a record of each step, and what was not
        finite, if anything.
    """
    config = job.setup.config
    boundary = _next_boundary(config, step)
    records: list[Record] = []
    pending: tuple[int, int, Any] | None = None
    bad: str | None = None
    while step < boundary and bad is None and not (pending and stop.soon()):
        n = min(config.steps_per_dispatch, boundary - step)
        data = job.source.data(step, then=step + n)
        with job.trace.call(step):
            state, log = job.setup.steps(state, data, job.key, step, n)
        if pending:
            bad = _read(job, *pending, records, clock)
        pending, step = (step, n, log), step + n
        job.checkpoints.finish_save(wait=False)
    if pending and bad is None:  # else the last call was a no-op
        bad = _read(job, *pending, records, clock)
    return state, records, bad


def _read(
    job: Job, first: int, n: int, log: Any, records: list[Record], clock: Clock
) -> str | None:
    """Append the records of the n steps after step `first`, up to one that is not finite; says
    what was not. Waits for the device."""
    host = jax.device_get(log)
    names = [name for name in FIRST if name in host] + sorted(host.keys() - set(FIRST))
    without_norms = [name for name in names if not name.startswith(NORMS)]
    every = job.setup.config.norms_every
    for i in range(n):
        due = names if every and (first + i + 1) % every == 0 else without_norms
        values = {name: float(host[name][i]) for name in due}
        record = {"step": first + i + 1, **values, "seconds": round(clock.read(), 3)}
        if not math.isfinite(values["loss"]) or not math.isfinite(values["grad_norm"]):
            bad = f"loss {values['loss']}, gradient norm {values['grad_norm']}"
            records.append({"step": record["step"], "skipped": bad, "seconds": record["seconds"]})
            return bad
        records.append(record)
    job.report.step(first + n, records[-1]["loss"], clock.read())
    return None


def _skip(job: Job, state: TrainState, step: int, bad: str) -> TrainState:
    """Keep the state and the batch of a non-finite step for inspection; the state to continue with,
    past that batch."""
    bad_steps.keep(job.run, state, step, job.source.batch(step - 1))
    job.report.say(
        f"step {step} skipped ({bad}); to look at it: "
        f"python train.py {run_flag(job.run.directory)} --replay {step}"
    )
    return state._replace(step=sharding.put(job.setup.mesh, np.int32(step)))


def _finish(job: Job, state: TrainState, record: Record, stopped: bool) -> Record:
    """Save, then evaluate, then log, if it is time: a crash while evaluating loses nothing."""
    config, step = job.setup.config, record["step"]
    last = step == config.steps
    if (step or config.init) and (step % config.save_every == 0 or last or stopped):
        if not bool(_all_finite(state)):
            raise UserError(
                f"the parameters or the optimizer's state are not finite after step {step}: "
                f"training has diverged, and nothing was saved; continue from the last checkpoint "
                f"with --resume and a lower --optim.learning-rate"
            )
        job.checkpoints.save(step, state, record, job.run.texts)
    if step % config.eval_every == 0 or last:
        if stopped and not last:
            return record  # evaluated and logged on resume, from the record in the checkpoint
        record = {**record, **job.evaluate(state.weights, step, last)}
        job.report.evaluation(step, config.steps, record)
        _keep_sample(job, state, step)
    _log(job.run, [record])
    return record


def _keep_sample(job: Job, state: TrainState, step: int) -> None:
    """Before the record of the step is logged, so that a resumed run lacks no sample."""
    if job.sample is not None:
        text = job.sample(state.weights)
        if distributed.is_first():
            samples.append(job.run.directory, step, text)


def _tracking(job: Job, start: int) -> AbstractContextManager[Callable[[], None]]:
    """Feed the run's trackers; the first process does."""
    names = job.setup.config.track if distributed.is_first() else ()
    if names:
        peak = console.peak_tokens_per_second(job.setup, job.run)
        begin_tracking(job.run.directory, start, peak)
    return tracking(job.run.directory, names, job.report.say)


def _facts(job: Job) -> Facts:
    """What `diagnose` must know of the run."""
    config, own = job.setup.config, job.run.parts.keys() & {"loss_fn", "batches", "optimizer"}
    chance = None if config.init or own else math.log(job.run.tokenizer.vocab_size)
    clip = None if "optimizer" in own else config.optim.grad_clip
    return Facts(chance, clip, config.optim.warmup_steps)


@jax.jit
def _all_finite(tree: Any) -> jax.Array:
    floats = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]
    return jnp.array([jnp.isfinite(x).all() for x in floats]).all()


def _log(run: Run, records: list[Record]) -> None:
    if distributed.is_first():
        run.log(records)


def _next_boundary(config: Config, step: int) -> int:
    """The first step after `step` at which something is due."""
    due = [every * (step // every + 1) for every in (config.eval_every, config.save_every)]
    return min(*due, config.steps)


def _last_record(job: Job, start: int) -> tuple[Record, bool, int]:
    """Drop the metrics after step `start`, which this session will log again.

    Returns:
        The record of that step, whether it is complete, and how many steps up to it in a row were
        skipped.
    """
    run, steps = job.run, job.setup.config.steps
    logged, damage = distributed.first_does(lambda: run.rewind_metrics(start))
    if damage and start:
        job.report.say(f"continuing with the metrics that are left: {damage}")
    record: Record = logged[-1] if logged else {"step": 0, "seconds": 0.0}
    complete = bool(logged) and record["step"] == start
    if start and record["step"] < start:
        record = job.checkpoints.record(start)
    # It was stopped at a step that was not yet to be the last one, and is now.
    if complete and start == steps and job.dataset and "val_loss" not in record:
        distributed.first_does(lambda: run.rewind_metrics(start - 1))
        complete = False
    last = start if complete else start - 1  # the sample of a step is written before its record
    distributed.first_does(lambda: samples.rewind(run.directory, last))
    skips = 0
    while skips < len(logged) and "skipped" in logged[-1 - skips]:
        skips += 1
    return record, complete, skips
