"""Tests of non-finite steps (skipped, stored, replayed) and of the lock on a run."""

import io
import json
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from rich.console import Console
from run_helpers import QUIET, arrays, assert_same, contents, message, text_file
from run_helpers import records as lines

from gptjax.assembly import assemble
from gptjax.batches import Batch, windows_at
from gptjax.config import Config, ModelConfig, OptimConfig
from gptjax.console import Report
from gptjax.errors import UserError
from gptjax.loss import cross_entropy
from gptjax.model import GPT
from gptjax.optim import make_optimizer
from gptjax.runs import folders
from gptjax.runs.checkpoint import Checkpoints
from gptjax.runs.run import Run
from gptjax.text.dataset import open_dataset
from gptjax.tools.replay import replay
from gptjax.training import train

CONFIG = Config(
    steps=12,
    batch_size=4,
    eval_every=6,
    eval_batches=1,
    save_every=5,
    keep_last=3,
    steps_per_dispatch=4,
    model=ModelConfig(n_layer=1, n_head=1, n_embd=8, block_size=8),
    optim=OptimConfig(learning_rate=1e-2),
)


class Choosy(GPT):
    """A GPT whose training loss is NaN on batches whose first token is divisible by 5."""

    def __call__(self, tokens: jax.Array, cache: Any = None, train: bool = False) -> Any:
        logits, cache = super().__call__(tokens, cache, train)
        if not train:
            return logits, cache
        return logits + jnp.where(chokes(tokens), jnp.nan, 0.0), cache


def chokes(tokens: Any) -> Any:
    return tokens[0, 0] % 5 == 0


@pytest.fixture(scope="module")
def config(tmp_path_factory, play) -> Config:
    return replace(CONFIG, data=text_file(tmp_path_factory.mktemp("text"), play))


def choosy(config: Config, directory: Path, resume: bool = False) -> dict[str, Any]:
    model = Choosy(config.model, vocab_size(config))
    return train(config, directory, resume=resume, model=model, report=QUIET)


def vocab_size(config: Config) -> int:
    return len(set(Path(config.data.text).read_text()))


@pytest.fixture(scope="module")
def skipping(config, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("runs") / "skipping"
    choosy(config, directory)
    return directory


def batches(config: Config) -> list[Batch]:
    """One for each step, computed without training."""
    tokens = jnp.asarray(open_dataset(config.data, config.model.block_size).train)
    key, shape = jax.random.key(config.seed), (config.batch_size, config.model.block_size)
    return [windows_at(tokens, key, step, *shape) for step in range(config.steps)]


def bad_steps(config: Config) -> list[int]:
    return [step + 1 for step, batch in enumerate(batches(config)) if chokes(batch.inputs)]


def test_non_finite_steps_are_skipped_once(config, skipping):
    wanted = bad_steps(config)
    assert 1 <= len(wanted) <= 6, "choose a seed that gives 1 to 6 bad steps"
    found = lines(skipping)
    assert [r["step"] for r in found] == list(range(config.steps + 1))
    assert [r["step"] for r in found if "skipped" in r] == wanted
    assert {r["skipped"] for r in found if "skipped" in r} == {"loss nan, gradient norm nan"}
    assert all(("loss" in r) != ("skipped" in r) for r in found[1:])


def test_skipping_equals_a_loop_without_the_bad_batches(config, skipping):
    """The reference is a plain Python loop without dispatches, cond or NaN."""
    setup = assemble(config, vocab_size(config))
    model, optimizer = setup.model, make_optimizer(config.optim, config.steps)
    params = setup.start().params
    opt_state = optimizer.init(params)

    @jax.jit
    def gradient(params: Any, batch: Batch) -> Any:
        def loss(params: Any) -> jax.Array:
            logits, _ = model.apply({"params": params}, batch.inputs)
            return cross_entropy(logits, batch.targets).mean()

        return jax.grad(loss)(params)

    for batch in batches(config):
        if chokes(batch.inputs):
            continue
        updates, opt_state = optimizer.update(gradient(params, batch), opt_state, params)
        params = optax.apply_updates(params, updates)
    trained = Checkpoints(skipping / "checkpoints").restore(config.steps, setup.layout)
    assert int(trained.step) == config.steps  # skipped steps count
    for ours, plain in zip(jax.tree.leaves(trained.params), jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(ours, plain, atol=1e-4)


@pytest.mark.parametrize("per_dispatch", [1, 3, 12])
def test_steps_per_dispatch_does_not_change_the_skips(config, skipping, tmp_path, per_dispatch):
    choosy(replace(config, steps_per_dispatch=per_dispatch), tmp_path / "run")
    for found, wanted in zip(lines(tmp_path / "run"), lines(skipping), strict=True):
        assert found.pop("lr", 0) == pytest.approx(wanted.pop("lr", 0))  # rounded when logged
        assert found == wanted


def test_resuming_gives_the_same_skips(config, skipping, tmp_path):
    """Resume from the checkpoint of step 5, as if killed after it."""
    directory = tmp_path / "run"
    shutil.copytree(skipping, directory)
    shutil.rmtree(directory / "bad")
    for step in Checkpoints(directory / "checkpoints").steps():
        if step > 5:
            shutil.rmtree(directory / "checkpoints" / str(step))
    assert Checkpoints(directory / "checkpoints").steps() == [5]
    choosy(config, directory, resume=True)
    assert lines(directory) == lines(skipping)
    assert_same(arrays(directory, config.steps), arrays(skipping, config.steps))


def test_files_stored_for_a_bad_step(config, skipping):
    last = bad_steps(config)[-1]
    kept = json.loads((skipping / "bad" / f"step-{last}.json").read_text())
    assert kept["step"] == last and np.shape(kept["tokens"]) == (4, 9)
    assert chokes(np.array(kept["tokens"])[:, :-1])
    assert [len(row) for row in kept["text"]] == [9] * 4
    assert kept["text"][0] in Path(config.data.text).read_text()
    assert Checkpoints(skipping / "bad").steps()[-1] == last - 1


def test_too_many_consecutive_skips_end_the_run(config, tmp_path):
    wanted = bad_steps(config)
    config = replace(config, stop_after_skips=1)
    with pytest.raises(UserError) as caught:
        choosy(config, tmp_path / "run")
    error = str(caught.value)
    assert f"step {wanted[0]} " in error and "training has diverged" in error
    assert f"--replay {wanted[0]}" in error and "--optim.learning-rate" in error
    assert lines(tmp_path / "run")[-1]["step"] == wanted[0]
    # The limit may change on resume: with a higher one the run finishes.
    choosy(replace(config, stop_after_skips=3), tmp_path / "run", resume=True)
    assert [r["step"] for r in lines(tmp_path / "run") if "skipped" in r] == wanted


# ---------------------------------------------------------------------------------------------
# Replay


@pytest.mark.parametrize("step", [1, 2, 6, 11, 12])
def test_a_replayed_step_is_bit_identical(config, skipping, step):
    model = Choosy(config.model, vocab_size(config))
    before = contents(skipping)
    again = replay(skipping, step, model=model, report=QUIET)
    record = lines(skipping)[step]
    if "skipped" in record:
        assert np.isnan(again["loss"]) and np.isnan(again["grad_norm"])
    else:
        assert (again["loss"], again["grad_norm"]) == (record["loss"], record["grad_norm"])
    assert contents(skipping) == before


def test_replay_shows_the_logged_values_and_the_text(config, skipping):
    console = Console(record=True, width=200, file=io.StringIO())
    step = bad_steps(config)[-1]
    model = Choosy(config.model, vocab_size(config))
    replay(skipping, step, model=model, report=Report(console))
    shown = console.export_text()
    assert f"step {step} " in shown and f"step {step - 1}" in shown
    assert "logged: loss nan, gradient norm nan" in shown
    kept = json.loads((skipping / "bad" / f"step-{step}.json").read_text())
    assert repr(kept["text"][0]) in shown


def test_replay_needs_the_model_of_the_run(skipping):
    refused = message(replay, skipping, 3, report=QUIET)
    assert "was trained with a model that is not part of gptjax, Choosy; " in refused


def test_replay_of_a_step_out_of_range(config, skipping):
    with pytest.raises(UserError, match=r"^--replay 13 .* 1 to 12"):
        replay(skipping, 13, report=QUIET)


# ---------------------------------------------------------------------------------------------
# The lock

HOLD = """
import sys, time
from pathlib import Path
from gptjax.runs import folders
with folders.locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_process_is_refused_until_the_first_dies(config, tmp_path):
    directory = tmp_path / "run"
    command = [sys.executable, "-c", HOLD, str(directory)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stdout.readline() == "held\n"
        with pytest.raises(UserError) as caught:
            train(config, directory, report=QUIET)
        assert str(caught.value).startswith(f"another process is training {directory}; ")
        assert [p.name for p in directory.iterdir()] == [".lock"]  # nothing was written
        (directory / ".lock").unlink()  # lets nobody in: the folder is locked too
        assert message(train, config, directory, report=QUIET) == str(caught.value)
        process.send_signal(signal.SIGKILL)
    assert train(replace(config, steps=1), directory, report=QUIET)["step"] == 1


def test_a_run_created_meanwhile_is_not_overwritten(config, skipping):
    """Two processes may choose the same free name; the second finds the folder in use."""
    before = (skipping / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match=re.escape(f"{skipping} already contains a run")):
        train(config, skipping, report=QUIET)
    assert (skipping / "metrics.jsonl").read_bytes() == before


def test_the_lock_is_released_after_an_error(tmp_path):
    with pytest.raises(ZeroDivisionError), folders.locked(tmp_path):
        raise ZeroDivisionError
    with folders.locked(tmp_path):
        pass


def test_a_run_can_be_read_while_it_is_trained(skipping):
    with folders.locked(skipping):
        assert Run(skipping).metrics()
