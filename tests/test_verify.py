"""Tests of `gptjax verify`: intact runs pass, and every kind of damage is named."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from run_helpers import QUIET, text_file

from gptjax.assembly import assemble
from gptjax.cli import verify as command
from gptjax.config import Config, ModelConfig, OptimConfig
from gptjax.runs.checkpoint import Checkpoints
from gptjax.runs.run import Run
from gptjax.tools.verify import verify
from gptjax.training import train

CONFIG = Config(
    steps=4,
    batch_size=4,
    eval_every=2,
    save_every=2,
    model=ModelConfig(n_layer=1, n_head=1, n_embd=8, block_size=8),
    optim=OptimConfig(learning_rate=1e-2),
)


@pytest.fixture(scope="module")
def sound(tmp_path_factory, play) -> Path:
    folder = tmp_path_factory.mktemp("verify")
    train(replace(CONFIG, data=text_file(folder, play)), folder / "run", report=QUIET)
    return folder / "run"


@pytest.fixture
def run(sound, tmp_path) -> Path:
    shutil.copytree(sound, tmp_path / "copy")
    return tmp_path / "copy"


def wrong(run: Path) -> dict[str, str]:
    return {c.name: c.found for c in verify(str(run)) if c.sound is False}


def test_an_intact_run(sound, capsys):
    before = {p: p.stat().st_mtime_ns for p in sound.rglob("*")}
    checks = verify(str(sound))
    assert all(c.sound for c in checks)
    assert [c.name for c in checks] == [
        *("config", "tokenizer", "metrics", "checkpoint 2", "checkpoint 4", "loss"),
    ]
    logged = Run(sound).metrics()[-1]["val_loss"]
    assert checks[-1].found == f"val_loss of step 4: logged {logged:.6f}, again {logged:.6f}"
    command.main([str(sound)], "gptjax verify")
    assert capsys.readouterr().err == ""
    assert {p: p.stat().st_mtime_ns for p in sound.rglob("*")} == before  # verify only reads


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def some_file(run: Path) -> Path:
    return next(p for p in sorted((run / "checkpoints" / "4" / "params").rglob("*")) if p.is_file())


def drop_line(run: Path) -> None:
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:2] + lines[3:]))


def half_a_line(run: Path) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')


def other_loss(run: Path) -> None:
    records = Run(run).metrics()
    records[-1]["val_loss"] += 0.001
    (run / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))


DAMAGE: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "config": (lambda run: (run / "config.json").write_text("{"), "config", "is damaged: not JSON"),
    "tokenizer": (lambda run: (run / "tokenizer.json").unlink(), "tokenizer", "No such file"),
    "half a line": (half_a_line, "metrics", "the last line was cut short"),
    "a line missing": (drop_line, "metrics", "is damaged: line 3: step 3, expected 2"),
    "no metrics": (lambda run: (run / "metrics.jsonl").unlink(), "metrics", "is missing"),
    "a bit": (lambda run: flip(some_file(run)), "checkpoint 4", "does not match its checksum"),
    "a file": (lambda run: some_file(run).unlink(), "checkpoint 4", "is missing"),
    "the loss": (other_loss, "loss", "val_loss of step 4"),
    "no checkpoint": (lambda run: shutil.rmtree(run / "checkpoints"), "checkpoints", "none"),
    "misnamed": (
        lambda run: (run / "checkpoints" / "4").rename(run / "checkpoints" / "3"),
        "checkpoint 3",
        "the state after step 4",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named(run, kind, capsys):
    do, name, found = DAMAGE[kind]
    do(run)
    problems = wrong(run)
    assert list(problems) == [name] and found in problems[name]
    with pytest.raises(SystemExit) as exit:
        command.main([str(run)], "gptjax verify")
    assert exit.value.code == 1
    assert capsys.readouterr().err == f"{name}: {problems[name]}\n"


def test_non_finite_parameters_are_found(run):
    opened = Run(run)
    setup = assemble(opened.config, opened.tokenizer.vocab_size)
    checkpoints = Checkpoints(opened.checkpoints_path)
    state = checkpoints.restore(4, setup.layout)
    poisoned = jax.tree.map(lambda x: x.at[(0,) * x.ndim].set(jnp.nan), state.params["ln_f"])
    shutil.rmtree(run / "checkpoints" / "4")
    state = state._replace(params={**state.params, "ln_f": poisoned})
    checkpoints.save(4, state, {"step": 4})
    checkpoints.finish_save()
    assert "ln_f/bias is not finite" in wrong(run)["checkpoint 4"]


def test_the_loss_is_not_checked_without_the_text(run, tmp_path):
    config = json.loads((run / "config.json").read_text())
    config["data"]["text"] = str(tmp_path / "gone.txt")
    (run / "config.json").write_text(json.dumps(config))
    last = verify(str(run))[-1]
    assert (last.name, last.sound) == ("loss", None)
    assert f"text not found: {tmp_path / 'gone.txt'}" in last.found
