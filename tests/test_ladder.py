"""Tests of the ladder: the command end to end on a small text, and all stages (slow)."""

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptjax.cli import ladder as command
from gptjax.config import MeshConfig
from gptjax.errors import UserError
from gptjax.lecture import ladder
from gptjax.lecture.models import CountedBigram
from gptjax.presets import PRESETS
from gptjax.runs.run import Run

FAST = ["--stages", "1-bigram", "3-head", "--seeds", "2", "--steps", "10"]
COUNTED = CountedBigram(2.4519, 2.4819, 2.3735, 187)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, play: str) -> Path:
    """A folder with a small text; one device and few evaluation batches."""
    (tmp_path / "play.txt").write_text(play)
    presets = {
        name: replace(config, eval_batches=4, mesh=MeshConfig(data=1))
        for name, config in PRESETS.items()
    }
    monkeypatch.setattr(ladder, "PRESETS", presets)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def climb(*argv: str) -> None:
    command.main([*FAST, "--text", "play.txt", *argv], "gptjax ladder")


def lines_of(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().out.splitlines()


def test_the_command_trains_prints_and_reuses_runs(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    climb()
    printed = lines_of(capsys)
    table = {line.split()[0]: line.split()[1:] for line in printed if line[1:2].isdigit()}
    assert [name for name in table if "-" in name] == list(ladder.FIGURES)
    runs = {name: [Run(here / f"runs/ladder/{name}-{seed}") for seed in (1337, 1338)]
            for name in ("1-bigram", "3-head")}  # fmt: skip
    models = {"1-bigram": "Bigram", "3-head": "Attention"}
    for name, pair in runs.items():
        losses = [run.metrics()[-1]["val_loss"] for run in pair]
        assert table[name][2:4] == [f"{np.mean(losses):.4f}", f"{max(losses) - min(losses):.4f}"]
        assert [run.config.seed for run in pair] == [1337, 1338]
        assert losses[0] != losses[1]
        assert [run.parts for run in pair] == [{"model": models[name]}] * 2
    assert table["3-head"][1] == "2.40" and table["2-averaging"][1] == "-"
    for name in ladder.FIGURES.keys() - runs.keys():
        assert table[name][2:] == ["not", "run", "here"]
    assert any("bigram table, from counts: " in line for line in printed)
    assert (here / "runs/ladder/ladder.png").read_bytes().startswith(b"\x89PNG")
    assert printed[-1] == "runs/ladder/ladder.png"

    # A second time: nothing is trained, and the output is the same.
    def no_training(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(ladder, "train", no_training)
    climb()
    again = lines_of(capsys)
    assert again[4:] == printed[4:]
    assert [line.split(",")[0] for line in printed[:4]] == again[:4]

    # Into the page, twice: the text between the markers is replaced.
    page = here / "docs" / "lecture.md"
    page.parent.mkdir()
    start, end = ladder.MARKERS
    page.write_text(f"before\n\n{start}\nold\n{end}\n\nafter\n")
    climb("--docs")
    written = page.read_text()
    assert written.startswith(f"before\n\n{start}\n| stage | parameters |")
    assert written.endswith(f"{end}\n\nafter\n") and "old" not in written
    assert "| 8-scale | " in written and "| not run here |" in written
    assert "](lecture.png)" in written and (page.parent / "lecture.png").exists()
    climb("--docs")
    assert page.read_text() == written

    # Runs with other settings are refused.
    with pytest.raises(UserError, match="steps=10, not 20; remove it"):
        ladder.climb(ladder.Console(quiet=True), stages=["3-head"], steps=20, text="play.txt")


def test_a_stopped_run_is_resumed(here: Path, monkeypatch: pytest.MonkeyPatch):
    some = {"seeds": 1, "stages": ("3-head",), "steps": 10, "text": "play.txt"}
    console = ladder.Console(quiet=True)
    stages, _ = ladder.climb(console, **some)
    run = Run(here / "runs/ladder/3-head-1337")
    run.rewind_metrics(5)  # as if killed after its last checkpoint
    again, _ = ladder.climb(console, **some)
    assert again[2].losses == stages[2].losses

    monkeypatch.setattr(ladder, "train", lambda *args, **kwargs: None)  # Ctrl-C at once
    run.rewind_metrics(5)
    with pytest.raises(UserError, match="was stopped"):
        ladder.climb(console, **some)


def test_the_largest_stage_runs_only_on_request():
    wanted = ladder._wanted((), scale=False)
    assert wanted == ladder.FIGURES.keys() - {"8-scale"}
    assert ladder._wanted((), scale=True) == ladder.FIGURES.keys()
    assert ladder._wanted(("8-scale",), scale=False) == {"8-scale"}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--stages", "nope"], "unknown stage 'nope'; stages: 1-bigram, 2-averaging"),
        (["--seeds", "0"], "--seeds 0 is too small; give 1 or more"),
        (["--steps", "0"], "--steps 0 is too small; give 1 or more"),
        (["--sed", "1"], "gptjax ladder --help"),
        (["--text", "missing.txt"], "text not found: missing.txt"),
    ],
)
def test_bad_arguments(here: Path, argv: list[str], message: str):
    with pytest.raises(UserError) as caught:
        command.main(argv, "gptjax ladder")
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_page_without_markers_is_not_changed(tmp_path: Path):
    page = tmp_path / "page.md"
    with pytest.raises(UserError, match="cannot read"):
        ladder.write_page("table", page)
    page.write_text("no markers")
    with pytest.raises(UserError, match="lacks the lines"):
        ladder.write_page("table", page)
    assert page.read_text() == "no markers"


def test_a_plot_that_cannot_be_written_is_reported(tmp_path: Path):
    history = [{"step": 0, "val_sampled_loss": 4.0}, {"step": 1, "val_sampled_loss": 3.0}]
    stage = ladder.Stage("3-head", 1, [3.0], [1.0], [history])
    with pytest.raises(UserError, match="cannot write"):
        ladder.draw([stage], COUNTED, tmp_path / "missing" / "x.png")


def test_every_preset_of_the_lecture_has_a_figure():
    assert [f"lecture/{name}" for name in ladder.FIGURES] == [
        name for name in PRESETS if name.startswith("lecture/")
    ]


@pytest.mark.slow
@pytest.mark.shared
def test_each_stage_beats_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shakespeare: str
):
    """All stages on the real text, three seeds each: about ten minutes."""
    (tmp_path / "text.txt").write_bytes(shakespeare.encode())
    monkeypatch.chdir(tmp_path)
    one_device = {n: replace(c, mesh=MeshConfig(data=1)) for n, c in PRESETS.items()}
    monkeypatch.setattr(ladder, "PRESETS", one_device)
    stages, counted = ladder.climb(ladder.Console(quiet=True), seeds=3, text="text.txt")
    found = {stage.name: stage.losses for stage in stages if stage.losses}

    # The plain average is worse than the bigram, because it dilutes the last character.
    assert min(found["2-averaging"]) > max(found["1-bigram"]) + 0.2
    climbing = ["1-bigram", *list(found)[2:]]
    for before, after in itertools.pairwise(climbing):
        spread = max(np.std(found[before], ddof=1), np.std(found[after], ddof=1))
        assert np.mean(found[before]) - np.mean(found[after]) > spread, (before, after)
    for name, losses in found.items():
        if name != "2-averaging":  # the lecture's are rounded and of random batches
            assert np.mean(losses) == pytest.approx(float(ladder.FIGURES[name]), abs=0.04), name

    # The range of the lecture's bigram from step 1,200 on.
    for record in (r for history in stages[0].histories for r in history if r["step"] >= 1200):
        assert 2.44 < record["train_sampled_loss"] < 2.50
        assert 2.46 < record["val_sampled_loss"] < 2.52
    assert all(0 < loss - counted.val < 0.02 for loss in found["1-bigram"])
