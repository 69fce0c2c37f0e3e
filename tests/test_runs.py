"""Tests of run folders and checkpoints: names, retention, refusals, and recovery from faults."""

import json
import re
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from run_helpers import contents, message

from gptjax.config import Config, ModelConfig
from gptjax.runs import folders
from gptjax.runs.checkpoint import Checkpoints
from gptjax.runs.files import MANIFEST
from gptjax.runs.run import Run
from gptjax.step import TrainState
from gptjax.text.tokenizers import CharTokenizer

PARAMS: Any = {"a": jnp.arange(6.0).reshape(2, 3), "b": {"c": jnp.ones(4, jnp.bfloat16)}}
OPT_STATE: Any = (jnp.zeros((), jnp.int32), {"mu": jnp.full(3, 0.5)})


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(here) -> Run:
    return Run.create(Path("runs/a"), Config(), CharTokenizer.fit("hello"))


def abstract(tree):
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), tree)


def state(step: int) -> TrainState:
    return TrainState(jnp.int32(step), PARAMS, OPT_STATE)


def save(checkpoints: Checkpoints, *steps: int) -> None:
    for step in steps:
        checkpoints.save(step, state(step), {"step": step, "loss": 1.5})
    checkpoints.finish_save()


def test_a_run_reopens_unchanged(run):
    again = Run(run.directory)
    assert again.config == Config()
    assert again.tokenizer == run.tokenizer
    assert sorted(p.name for p in run.directory.iterdir()) == ["config.json", "tokenizer.json"]


def test_own_parts_are_kept_with_the_config(here):
    parts = {"model": "MeanOfThePast", "config": "fast.py"}
    run = Run.create(Path("runs/own"), Config(), CharTokenizer.fit("x"), parts)
    assert Run(run.directory).parts == parts
    run.change_config(Config(steps=5))
    again = Run(run.directory)
    assert (again.parts, again.config.steps) == (parts, 5)
    assert again.texts["config.json"] == (run.directory / "config.json").read_text()


def test_default_names_are_numbered_and_never_overwrite(run):
    assert folders.new_directory(None, "a") == Path("runs/a-2")
    assert folders.new_directory(None, "lecture/3-head") == Path("runs/lecture-3-head")
    error = message(folders.new_directory, "a", "small")
    assert error.startswith("runs/a already contains a run; ") and "--run a --resume" in error


def test_the_newest_run_is_found(run):
    Run.create(Path("runs/b"), Config(), CharTokenizer.fit("x")).log([{"step": 0}])
    assert folders.find(None) == Path("runs/b")
    assert folders.find(None, like="a") == Path("runs/a")
    assert folders.find("a") == Path("runs/a")
    assert folders.find("runs/a") == Path("runs/a")


def test_a_folder_without_a_run(run):
    Path("runs/empty").mkdir()
    for name in ("empty", "nowhere"):
        assert message(folders.find, name) == (
            f"runs/{name} is not a run's folder (it has no config.json); available runs: a"
        )


def test_no_runs(here):
    error = message(folders.find, None)
    assert error.startswith("there is no run in runs/; ") and "python train.py" in error
    error = message(folders.find, None, like="small")
    assert error.startswith("there is no run of preset small in runs/; ")


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("config.json", "{", "not JSON: Expecting property name enclosed in double quotes: "),
        ("config.json", '{"format": 3}', "format 3 "),
        ("tokenizer.json", "[]", 'expected {"type": ...}'),
    ],
)
def test_a_damaged_file_is_named(run, name, text, reason):
    (run.directory / name).write_text(text)
    assert message(Run, run.directory).startswith(f"runs/a/{name} is damaged: {reason}")


def test_no_permission_to_create_a_run(here, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    error = message(Run.create, Path("runs/a"), Config(), CharTokenizer.fit("x"))
    assert error.startswith("cannot write the run's folder runs/a: Permission denied; ")
    assert "--run" in error


def test_model_changes_are_refused_and_other_changes_are_saved(run):
    wider = Config(model=ModelConfig(n_embd=256))
    error = message(run.check_config, wider)
    assert error.startswith("cannot resume runs/a with model.n_embd=256")
    assert "model.n_embd=128" in error
    before = contents(run.directory)
    assert run.check_config(Config(steps=5000)) == {"steps": (1000, 5000)}
    assert contents(run.directory) == before  # looking changes nothing
    run.change_config(Config(steps=5000))
    assert Run(run.directory).config.steps == 5000


def test_metrics_ignore_a_truncated_line_and_rewind(run):
    run.log([{"step": s, "loss": 0.5 * s} for s in range(5)])
    with run.metrics_path.open("a") as file:
        file.write('{"step": 5, "lo')
    assert [r["step"] for r in run.metrics()] == [0, 1, 2, 3, 4]
    assert run.rewind_metrics(3) == ([{"step": 3, "loss": 1.5}], None)
    assert run.metrics() == [{"step": s, "loss": 0.5 * s} for s in range(4)]
    run.log([{"step": 4, "loss": 2.0}])
    lines = run.metrics_path.read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1, 2, 3, 4]


def test_checkpoints_round_trip_bit_for_bit(run):
    checkpoints = Checkpoints(run.checkpoints_path)
    save(checkpoints, 10)
    training = {"step": jnp.int32(10), "opt_state": OPT_STATE}
    restored = checkpoints.restore(10, abstract(state(10)))
    for old, new in zip(jax.tree.leaves(state(10)), jax.tree.leaves(restored), strict=True):
        assert old.dtype == new.dtype and (old == new).all()
    both = {"params": PARAMS, "training": training}
    loaded = checkpoints.load(10, abstract(both))
    for old, new in zip(jax.tree.leaves(both), jax.tree.leaves(loaded), strict=True):
        assert old.dtype == new.dtype and (old == new).all()
    assert checkpoints.record(10) == {"step": 10, "loss": 1.5}
    alone = checkpoints.load(10, abstract({"params": PARAMS}))
    assert list(alone) == ["params"]


def test_the_newest_and_the_best_are_kept(run):
    checkpoints = Checkpoints(run.checkpoints_path, run.keep)
    for step, loss in ((10, 3.0), (20, 1.0), (30, 2.0), (40, 4.0), (50, float("nan"))):
        save(checkpoints, step)
        run.log([{"step": step, "val_loss": loss}])
    assert checkpoints.steps() == [20, 40, 50]
    assert run.best_step(checkpoints.steps()) == 20
    reopened = Run(run.directory)
    save(Checkpoints(run.checkpoints_path, reopened.keep), 60, 70)
    assert checkpoints.steps() == [20, 60, 70]
    assert run.choose("best", checkpoints.steps()) == 20
    assert run.choose("last", checkpoints.steps()) == 70
    assert run.choose("60", checkpoints.steps()) == 60
    error = message(run.choose, "65", checkpoints.steps())
    assert error.startswith("runs/a has no checkpoint '65'; ") and "20, 60, 70" in error


def test_no_checkpoint_saved_yet(run):
    error = message(run.choose, "best", Checkpoints(run.checkpoints_path).steps())
    assert error.startswith("runs/a has no checkpoint yet; ") and "step 250" in error


def test_every_file_of_a_checkpoint_has_a_checksum(run):
    checkpoints = Checkpoints(run.checkpoints_path)
    save(checkpoints, 10, 20)
    folder = run.checkpoints_path / "20"
    files = [p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST]
    assert len(files) > 10
    for path in files:
        good = path.read_bytes()
        name = path.relative_to(folder).as_posix()
        if good:
            path.write_bytes(bytes([good[0] ^ 1]) + good[1:])
            error = message(checkpoints.load, 20, abstract({"params": PARAMS}))
            assert error.startswith(
                f"checkpoint runs/a/checkpoints/20 is damaged: {name} does not match its checksum; "
            )
            assert error.endswith(" 10")  # the newest intact one
        path.unlink()
        assert f"{name} is missing" in message(checkpoints.verify, 20)
        path.write_bytes(good)
    checkpoints.verify(20)


def test_a_checkpoint_of_another_model_is_refused(run):
    checkpoints = Checkpoints(run.checkpoints_path)
    save(checkpoints, 10)
    other = {"params": {"a": jnp.zeros((5, 3)), "b": {"c": jnp.ones(4, jnp.bfloat16)}}}
    assert re.match(
        r"checkpoint runs/a/checkpoints/10 cannot be loaded: .*\(5, 3\)",
        message(checkpoints.load, 10, abstract(other)),
    )


def test_a_damaged_checkpoint_is_set_aside_not_deleted(run):
    checkpoints = Checkpoints(run.checkpoints_path)
    save(checkpoints, 10, 20)
    checkpoints.set_aside(20)
    assert checkpoints.steps() == [10]
    assert list(run.checkpoints_path.glob("20.damaged-*"))
    save(checkpoints, 20)
    assert checkpoints.steps() == [10, 20]


def test_an_interrupted_save_is_not_a_checkpoint(run):
    checkpoints = Checkpoints(run.checkpoints_path)
    save(checkpoints, 10)
    (run.checkpoints_path / "20.orbax-checkpoint-tmp" / "params").mkdir(parents=True)
    assert checkpoints.steps() == [10]
    checkpoints.clean()
    assert [p.name for p in run.checkpoints_path.iterdir()] == ["10"]


def test_a_full_disk_is_detected_before_saving(run, monkeypatch):
    checkpoints = Checkpoints(run.checkpoints_path)
    save(checkpoints, 10)
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 10}))
    error = message(checkpoints.save, 20, state(20), {"step": 20})
    assert "step 20 could not be saved in runs/a/checkpoints (No space left on device)" in error
    assert " 10; " in error and "--resume" in error  # the last one kept
    checkpoints.load(10, abstract({"params": PARAMS}))


FULL_DISK = """
import resource, sys
from pathlib import Path
import jax.numpy as jnp
from gptjax.runs.checkpoint import Checkpoints
from gptjax.errors import UserError
from gptjax.runs.files import MANIFEST
from gptjax.step import TrainState

checkpoints = Checkpoints(Path("checkpoints"))
def save(step):
    params = {"a": jnp.arange(300_000.0) * jnp.pi}
    checkpoints.save(step, TrainState(jnp.int32(step), params, ()), {"step": step})
    checkpoints.finish_save()
save(1)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # like a disk that fills up
try:
    save(2)
except UserError as error:
    print(error)
print(checkpoints.steps())
checkpoints.verify(1)
"""


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_FSIZE"), reason="no file size limit here")
def test_a_disk_that_fills_up_during_a_save(tmp_path):
    """The limit takes effect inside orbax's threads, as a full disk would."""
    result = subprocess.run(
        [sys.executable, "-c", FULL_DISK], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    error, steps = result.stdout.splitlines()
    assert "step 2 could not be saved in checkpoints (" in error
    assert " 1; " in error and "--resume" in error  # the last one kept
    assert steps == "[1]"


def newest(steps: list[int]) -> set[int]:
    return {*steps[-1:]}


def test_a_checkpoint_that_is_read_is_not_pruned(run):
    checkpoints = Checkpoints(run.checkpoints_path, newest)
    save(checkpoints, 10)

    def use(step: int) -> list[int]:
        save(checkpoints, 20, 30)
        checkpoints.verify(step)
        return checkpoints.steps()

    assert checkpoints.read(lambda steps: steps[-1], use) == [10, 30]
    with checkpoints.held() as held:
        save(checkpoints, 40)
        assert (held, checkpoints.steps()) == ([10, 30], [10, 30, 40])
    save(checkpoints, 50)
    assert checkpoints.steps() == [50]


@pytest.mark.parametrize("locks", [True, False])
def test_a_checkpoint_that_was_pruned_is_not_called_damaged(run, monkeypatch, locks):
    """It may go between the listing and the hold or, where files have no locks, at any time."""
    if not locks:
        monkeypatch.setattr("gptjax.runs.files.fcntl", None)
    writer, reader = Checkpoints(run.checkpoints_path, newest), Checkpoints(run.checkpoints_path)
    save(writer, 10)
    asked: list[list[int]] = []

    def choose(steps: list[int]) -> int:
        asked.append(steps)
        if locks and len(asked) == 1:
            save(writer, 20)
        return steps[-1]

    def use(step: int) -> int:
        if not locks and len(asked) == 1:
            save(writer, 20)
        reader.verify(step)
        return step

    assert reader.read(choose, use) == 20
    assert asked == [[10], [20]]
    Path("runs/a/checkpoints/20/params/harm").write_text("")
    assert "is damaged: params/harm" in message(reader.read, lambda steps: 20, use)


def test_a_checkpoint_under_another_number_is_refused(run):
    checkpoints = Checkpoints(run.checkpoints_path)
    save(checkpoints, 60)
    Path("runs/a/checkpoints/60").rename("runs/a/checkpoints/80")
    error = message(checkpoints.load, 80, abstract({"params": PARAMS}))
    assert error.startswith("checkpoint runs/a/checkpoints/80 holds the state after step 60; ")


def test_nothing_is_written_into_a_folder_that_took_the_place_of_the_run(run):
    Path("runs/a").rename("runs/b")
    for replace in (lambda: None, lambda: Path("runs/a").mkdir()):
        replace()
        for write in (lambda: run.log([{"step": 0}]), lambda: run.texts):
            assert message(write).startswith("runs/a was moved, deleted or replaced while ")
    assert not list(Path("runs/a").iterdir())


@pytest.mark.parametrize(
    ("folder", "flag"),
    [
        ("runs/a", "--run a"),
        ("runs/a b;rm", "--run 'a b;rm'"),
        ("runs/--x", "--run=--x"),
        ("else/where", "--run else/where"),
        ("a", "--run ./a"),  # not runs/a
    ],
)
def test_an_advised_command_finds_its_run(run, folder, flag):
    if not Path(folder).exists():
        Run.create(Path(folder), Config(steps=7), CharTokenizer.fit("x"))
    assert folders.run_flag(Path(folder)) == flag
    assert folders.find(folders.run_name(Path(folder))) == Path(folder)
