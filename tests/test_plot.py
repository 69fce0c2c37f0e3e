"""The picture of runs, and what is said when there is none to draw."""

import sys
from pathlib import Path

import pytest

from gptjax.cli import plot as command
from gptjax.config import Config
from gptjax.errors import UserError
from gptjax.runs.run import Run
from gptjax.text.tokenizers import CharTokenizer


@pytest.fixture
def run(tmp_path, monkeypatch) -> Run:
    monkeypatch.chdir(tmp_path)
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


def refusal(argv: list[str]) -> str:
    with pytest.raises(UserError) as caught:
        command.main(argv, "gptjax plot")
    return str(caught.value)


def test_nothing_to_draw(run):
    assert refusal([]) == "runs/a has no metrics yet; train it for some steps first"
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
