"""A training run, from a config to a folder that `sample.py` loads."""

from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from shlex import quote
from typing import Any

import jax
import numpy as np
import optax

from gptjax import batches as batches_module
from gptjax.assembly import (
    Setup,
    assemble,
    evaluation,
    make_source,
    own_evaluation,
    prefetched,
    streams,
)
from gptjax.batches import Batches, Prefetched
from gptjax.config import Config
from gptjax.console import Report
from gptjax.errors import UserError
from gptjax.generation.slots import generate
from gptjax.interop import pretrained
from gptjax.loop import Job, run_job
from gptjax.loss import LossFn, MetricsFn
from gptjax.model import GPT, Model
from gptjax.parallel import distributed
from gptjax.parallel.flops import count_params
from gptjax.parallel.switches import pinned
from gptjax.parallel.tracing import Profile
from gptjax.plan import room
from gptjax.runs import environment, folders, parts, samples
from gptjax.runs.checkpoint import Checkpoints
from gptjax.runs.files import Damaged
from gptjax.runs.folders import run_flag
from gptjax.runs.records import Record
from gptjax.runs.run import Run
from gptjax.sampling import Sampling
from gptjax.text import special_tokens as special
from gptjax.text.dataset import Dataset, fingerprint, named, open_dataset
from gptjax.text.stream import first_tokens
from gptjax.text.tokenizers import IdTokenizer, Tokenizer, UnknownCharacters
from gptjax.track.trackers import check_installed


@pinned()
def train(
    config: Config,
    directory: Path | str,
    *,
    resume: bool = False,
    model: Model | None = None,
    optimizer: optax.GradientTransformation | None = None,
    loss_fn: LossFn | None = None,
    batches: Batches | None = None,
    metrics: MetricsFn | None = None,
    special_tokens: bool = True,
    recipe: str | None = None,
    report: Report | None = None,
    profile: bool = False,
) -> Record:
    """Train as `config` says; keep everything in `directory`.

    JAX's own switches, such as `JAX_ENABLE_X64` or the precision of matmuls, do not change a run
    (see `parallel/switches.py`). The run records which of model, optimizer, loss_fn and batches
    were yours; resuming takes the same again.

    Args:
        config: of the run; when resuming, model and data must be those of the run.
        directory: of the run; new, unless resuming.
        resume: continue from the newest sound checkpoint in it.
        model: a module of the contract in `model.py`, or a function (such as a module's class)
            that makes one from a ModelConfig and a vocabulary size; None: the config's GPT.
        optimizer: an optax transformation; None: the config's.
        loss_fn: `loss_fn(model, params, batch, key) -> (loss, dict of scalars to log)`; None:
            `loss.next_token_loss`.
        batches: a source of batches (see `batches.py`); None: windows of the config's text.
        metrics: `metrics(model, params, batch) -> dict of scalars`, means over a batch, logged at
            evaluations as "val_NAME"; None: none.
        special_tokens: put around each document the tokens that a pretrained tokenizer itself puts
            around a text, such as a BOS; a resumed run keeps its setting.
        recipe: path of the config file that these come from, for messages.
        report: where to show progress; None: standard output.
        profile: trace a few calls of the devices, into the folder's `profile/`.

    Returns:
        The record of the last step, as in metrics.jsonl.

    Raises:
        UserError: input that cannot be used, a run that another process is training, a loss that
            stays non-finite, or a full disk.
    """
    directory = Path(directory)
    check_installed(config.track)
    report = report or Report(quiet=not distributed.is_first())

    # Data
    run, params, chat = Run(directory) if resume else None, None, None
    tokenizer = run.tokenizer if run else None
    if run:
        config = replace(config, init=pretrained.pinned(config.init, run.config.init))
        if not special_tokens and len(np.concatenate(special.of(run.tokenizer))):
            raise UserError(
                f"{directory} was trained with its tokenizer's special tokens; start a new run to "
                f"train without them"
            )
        # Before a text is looked for that batches of the caller's stand in for.
        parts.check(run, parts.describe(batches=batches), ("batches",))
    if run is None and config.init is not None:
        loaded = distributed.first_then_all(partial(pretrained.load, config.init))
        report.say(pretrained.origin(config, loaded))
        config, params = pretrained.fit(config, loaded)
        tokenizer, chat = loaded.tokenizer, loaded.chat
        model = model or loaded.model
    dataset = None
    if batches is None:
        opened = partial(_open, config, run, tokenizer, report, special_tokens)
        dataset = distributed.first_then_all(opened)
        tokenizer, text = dataset.tokenizer, fingerprint(dataset)
    else:
        _check_rows(batches, config)
        tokenizer, text = _own_tokenizer(batches, config), batches_module.fingerprint(batches)
    data_name = named(config.data) if batches is None else "of batches="
    if run is None and config.init is not None:
        pretrained.check_tokenizer(loaded, tokenizer)

    # Functions
    model = model or (parts.known_model(run) if run else None)
    setup = assemble(
        config,
        tokenizer.vocab_size,
        model=model,
        optimizer=optimizer,
        loss_fn=loss_fn,
        metrics=metrics,
        batch_at=None if dataset and not streams(config, dataset) else Prefetched.at,
    )
    if not jax.tree.leaves(setup.layout.params):
        raise UserError(
            f"optim.freeze={config.optim.freeze!r} leaves nothing to train; give a narrower one, "
            f"or start a new run from this one with --init"
        )
    room.check_training(
        config,
        setup.layout,
        setup.mesh,
        vocab_size=tokenizer.vocab_size,
        is_gpt=type(setup.model) is GPT and setup.layout.frozen is None and loss_fn is None,
        streams=dataset is None or streams(config, dataset),
    )
    own = parts.describe(
        recipe, model=setup.model, optimizer=optimizer, loss_fn=loss_fn, batches=batches
    )
    distributed.check_same(
        "a text or settings", lambda: f"{config}{own}{tokenizer.to_json()}{text}"
    )

    # Folder
    def open_folder() -> dict[str, Any]:
        """Make the folder, or check that it can be resumed; the settings that will change."""
        stack.enter_context(folders.locked(directory))
        if run is None:
            Run.create(directory, config, tokenizer, own, chat)
            return {}
        parts.check(run, own)
        run.use_text(data_name, text)
        return {**run.changed, **run.check_config(config)}

    with ExitStack() as stack:
        changed = distributed.first_does(open_folder)
        run = Run(directory)
        run.use_text(data_name, text)
        checkpoints = Checkpoints(run.checkpoints_path, run.keep)
        start = distributed.first_does(lambda: _newest_sound_step(run, checkpoints))
        if start > config.steps:
            raise UserError(
                f"{directory} is at step {start} already, past steps={config.steps}; give more "
                f"--steps"
            )
        if distributed.first_does(lambda: start in checkpoints.steps()):
            state = checkpoints.restore(start, setup.layout)
        else:
            state = setup.start(pretrained.initial(config) if params is None else params)
        # Nothing refuses to resume from here on, so the folder may change.
        distributed.first_does(lambda: _tidy(run, config, checkpoints, start, report))
        distributed.first_does(lambda: _record_environment(run, setup, recipe, start, report))
        run.config = config
        for name, (old, new) in changed.items():
            report.say(f"changed: {name} was {old}, is {new}")
        key = setup.seed_key()
        if batches is not None:
            source = prefetched(config, batches, setup.mesh)
            evaluate = own_evaluation(setup, batches)
        else:
            assert dataset is not None
            source = make_source(config, dataset, setup.mesh, key)
            evaluate = evaluation(setup, dataset, source)
        trace = Profile(directory / "profile" if profile and distributed.is_first() else None)
        sample = partial(_sample, setup, tokenizer) if config.sample_tokens else None
        job = Job(setup, run, checkpoints, dataset, source, key, evaluate, report, trace, sample)
        record, _ = run_job(job, state, start)
        if record["step"] == config.steps:
            if drawn := samples.read(directory).get(config.steps):
                report.say(f"a sample of step {config.steps}:\n{drawn}")
            _say_next(job)
        return record


def _open(
    config: Config,
    run: Run | None,
    tokenizer: Tokenizer | None,
    report: Report,
    special_tokens: bool,
) -> Dataset:
    """The run's text, encoded.

    Raises:
        UserError: one that cannot be used; with characters that the tokenizer lacks, which here are
            neither replaced nor skipped, it is another text than a resumed run's.
    """
    try:
        return open_dataset(config.data, config.model.block_size, tokenizer, report, special_tokens)
    except UnknownCharacters as error:
        other = f"the text {config.data.text} is not the one that {run and run.directory} was"
        advice = "remove them, or train with another tokenizer"
        raise UserError(
            f"{other} trained on: {error.found}; bring that one back, or start a new run"
            if run
            else f"{config.data.text}: {error.found}; {advice}"
        ) from None


def _newest_sound_step(run: Run, checkpoints: Checkpoints) -> int:
    """The step to continue from: 0 without a checkpoint.

    Raises:
        UserError: there are checkpoints, and every one is damaged; or all of them are gone.
    """
    last = max((record["step"] for record in run.metrics()), default=0)
    # The first save makes the folder before its step is logged, and has ended by the second one.
    saves = last // run.config.save_every
    if saves >= (2 if checkpoints.path.is_dir() else 1) and not checkpoints.exist():
        raise UserError(
            f"{run.directory} has metrics up to step {last} and no checkpoint: put its folder "
            f"checkpoints back, or start a new run"
        )
    sound = checkpoints.newest_sound()
    if sound is None and checkpoints.steps():
        raise UserError(f"every checkpoint in {checkpoints.path} is damaged; start a new run")
    return sound or 0


def _tidy(run: Run, config: Config, checkpoints: Checkpoints, start: int, report: Report) -> None:
    """Store the settings, and set aside damaged checkpoints after step `start`, with a message."""
    run.change_config(config)
    checkpoints.clean()
    for step in [step for step in checkpoints.steps() if step > start]:
        try:
            checkpoints.verify(step)
        except Damaged as error:
            report.say(f"set aside: {error}")
            checkpoints.set_aside(step)


def _record_environment(
    run: Run, setup: Setup, recipe: str | None, start: int, report: Report
) -> None:
    """Add this start to the run's list of them."""
    kind, processes = setup.mesh.devices.flat[0].device_kind, jax.process_count()
    devices = {"kind": kind, "count": setup.mesh.size, "processes": processes}
    parameters = count_params((setup.layout.params, setup.layout.frozen))
    entry = environment.describe(recipe, devices, parameters, start)
    if problem := environment.append(run.directory, entry):
        report.say(problem)


def _check_rows(batches: Batches, config: Config) -> None:
    """See that the caller's batches have the rows that the mesh and the micro-batches divide."""
    for leaf in jax.tree.leaves(batches.batch(0)):
        if np.shape(leaf)[:1] != (config.batch_size,):
            raise UserError(
                f"batches= gave an array of shape {np.shape(leaf)}, whose first axis is not "
                f"batch_size={config.batch_size}; change one of them"
            )


def _own_tokenizer(batches: Batches, config: Config) -> Tokenizer:
    """The tokenizer of the caller's batches: theirs, or one that writes ids as numbers."""
    tokenizer = getattr(batches, "tokenizer", None)
    if tokenizer is None and config.model.vocab_size is None:
        raise UserError("batches= without a tokenizer needs config.model.vocab_size; set it")
    return tokenizer or IdTokenizer(config.model.vocab_size or 0)


def _sample(setup: Setup, tokenizer: Tokenizer, params: Any) -> str:
    """Some text from the trained model, without a prompt."""
    sampling = Sampling(temperature=0.8, vocab_size=tokenizer.vocab_size)
    key = jax.random.key(setup.config.seed)
    n = setup.config.sample_tokens or 0
    chunks = generate(setup.applied, params, first_tokens(tokenizer), key, n, sampling)
    return tokenizer.decode(np.concatenate(list(chunks), axis=1)[0])


def _say_next(job: Job) -> None:
    run = job.run
    if job.trace.folder is not None:
        job.report.say(f"traced some steps: xprof --logdir {quote(str(job.trace.folder))}")
    config = f" --config {quote(run.parts['config'])}" if "config" in run.parts else ""
    if "model" not in run.parts or config or parts.known_model(run):
        job.report.say(f"next: python sample.py {run_flag(run.directory)}{config}")
