"""Tests of the list of runs and of presets: what it shows, of whatever lies there, at any width."""

import json
import os
from dataclasses import replace
from pathlib import Path

import jax
import pytest
from helpers import abstract_params
from run_helpers import on_terminal

from gptjax.cli.main import main
from gptjax.cli.runs import age
from gptjax.cli.table import Column, compact, print_rows
from gptjax.config import Config, ModelConfig, OptimConfig
from gptjax.model import GPT
from gptjax.presets import PRESETS, PURPOSES
from gptjax.runs import environment, folders
from gptjax.runs.run import Run
from gptjax.text.tokenizers import CharTokenizer
from gptjax.tools.listing import (
    SAMPLED,
    TRAINING,
    WHOLE,
    count_parameters,
    describe,
    find,
    nearest_preset,
)

TINY = PRESETS["tiny"]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def make(name: str, config: Config = TINY, parts: dict[str, str] | None = None) -> Run:
    return Run.create(Path("runs", name), config, CharTokenizer("abc"), parts)


# ---------------------------------------------------------------------------------------------
# What is read of a run


def test_a_run(here):
    run = make("mine", replace(TINY, seed=1))
    run.log([{"step": 0, "val_sampled_loss": 4.0}, {"step": 1, "loss": 3.0}])
    run.log([{"step": 2, "loss": 2.5, "val_sampled_loss": 2.6}, {"step": 3, "loss": 2.7}])
    listed = describe(run.directory)
    assert (listed.name, listed.preset, listed.state) == ("mine", "tiny +1", "stopped")
    assert (listed.step, listed.steps, listed.problem) == (3, 60, None)
    assert (listed.loss, listed.loss_kind, listed.loss_step) == (2.6, SAMPLED, 2)
    assert listed.bytes == sum(p.stat().st_size for p in run.directory.iterdir())
    # By its config, as before environment.json; then as recorded.
    shapes = jax.tree.leaves(abstract_params(GPT(TINY.model, 3)))
    assert listed.parameters == sum(x.size for x in shapes)
    environment.append(run.directory, {"parameters": 7})
    assert describe(run.directory).parameters == 7


def test_the_loss_is_of_the_whole_split_where_there_is_one(here):
    run = make("mine")
    run.log([{"step": 58, "val_sampled_loss": 1.0}, {"step": 59, "val_loss": 3.0}])
    run.log([{"step": 60, "loss": 2.0, "val_loss": 2.5, "val_sampled_loss": 1.5}])
    listed = describe(run.directory)
    assert (listed.loss, listed.loss_kind, listed.loss_step) == (2.5, WHOLE, 60)
    assert listed.state == "complete"
    other = make("other")
    other.log([{"step": 1, "loss": 2.0, "val_loss": float("nan")}])
    assert describe(other.directory).loss_kind == TRAINING


def test_a_run_that_is_trained(here):
    run = make("mine")
    with folders.locked(run.directory):
        assert describe(run.directory).state == "running"
    assert describe(run.directory).state == "empty"


def test_who_looks_does_not_stop_a_start(here, monkeypatch):
    """Whether a run is locked is asked by locking it for a moment."""
    run, answers = make("mine"), iter([False, False, True])
    monkeypatch.setattr("gptjax.runs.files.locks", lambda *_: next(answers))
    with folders.locked(run.directory):
        pass


def test_half_written_and_foreign_runs_are_shown_with_what_can_be_read(here):
    whole = make("whole")
    whole.log([{"step": 1, "loss": 2.0}])
    text = (whole.directory / "config.json").read_text()
    places = {name: Path("runs", name) for name in ("bare", "later", "cut", "bytes", "list")}
    for place in [*places.values(), Path("runs/pictures")]:
        place.mkdir()
    (places["bare"] / ".lock").touch()
    later = {**json.loads(text), "format": 9, "gptjax": "9.0", "steps": 1}
    (places["later"] / "config.json").write_text(json.dumps(later))
    (places["later"] / "metrics.jsonl").write_bytes(
        (whole.directory / "metrics.jsonl").read_bytes()
    )
    (places["cut"] / "config.json").write_text(text[:100])
    (places["cut"] / "metrics.jsonl").write_text('{"step": 4, "loss": 3.5}\n{"step": 5, "lo')
    (places["bytes"] / "config.json").write_bytes(os.urandom(1000))
    (places["bytes"] / "metrics.jsonl").mkdir()
    (places["list"] / "config.json").write_text("[]")
    (places["list"] / "metrics.jsonl").write_bytes(b'\n[1]\n{"step": "x"}\n\xff "val_"\n')
    found = {listed.name: listed for listed in map(describe, find([Path("runs")]))}
    assert found.keys() == {"whole", *places}
    assert found["whole"].problem is None
    assert {found[name].state for name in places} == {"unreadable"}
    assert "No such file" in (found["bare"].problem or "")
    assert (found["later"].version, found["later"].step, found["later"].steps) == ("9.0", 1, 1)
    assert "format 9 is not the format 2" in (found["later"].problem or "")
    assert (found["cut"].step, found["cut"].loss) == (4, 3.5)
    assert "metrics.jsonl: Is a directory" in (found["bytes"].problem or "")
    assert "expected a JSON object" in (found["list"].problem or "")


@pytest.mark.parametrize(
    ("config", "model", "expected"),
    [
        (PRESETS["small"], None, ("small", 0)),
        (replace(PRESETS["small"], steps=500, seed=3), None, ("small", 2)),
        (PRESETS["gpt2-xl"], None, ("gpt2-xl", 0)),
        (PRESETS["bigram"], "Bigram", ("bigram", 0)),
        (PRESETS["lecture/3-head"], "Averaging", ("lecture/2-averaging", 0)),
        (PRESETS["lecture/7-layernorm"], "Transformer", ("lecture/7-layernorm", 0)),
        (PRESETS["small"], "Mine", None),
    ],
)
def test_the_nearest_preset(config, model, expected):
    assert nearest_preset(config, model) == expected


def test_a_config_like_no_preset():
    model = ModelConfig(n_layer=3, n_head=2, n_embd=4, block_size=5, norm="rms", position="rotary")
    optim = OptimConfig(learning_rate=0.5, schedule="wsd", beta1=0.5, beta2=0.5, kind="muon")
    assert nearest_preset(Config(steps=3, batch_size=7, model=model, optim=optim)) is None
    make("mine", TINY, {"model": "Mine", "config": "own.py"})
    listed = describe(Path("runs/mine"))
    assert (listed.preset, listed.parameters) == ("own.py", None)


@pytest.mark.parametrize(
    "model",
    [
        ModelConfig(n_layer=2, n_head=2, n_embd=6, block_size=5, bias=False),
        ModelConfig(
            **{"n_layer": 3, "n_head": 4, "n_kv_head": 2, "head_dim": 2, "n_embd": 6},
            **{"n_inner": 7, "block_size": 5, "attn_bias": True, "bias": False, "norm": "rms"},
            **{"qk_norm": True, "qk_norm_scale": True, "position": "rotary", "tie_head": False},
            activation="swiglu",
        ),
        ModelConfig(n_layer=1, n_head=2, n_embd=4, attn_bias=False, norm="rms", position="none"),
    ],
)
def test_parameters_are_counted_as_the_model_makes_them(model):
    shapes = jax.tree.leaves(abstract_params(GPT(model, 11)))
    assert count_parameters(model, 11) == sum(x.size for x in shapes)


# ---------------------------------------------------------------------------------------------
# What is printed


def two_runs() -> None:
    make("a-run-with-a-name-of-some-length").log([{"step": 1, "loss": 2.0}])
    make("b").log([{"step": 60, "val_loss": 1.5}, {"step": 61, "val_sampled_loss": 1.25}])
    for name, seconds in (("a-run-with-a-name-of-some-length", 7200), ("b", 30)):
        path = Path("runs", name, "metrics.jsonl")
        now = path.stat().st_mtime
        os.utime(path, (now - seconds, now - seconds))


def test_the_list_on_a_terminal(here):
    two_runs()
    wide = on_terminal(100, "runs")
    assert wide[0].split() == "name preset state step parameters loss age size".split()
    assert wide[1].split()[:3] == ["b", "tiny", "stopped"]
    assert "1.5000" in wide[1] and "2 h" in wide[2] and "2.0000 train" in wide[2]
    narrow = on_terminal(40, "runs", "--sort", "name")
    assert narrow[0].split() == ["name", "step", "loss"] and max(map(len, narrow)) <= 40
    assert narrow[-1].endswith("age, size") and narrow[-2].startswith("not shown here: preset")
    assert (
        "".join(line[:19].split("  ")[0] for line in narrow[1:3])
        == "a-run-with-a-name-of-some-length"
    )


def test_the_list_in_a_pipe_and_as_json(here, capsys):
    two_runs()
    Path("runs/bad").mkdir()
    Path("runs/bad/config.json").write_text("\x1b[31m\t{")
    main(["runs", "--sort", "loss"])
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    rows = [dict(zip(lines[0], line, strict=True)) for line in lines[1:]]
    assert [row["name"] for row in rows] == ["b", "a-run-with-a-name-of-some-length", "bad"]
    assert (rows[0]["loss"], rows[0]["step"], rows[0]["steps"]) == ("1.5", "61", "60")
    assert rows[2]["loss"] == "" and "not JSON" in rows[2]["problem"]
    main(["runs", "runs/b", "--json"])
    [only] = json.loads(capsys.readouterr().out)
    assert (only["name"], only["loss"], only["parameters"]) == ("b", 1.5, 26080)


def test_no_runs(here, capsys):
    main(["runs"])
    assert capsys.readouterr().err == "no runs in runs; train one with gptjax train\n"
    main(["runs", "--json"])
    assert json.loads(capsys.readouterr().out) == []
    with pytest.raises(SystemExit):
        main(["runs", "nowhere"])
    assert "nowhere is not a folder; give one that contains runs" in capsys.readouterr().err


def test_the_presets_on_a_terminal():
    wide = on_terminal(120, "presets")
    assert len(wide) == 1 + len(PRESETS)
    assert wide[3].split()[:5] == ["small", "810", "K", "2,048", "1,000"]
    narrow = on_terminal(40, "presets")
    assert narrow[0].split() == ["preset", "for"] and max(map(len, narrow)) <= 40


def test_every_preset_has_a_purpose():
    assert PURPOSES.keys() == PRESETS.keys()


def test_a_strangers_value_stays_on_its_line(capsys):
    print_rows([Column("a"), Column("b")], [["x\ty\nz\x1b[0m", None]])
    assert capsys.readouterr().out == "a\tb\nx y z\\x1b[0m\t\n"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-5, "0 s"), (59, "59 s"), (3599, "59 min"), (7200, "2 h"), (9e6, "104 d")],
)
def test_ages(seconds, text):
    assert age(seconds) == text


@pytest.mark.parametrize(
    ("n", "text"),
    [
        (65, "65"),
        (999, "999"),
        (28064, "28.1 K"),
        (999_600, "1 M"),
        (6.7e9, "6.7 B"),
        (2e12, "2,000 B"),
    ],
)
def test_counts(n, text):
    assert compact(n) == text
