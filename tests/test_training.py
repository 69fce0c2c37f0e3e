"""Whole runs, small ones: what they leave, that they resume exactly, and what stops them."""

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gptjax.cli import SampleCommand
from gptjax.config import Config, DataConfig, MeshConfig, OptimConfig
from gptjax.console import Report
from gptjax.errors import UserError
from gptjax.inference import main as sample_main
from gptjax.inference import stream
from gptjax.presets import PRESETS
from gptjax.programs import Programs
from gptjax.runs.checkpoint import Checkpoints
from gptjax.runs.run import Run
from gptjax.text import corpora
from gptjax.training import train

ROOT = Path(__file__).resolve().parents[1]
TINY = replace(
    PRESETS["tiny"],
    steps=24,
    eval_every=8,
    save_every=8,
    steps_per_dispatch=3,
    optim=OptimConfig(learning_rate=3e-3, warmup_steps=5, accumulate=2),
    mesh=MeshConfig(data=1),
)


@pytest.fixture(scope="module")
def finished(play, tmp_path_factory) -> tuple[Path, Config]:
    """A run that was never interrupted, and its config."""
    home = tmp_path_factory.mktemp("home")
    (home / "play.txt").write_text(play)
    config = replace(TINY, data=DataConfig(text=str(home / "play.txt")))
    directory = home / "runs" / "whole"
    train(config, directory, report=Report(quiet=True))
    return directory, config


class SignalAt(Report):
    """A report that sends this process a signal once a step is reached."""

    def __init__(self, at: int, number: int = signal.SIGTERM):
        super().__init__(quiet=True)
        self.at, self.number = at, number

    def step(self, step: int, loss: float, seconds: float) -> None:
        if self.at is not None and step >= self.at:
            self.at = None
            os.kill(os.getpid(), self.number)


def records(directory: Path) -> list[dict]:
    """Without their times, which are no two runs' alike."""
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


def arrays(directory: Path, step: int) -> list[np.ndarray]:
    """Every array of a checkpoint, without knowing what they are."""
    from orbax.checkpoint import v1 as ocp

    folder = directory.absolute() / "checkpoints" / str(step)
    metadata = ocp.checkpointables_metadata(str(folder)).metadata
    wanted = {name: metadata[name] for name in ("params", "training")}
    empty = jax.tree.map(lambda m: np.empty(m.shape, m.dtype) if hasattr(m, "shape") else 0, wanted)
    return [np.asarray(x) for x in jax.tree.leaves(ocp.load_checkpointables(str(folder), empty))]


def same_run(a: Path, b: Path, step: int) -> None:
    assert records(a) == records(b)
    for x, y in zip(arrays(a, step), arrays(b, step), strict=True):
        assert x.tobytes() == y.tobytes()


def test_what_a_run_leaves(finished):
    directory, _ = finished
    assert sorted(p.name for p in directory.iterdir()) == [
        ".lock",
        "checkpoints",
        "config.json",
        "metrics.jsonl",
        "tokenizer.json",
    ]
    lines = records(directory)
    assert [r["step"] for r in lines] == list(range(25))
    assert set(lines[0]) == {"step", "train_sampled_loss", "val_sampled_loss"}
    assert set(lines[1]) == {"step", "loss", "grad_norm", "lr"}
    assert set(lines[8]) == {*lines[1], "train_sampled_loss", "val_sampled_loss"}
    assert set(lines[24]) == {*lines[8], "val_loss", "val_bits_per_byte"}
    assert lines[24]["loss"] < lines[1]["loss"]
    assert Checkpoints(directory / "checkpoints").steps()[-2:] == [16, 24]
    assert not list(directory.rglob("*.tmp")) and not list(directory.rglob("*.pkl"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("at", [4, 8, 17])
def test_stopped_and_resumed_is_never_stopped(finished, tmp_path, at, number):
    """Dropout and accumulation on; in the middle, on a boundary, and past one."""
    whole, config = finished
    directory = tmp_path / "cut"
    stopped = train(config, directory, report=SignalAt(at, number))
    assert at <= stopped["step"] < config.steps
    assert Checkpoints(directory / "checkpoints").steps()[-1] == stopped["step"]
    assert signal.getsignal(number) is not None  # the handler of before is back
    train(config, directory, resume=True, report=Report(quiet=True))
    same_run(whole, directory, 24)


def test_killed_and_resumed_is_never_killed(finished, tmp_path):
    """A power cut leaves a folder as it was at some moment: here, before the last step."""
    whole, config = finished
    directory = tmp_path / "killed"
    shutil.copytree(whole, directory)
    shutil.rmtree(directory / "checkpoints" / "24")
    (directory / "checkpoints" / "24.orbax-checkpoint-tmp").mkdir()
    lines = (directory / "metrics.jsonl").read_text().splitlines(keepends=True)
    for kept in (lines[:16], lines[:17], [*lines[:20], lines[20][:9]]):  # step 16 is line 17
        (directory / "metrics.jsonl").write_text("".join(kept))
        train(config, directory, resume=True, report=Report(quiet=True))
        same_run(whole, directory, 24)
        shutil.rmtree(directory / "checkpoints" / "24")


def test_muon_and_the_average_resume_exactly(finished, tmp_path):
    _, config = finished
    model = replace(config.model, position="rotary", norm="rms", ngram=3)
    optim = replace(config.optim, kind="muon", schedule="wsd", ema=0.9)
    config = replace(config, model=model, optim=optim)
    train(config, tmp_path / "whole", report=Report(quiet=True))
    train(config, tmp_path / "cut", report=SignalAt(10))
    train(config, tmp_path / "cut", resume=True, report=Report(quiet=True))
    same_run(tmp_path / "whole", tmp_path / "cut", 24)
    command = SampleCommand(run=str(tmp_path / "whole"), checkpoint="last", max_new_tokens=20)
    assert len("".join(parts[0] for parts in stream(command))) == 20


def test_killed_before_the_first_checkpoint(finished, tmp_path):
    whole, config = finished
    directory = tmp_path / "early"
    shutil.copytree(whole, directory)
    shutil.rmtree(directory / "checkpoints")
    train(config, directory, resume=True, report=Report(quiet=True))
    same_run(whole, directory, 24)


def test_other_intervals_and_dispatches_change_no_number(finished, tmp_path):
    whole, config = finished
    other = replace(config, eval_every=24, save_every=6, steps_per_dispatch=5)
    train(other, tmp_path / "other", report=Report(quiet=True))
    for a, b in zip(arrays(whole, 24), arrays(tmp_path / "other", 24), strict=True):
        assert a.tobytes() == b.tobytes()


def test_resuming_with_other_intervals_changes_no_number(finished, tmp_path):
    """The step of the cut is a boundary of neither; evaluations and saves fall elsewhere then."""
    whole, config = finished
    train(config, tmp_path / "cut", report=SignalAt(10))
    other = replace(config, eval_every=5, save_every=7, steps_per_dispatch=4, keep_last=9)
    train(other, tmp_path / "cut", resume=True, report=Report(quiet=True))
    for a, b in zip(arrays(whole, 24), arrays(tmp_path / "cut", 24), strict=True):
        assert a.tobytes() == b.tobytes()
    for a, b in zip(records(whole), records(tmp_path / "cut"), strict=True):
        shared = a.keys() & b.keys()
        assert {"step"} < shared or a["step"] == 0
        assert {name: a[name] for name in shared} == {name: b[name] for name in shared}


def test_resuming_on_other_devices_is_equal_but_for_rounding(finished, tmp_path):
    """Cut on one device, gone on with on four, of which two share the parameters."""
    whole, config = finished
    train(config, tmp_path / "cut", report=SignalAt(10))
    other = replace(config, mesh=MeshConfig(data=2, fsdp=2))
    train(other, tmp_path / "cut", resume=True, report=Report(quiet=True))
    for a, b in zip(arrays(whole, 24), arrays(tmp_path / "cut", 24), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    for a, b in zip(records(whole), records(tmp_path / "cut"), strict=True):
        assert a == pytest.approx(b, rel=1e-4)


def test_a_crash_in_the_last_evaluation_loses_nothing(finished, tmp_path, monkeypatch):
    """The save comes first, and resuming makes up for the evaluation alone."""
    whole, config = finished
    directory = tmp_path / "crash"
    shutil.copytree(whole, directory)
    shutil.rmtree(directory / "checkpoints" / "24")

    def crash(*args):
        raise RuntimeError("out of memory, say")

    monkeypatch.setattr(Programs, "mean_loss", crash)
    with pytest.raises(RuntimeError, match="out of memory"):
        train(config, directory, resume=True, report=Report(quiet=True))
    assert Checkpoints(directory / "checkpoints").newest_sound() == 24
    assert records(directory)[-1]["step"] == 23
    monkeypatch.undo()
    train(config, directory, resume=True, report=SignalAt(0))  # no step is made again
    same_run(whole, directory, 24)


def test_a_state_that_is_not_finite_is_never_saved(finished, tmp_path):
    """The gradient of the last step was finite, and the step it made was not."""
    _, config = finished
    directory = tmp_path / "poisoned"
    optimizer = optax.sgd(lambda step: jnp.where(step == 23, jnp.inf, 1e-3))
    with pytest.raises(UserError) as caught:
        train(config, directory, optimizer=optimizer, report=Report(quiet=True))
    assert str(caught.value) == (
        "the parameters or the optimizer's state are not finite after step 24: training has "
        "diverged, and nothing was saved; go on from the last checkpoint with --resume and a "
        "lower --optim.learning-rate"
    )
    assert Checkpoints(directory / "checkpoints").steps() == [8, 16]


def test_a_trace_changes_no_number_and_names_the_step(finished, tmp_path):
    directory, config = finished
    train(config, tmp_path / "run", report=Report(quiet=True), profile=True)
    same_run(directory, tmp_path / "run", config.steps)
    [trace] = (tmp_path / "run" / "profile").rglob("*.xplane.pb")
    assert b"train_steps" in trace.read_bytes()
    assert not (directory / "profile").exists()


def test_a_damaged_newest_checkpoint_is_set_aside(finished, tmp_path, capsys):
    whole, config = finished
    directory = tmp_path / "flipped"
    shutil.copytree(whole, directory)
    victim = next((directory / "checkpoints" / "24" / "params").rglob("d/*"))
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(bytes(data))
    train(config, directory, resume=True)
    printed = " ".join(capsys.readouterr().out.split())
    assert "set aside: checkpoint" in printed and "does not match its checksum" in printed
    same_run(whole, directory, 24)


def test_resuming_what_is_finished_or_past_its_end(finished, tmp_path):
    whole, config = finished
    directory = tmp_path / "finished"
    shutil.copytree(whole, directory)
    record = train(config, directory, resume=True, report=Report(quiet=True))
    assert record["step"] == 24 and "val_loss" in record
    same_run(whole, directory, 24)
    with pytest.raises(UserError, match=r"is at step 24 already, past steps=20; give more --steps"):
        train(replace(config, steps=20), directory, resume=True, report=Report(quiet=True))
    longer = train(replace(config, steps=30), directory, resume=True, report=Report(quiet=True))
    assert longer["step"] == 30


def test_a_run_that_stopped_at_what_is_now_its_last_step_is_evaluated(finished, tmp_path):
    _, config = finished
    directory = tmp_path / "cut"
    config = replace(config, eval_every=24, save_every=24)  # nothing is due in between
    step = train(config, directory, report=SignalAt(4))["step"]
    assert step < 24
    config = replace(config, steps=step)
    record = train(config, directory, resume=True, report=Report(quiet=True))
    assert record["step"] == step and "val_loss" in record
    lines = records(directory)
    assert [line["step"] for line in lines] == list(range(step + 1))
    assert lines[-1]["val_loss"] == record["val_loss"] and "loss" in lines[-1]


def test_divergence_stops_the_run_and_keeps_its_checkpoint(finished, tmp_path):
    _, config = finished
    config = replace(config, optim=replace(config.optim, learning_rate=1e30, grad_clip=None))
    expected = (
        r"^the loss or the gradient was not finite for 3 steps in a row, up to step (\d+) \(loss "
        r"(nan|inf), gradient norm (nan|inf)\): training has diverged; look at it with "
        r"--replay \1, or go on from the last checkpoint with --resume and a lower "
        r"--optim.learning-rate$"
    )
    with pytest.raises(UserError, match=expected):
        train(config, tmp_path / "diverged", report=Report(quiet=True))


def test_the_run_folder_is_all_the_sampler_needs(finished, tmp_path, monkeypatch, capsys):
    whole, _ = finished
    shutil.copytree(whole, tmp_path / "elsewhere" / "copy")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(corpora, "DESCRIPTIONS", tmp_path / "gone")
    command = SampleCommand(run="elsewhere/copy", max_new_tokens=40, num_samples=2)
    once = ["".join(parts) for parts in zip(*stream(command), strict=True)]
    assert [len(text) for text in once] == [40, 40]
    assert once == ["".join(parts) for parts in zip(*stream(command), strict=True)]
    other = replace(command, seed=2)
    assert once != ["".join(parts) for parts in zip(*stream(other), strict=True)]
    sample_main(command)
    printed = capsys.readouterr()
    assert printed.out == "\n---\n".join(once) + "\n"
    assert printed.err.endswith("tokens/s, compilation not counted\n")


def test_the_sampler_speaks_from_best_last_or_a_step(finished):
    whole, _ = finished
    steps = Checkpoints(whole / "checkpoints").steps()
    best = Run(whole).best_step(steps)
    texts = {}
    for which in ("best", "last", *map(str, steps)):
        command = SampleCommand(run=str(whole), checkpoint=which, max_new_tokens=30)
        texts[which] = "".join(pieces[0] for pieces in stream(command))
    assert texts["best"] == texts[str(best)]
    assert texts["last"] == texts["24"]
    assert texts["24"] != texts["16"]


def test_prompts(finished, tmp_path):
    whole, _ = finished
    command = SampleCommand(run=str(whole), prompt="\u2603!", max_new_tokens=5)
    with pytest.raises(UserError, match=r"unknown characters \('\u2603' at 0"):
        list(stream(command))
    for unknown in ("replace", "skip"):
        assert list(stream(replace(command, unknown=unknown)))
    (tmp_path / "p.txt").write_text("the ")
    from_file = list(stream(replace(command, prompt=f"file:{tmp_path / 'p.txt'}")))
    assert from_file == list(stream(replace(command, prompt="the ")))
    with pytest.raises(UserError, match="the prompt has no characters"):
        list(stream(replace(command, prompt="")))


def run_command(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    script, *rest = words
    return subprocess.run(
        [sys.executable, str(ROOT / script), *rest],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_the_commands_as_typed(play, tmp_path):
    """Train, be refused, resume for longer, sample, plot: as a person would."""
    (tmp_path / "play.txt").write_text(play)
    words = ("train.py", "--config", "tiny", "--data.text", "play.txt", "--run", "mine")
    first = run_command(*words, cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    assert first.stdout.rstrip().endswith("next: python sample.py --run mine")
    again = run_command(*words, cwd=tmp_path)
    assert again.returncode == 2
    assert again.stderr == (
        "train.py: error: runs/mine already contains a run; resume it (--run mine --resume) or "
        "choose another name\n"
    )
    resumed = run_command("train.py", "--resume", "--steps", "70", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert "changed: steps was 60, is 70" in resumed.stdout
    sampled = run_command("sample.py", "--max-new-tokens", "20", cwd=tmp_path)
    assert sampled.returncode == 0 and len(sampled.stdout) == 21
    changed = run_command("train.py", "--resume", "--model.n-layer", "3", cwd=tmp_path)
    assert changed.returncode == 2 and changed.stderr == (
        "train.py: error: cannot resume runs/mine with model.n_layer=3: it was trained with "
        "model.n_layer=2; start a new run for that\n"
    )
