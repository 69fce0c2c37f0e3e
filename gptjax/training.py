"""The training run, from a config to a folder that `sample.py` loads: the story, in order."""

import math
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
import optax

from gptjax import summary, trainable
from gptjax.config import Config
from gptjax.console import Clock, Report
from gptjax.errors import UserError
from gptjax.interop import pretrained
from gptjax.parallel import distributed
from gptjax.parallel.flops import flops_per_token
from gptjax.parallel.signals import Stop, until_signal
from gptjax.profile import Profile
from gptjax.programs import Programs
from gptjax.runs import folders
from gptjax.runs.checkpoint import Checkpoints
from gptjax.runs.files import Damaged
from gptjax.runs.folders import run_name
from gptjax.runs.records import Record
from gptjax.runs.run import Run
from gptjax.sampling import Sampling, generate
from gptjax.step import StepMetrics
from gptjax.text.dataset import Dataset, fingerprint, open_dataset
from gptjax.tools import replay

SAMPLE_TOKENS = 300  # shown when a run ends


def train(
    config: Config,
    directory: Path,
    *,
    resume: bool = False,
    model: nn.Module | None = None,
    optimizer: optax.GradientTransformation | None = None,
    report: Report | None = None,
    profile: bool = False,
) -> Record:
    """Train as `config` says; keep everything in `directory`.

    Args:
        config: of the run; resuming, model and data must be those of the run.
        directory: of the run; new, unless resuming.
        resume: go on from the newest sound checkpoint in it.
        model: your own, of the contract in `model.py`; None: the config's.
        optimizer: your own; None: the config's.
        report: where to tell the story; None: standard output.
        profile: trace a few calls of the devices, into the folder's `profile/`.

    Returns:
        The record of the last step, as in flops.jsonl.

    Raises:
        UserError: input that cannot be used, a run that another process is training, a loss that
            stays not finite, or a disk that takes no more.
    """
    report = report or Report(quiet=not distributed.is_first())
    run, params = Run(directory) if resume else None, None
    if run is None and config.init is not None:
        loaded = distributed.first_then_all(partial(pretrained.load, config.init))
        report.say(pretrained.origin(config, loaded))
        config, params = pretrained.fit(config, loaded)
        tokenizer = loaded.tokenizer
    else:
        loaded, tokenizer = None, run and run.tokenizer
    dataset = distributed.first_then_all(
        lambda: open_dataset(config.data, config.model.block_size, tokenizer, report)
    )
    if loaded is not None:
        pretrained.check_tokenizer(loaded, dataset.tokenizer)
    programs = Programs(config, dataset.tokenizer.vocab_size, model, optimizer)
    if not jax.tree.leaves(trainable.trained(programs.abstract.params, config.optim)):
        raise UserError(
            f"optim.freeze={config.optim.freeze!r} leaves nothing to train; give a narrower one, "
            f"or start a new run from this one with --init"
        )
    told = lambda: f"{config}{dataset.tokenizer.to_json()}{fingerprint(dataset)}"
    distributed.check_same("a text or settings", told)

    def open_folder() -> dict[str, Any]:
        """Make the folder, or change the one that is resumed; what has changed."""
        lock.enter_context(folders.locked(directory))
        if run is None:
            opened = Run.create(directory, config, dataset.tokenizer)
        else:
            opened = run
        opened.use_text(config.data.text, fingerprint(dataset))
        return {**opened.changed, **opened.change_config(config)}

    with ExitStack() as lock:
        for name, (old, new) in distributed.first_does(open_folder).items():
            report.say(f"changed: {name} was {old}, is {new}")
        run = Run(directory)
        run.use_text(config.data.text, fingerprint(dataset))
        return _train(run, dataset, programs, report, params, profile, model is not None)


def _train(
    run: Run,
    dataset: Dataset,
    programs: Programs,
    report: Report,
    params: Any,
    profile: bool,
    own_model: bool,
) -> Record:
    """From the newest checkpoint, or from `params`, to the last step."""
    config, directory = programs.config, run.directory
    checkpoints = Checkpoints(run.checkpoints_path, run.keep)
    distributed.first_does(checkpoints.clean)
    start = distributed.first_does(lambda: _newest_sound_step(checkpoints, report))
    if start > config.steps:
        raise UserError(
            f"{directory} is at step {start} already, past steps={config.steps}; give more --steps"
        )
    if distributed.first_does(lambda: start in checkpoints.steps()):
        state = programs.restore(checkpoints, start)
    else:
        state = programs.start(pretrained.initial(config) if params is None else params)
    feed, val_tokens = programs.training(dataset), programs.hold(dataset.val)

    log = run.log if distributed.is_first() else lambda records: None

    def finish(step: int, record: Record, stopped: bool) -> Record:
        """Save, then evaluate, then log: a crash while evaluating loses nothing."""
        last = step == config.steps
        if (step or config.init) and (step % config.save_every == 0 or last or stopped):
            if not programs.is_finite(state):
                raise UserError(
                    f"the parameters or the optimizer's state are not finite after step {step}: "
                    f"training has diverged, and nothing was saved; go on from the last "
                    f"checkpoint with --resume and a lower --optim.learning-rate"
                )
            checkpoints.save(step, *programs.stored(state), record, run.texts)
        if step % config.eval_every == 0 or last:
            if stopped and not last:
                return record  # evaluated and logged on resume, from the record in the checkpoint
            loss = programs.mean_loss
            if config.eval_batches is not None:
                tokens, starts = feed.sample(step)
                record["train_sampled_loss"] = programs.loss_at(state.weights, tokens, starts)
                record["val_sampled_loss"] = loss(state.weights, val_tokens, step, False)
            if config.eval_batches is None or last:
                record["val_loss"] = loss(state.weights, val_tokens, step, True)
                record["val_bits_per_byte"] = dataset.bits_per_byte(record["val_loss"])
            report.evaluation(step, config.steps, record)
        log([record])
        return record

    report.summary(f"run {directory}", summary.before(programs, dataset, start))
    if warning := summary.warning(programs, dataset):
        report.say(warning)
    logged, damage = distributed.first_does(lambda: run.rewind_metrics(start))
    if damage and start:
        report.say(f"going on with the metrics that are left: {damage}")
    record: Record = logged[-1] if logged else {"step": 0, "seconds": 0.0}
    if start and record["step"] < start:
        record = checkpoints.record(start)
    unfinished = start == config.steps == record["step"] and "val_loss" not in record
    if unfinished:  # it was stopped here, and this was not yet to be the last step
        distributed.first_does(lambda: run.rewind_metrics(start - 1))
    clock = Clock(record.get("seconds") or 0.0)
    step = start
    skips = _skips(logged)
    stopped = False
    trace = Profile(run.directory / "profile" if profile and distributed.is_first() else None)
    with (
        until_signal() as asked,
        report.progress(start, config),
        checkpoints.sealing(),
        trace.ending(),
    ):
        stop = Stop(asked, programs.mesh)
        if not logged or logged[-1]["step"] < start or unfinished:
            record = finish(start, record, stopped=False)
        clock.start()
        while step < config.steps and not stopped:
            boundary = _next_boundary(config, step)
            records: list[Record] = []
            bad: _Bad | None = None
            before: tuple[int, int, StepMetrics] | None = None
            while step < boundary and bad is None and not (before and stop.soon()):
                n = min(config.steps_per_dispatch, boundary - step)
                tokens = feed(step, then=step + n)
                with trace.call(step):
                    state, out = programs.train_steps(state, tokens, programs.seed_key, n)
                if before:  # read the steps before these while the device makes these
                    bad = _read(*before, records, clock, report)
                before, step = (step, n, out), step + n
                checkpoints.finish_save(wait=False)
            assert before
            if bad is None:  # else the last call found the state before the bad step, and kept it
                bad = _read(*before, records, clock, report)
            skips = (skips if bad and not records else 0) + bool(bad)
            if bad:
                records.append(
                    {"step": bad.step, "skipped": bad.reason, "seconds": round(clock.read(), 3)}
                )
                replay.keep(run, programs, state, bad.step, feed)
                report.say(
                    f"step {bad.step} skipped ({bad.reason}); to look at it: "
                    f"python train.py --run {run_name(directory)} --replay {bad.step}"
                )
                state = programs.skip(state)
            step = records[-1]["step"]
            log(records[:-1])
            if skips == config.stop_after_skips:
                log(records[-1:])
                raise UserError(
                    f"the loss or the gradient was not finite for {skips} steps in a row, up to "
                    f"step {step} ({records[-1]['skipped']}): training has diverged; look at it "
                    f"with --replay {step}, or go on from the last checkpoint with --resume and a "
                    f"lower --optim.learning-rate"
                )
            with clock.stopped():
                stopped = stop.now()
                record = finish(step, records[-1], stopped)

    name = run_name(directory)
    if step < config.steps:
        report.say(f"stopped after step {step}; to go on: python train.py --run {name} --resume")
        return record
    flops = 0 if own_model else flops_per_token(config.model, programs.abstract.params)
    report.summary("done", summary.after(programs, run, record, flops))
    report.say("a sample:\n" + _sample(programs.model_here, state.weights, dataset, config))
    if trace.folder is not None:
        report.say(f"traced some steps: xprof --logdir {trace.folder}")
    if not own_model:
        report.say(f"next: python sample.py --run {name}")
    return record


def _newest_sound_step(checkpoints: Checkpoints, report: Report) -> int:
    """The step to go on from: 0 without a checkpoint; damaged ones are set aside, with a word.

    Raises:
        UserError: there are checkpoints, and every one is damaged.
    """
    steps, sound = checkpoints.steps(), checkpoints.newest_sound()
    if steps and sound is None:
        raise UserError(f"every checkpoint in {checkpoints.path} is damaged; start a new run")
    for step in steps[steps.index(sound) + 1 :] if sound is not None else []:
        try:
            checkpoints.verify(step)
        except Damaged as error:
            report.say(f"set aside: {error}")
            checkpoints.set_aside(step)
    return sound or 0


def _next_boundary(config: Config, step: int) -> int:
    """The first step after `step` at which something is due."""
    due = [every * (step // every + 1) for every in (config.eval_every, config.save_every)]
    return min(*due, config.steps)


class _Bad(NamedTuple):
    """A step whose loss or gradient is not finite."""

    step: int
    reason: str


def _read(
    first: int, n: int, out: StepMetrics, records: list[Record], clock: Clock, report: Report
) -> _Bad | None:
    """Append the records of the n steps after step `first`, up to one that is bad; waits until
    the device has made them."""
    host = jax.device_get(out)
    for i in range(n):
        values = {name: float(x[i]) for name, x in host._asdict().items()}
        step = first + i + 1
        if not all(map(math.isfinite, values.values())):
            return _Bad(step, f"loss {values['loss']}, gradient norm {values['grad_norm']}")
        records.append({"step": step, **values, "seconds": round(clock.read(), 3)})
    report.step(first + n, records[-1]["loss"], clock.read())
    return None


def _skips(records: list[Record]) -> int:
    """How many of the last records in a row are of skipped steps."""
    count = 0
    while count < len(records) and "skipped" in records[-1 - count]:
        count += 1
    return count


def _sample(model: nn.Module, params: Any, dataset: Dataset, config: Config) -> str:
    """Some text from the trained model, after a newline if the tokenizer has one."""
    tokenizer = dataset.tokenizer
    first = tokenizer.encode("\n", unknown="skip")
    prompt = first if len(first) else np.zeros(1, np.int32)
    sampling = Sampling(temperature=0.8, vocab_size=tokenizer.vocab_size)
    key = jax.random.key(config.seed)
    chunks = generate(model, params, prompt, key, SAMPLE_TOKENS, sampling)
    return tokenizer.decode(np.concatenate(list(chunks), axis=1)[0])
