"""The picture of runs, and what is said when there is none to draw."""

import sys
from pathlib import Path

import pytest

from gptjax.cli import plot as command
from gptjax.config import Config
from gptjax.errors import UserError
from gptjax.runs.run import Run
from gptjax.text.tokenizers import CharTokenizer
from gptjax.tools import plot


@pytest.fixture
def here(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def run(here) -> Run:
    return Run.create(Path("runs/a"), Config(), CharTokenizer.fit("x"))


@pytest.mark.parametrize("ending", ["png", "svg", "pdf"])
def test_a_picture_of_the_newest_run(run, ending, capsys):
    run.log([{"step": 0, "val_loss": 4.0}])
    run.log([{"step": s, "loss": 4.0 / s} for s in range(1, 200)])
    run.log([{"step": 200, "loss": 0.5, "val_loss": 1.0, "val_sampled_loss": 1.1}])
    command.main(["--out", f"loss.{ending}"], "gptjax plot")
    assert Path(f"loss.{ending}").stat().st_size > 5000
    assert capsys.readouterr().out == f"loss.{ending}\n"
    command.main(["a"], "gptjax plot")
    assert Path("runs/a/loss.png").is_file()


def test_a_run_that_diverged(here):
    """Losses that are not finite are left out, in whichever split; odd names are drawn as text."""
    run = Run.create(Path("runs/_a $\\frac$ b"), Config(), CharTokenizer.fit("x"))
    nan = float("nan")
    run.log([{"step": s, "loss": 3.0 if s < 5 else nan, "val_loss": nan} for s in range(9)])
    run.log([{"step": 9, "skipped": "loss nan"}, {"step": 10, "loss": 2.0, "val_loss": 2.5}])
    plot.plot([run.directory], Path("loss.png"))
    assert plot._finite(run.metrics(), "loss").tolist() == [*([s, 3.0] for s in range(5)), [10, 2]]
    assert plot._finite(run.metrics(), "val_loss").tolist() == [[10, 2.5]]


def refusal(argv: list[str]) -> str:
    with pytest.raises(UserError) as caught:
        command.main(argv, "gptjax plot")
    return str(caught.value)


def test_nothing_to_draw(run):
    none = "runs/a has no step with a finite loss yet; train it for some steps first"
    assert refusal([]) == none
    run.log([{"step": 0, "loss": float("nan")}, {"step": 1, "skipped": "loss nan"}])
    assert refusal([]) == none
    assert refusal(["b"]) == (
        "runs/b is not a run's folder (it has no config.json); available runs: a"
    )


def test_a_picture_that_cannot_be_written(run):
    run.log([{"step": 1, "loss": 4.0}])
    assert refusal(["a", "--out", "nowhere/loss.png"]).startswith("cannot write nowhere/loss.png: ")
    assert refusal(["a", "--out", "loss.txt"]).startswith("cannot write loss.txt: Format 'txt'")


def test_without_matplotlib(run, monkeypatch):
    run.log([{"step": 1, "loss": 4.0}])
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert refusal([]).startswith("this needs the package matplotlib: pip install 'gptjax[plot]'")
