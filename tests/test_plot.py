"""The loss curves of runs: what is drawn is what was measured, and labels cover none of it."""

import re
import sys
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import pytest
from run_helpers import message

from gptjax.cli import plot as command
from gptjax.config import Config
from gptjax.pictures import curves, figures
from gptjax.pictures.curves import draw, read_curves, running_mean
from gptjax.runs.run import Run
from gptjax.text.tokenizers import CharTokenizer

NONE = "has no step with a finite loss yet; train it for some steps first"
nan = float("nan")


@pytest.fixture
def here(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)


def new_run(name: str, *records: dict) -> Run:
    run = Run.create(Path("runs") / name, Config(), CharTokenizer.fit("x"))
    run.log(list(records))
    return run


@pytest.fixture
def run(here) -> Run:
    return new_run("a")


def fall(n: int, start: float = 4.0) -> list[dict]:
    """Records of a run of n steps, evaluated before the first and after the last."""
    steps = [{"step": s, "loss": start / s**0.1, "seconds": 0.5 * s} for s in range(1, n + 1)]
    steps[-1] |= {"val_loss": 2.0}
    return [{"step": 0, "seconds": 0.0, "val_loss": start + 0.1}, *steps]


def lines(axes) -> list[tuple[list[float], list[float]]]:
    """The points of each line that is drawn in the axes' data coordinates."""
    found = [line for line in axes.lines if line.get_transform() == axes.transData]
    return [(list(line.get_xdata()), list(line.get_ydata())) for line in found]


@pytest.mark.parametrize("ending", ["png", "svg", "pdf"])
def test_a_picture_of_the_newest_run(run, ending, capsys):
    run.log(fall(199))
    command.main(["--out", f"loss.{ending}"], "gptjax plot")
    assert Path(f"loss.{ending}").stat().st_size > 5000
    assert capsys.readouterr().out == f"loss.{ending}\n"
    if ending == "svg":
        text = Path("loss.svg").read_text()
        for shown in ("training step", "loss (nats per token)", "Loss of the run a", "2.0000"):
            assert shown in text
        command.main(["--out", "again.svg"], "gptjax plot")
        assert Path("again.svg").read_text() == text


def test_the_picture_lies_in_the_run(run, capsys):
    run.log(fall(3))
    command.main(["a"], "gptjax plot")
    assert capsys.readouterr().out == "runs/a/loss.png\n"
    assert Path("runs/a/loss.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_drawn_is_what_was_measured(run):
    run.log(fall(100))
    [curve], problems = read_curves([run.directory])
    assert problems == [] and curve.window == 2
    [axes] = draw([curve]).axes
    (x, raw), (middle, mean), *rest = lines(axes)
    losses = [4.0 / s**0.1 for s in range(1, 101)]
    assert (x, raw) == (list(range(1, 101)), losses)
    assert middle == [s + 0.5 for s in range(1, 100)]  # and no mean at the ends
    assert mean == pytest.approx([(a + b) / 2 for a, b in pairwise(losses)])
    assert rest[-1] == ([0.0, 100.0], [4.1, 2.0])


def test_a_running_mean_makes_up_nothing():
    x, y = np.arange(1.0, 7), np.array([1, 2, nan, 4, nan, nan])
    middle, mean = running_mean(x, y, 3)
    assert middle.tolist() == [2, 3, 4, 5]
    np.testing.assert_array_equal(mean, [1.5, 3, nan, nan])  # of two of three, or of none
    middle, mean = running_mean(x, y, 1)
    np.testing.assert_array_equal((middle, mean), (x, y))
    assert running_mean(x[:2], y[:2], 2)[0].tolist() == [1.5]


def test_a_long_run_has_fewer_means_and_a_range():
    """No loss is lost, and a huge one does not drown those after it."""
    x = np.arange(1.0, 20_001)
    y = 2 + np.sin(x)
    y[777] = 1e30
    middle, mean = running_mean(x, y, 400)
    assert len(mean) < 4000 and (middle[0], middle[-1]) == (200.5, 19800.5)
    for i in (0, 1000, len(mean) - 1):
        start = int(middle[i] - 200.5)
        assert mean[i] == pytest.approx(y[start : start + 400].mean(), rel=1e-12)
    y[777] = 9
    nothing = np.empty((0, 2))
    figure = draw([curves.Curve("a", x, y, 400, middle, mean, nothing, nothing)])
    [band] = figure.axes[0].collections
    assert band.get_datalim(figure.axes[0].transData).intervaly.tolist() == [y.min(), 9]


def test_the_last_validation_loss_is_of_the_whole_split_if_both_were_measured(run, capsys):
    both = {"step": 2, "loss": 1.5, "val_loss": 1.6789, "val_sampled_loss": 1.7}
    run.log([{"step": 1, "loss": 2.0, "val_sampled_loss": 1.9}])
    [curve], _ = read_curves([run.directory])
    assert curve.last_evaluated == (1, 1.9, False)
    run.log([both])
    [curve], _ = read_curves([run.directory])
    assert curve.evaluated is curve.sampled and curve.last_evaluated == (2, 1.6789, True)
    command.main(["--terminal"], "gptjax plot")
    assert capsys.readouterr().out.rstrip().endswith(" 1.6789")
    assert "validation, last 1.6789" in [text.get_text() for text in draw([curve]).axes[0].texts]


def test_over_tokens_and_seconds(run):
    run.log(fall(4))
    tokens = Config().batch_size * Config().model.block_size
    [curve], _ = read_curves([run.directory], "tokens")
    assert curve.x.tolist() == [tokens * s for s in range(1, 5)]
    assert curve.val.tolist() == [[0, 4.1], [4 * tokens, 2.0]]
    [curve], _ = read_curves([run.directory], "seconds")
    assert curve.x.tolist() == [0.5, 1, 1.5, 2]
    assert draw([curve], "seconds").axes[0].get_xlabel() == "time spent training (seconds)"
    logged = new_run("logged", {"step": 1, "loss": 1.0, "tokens": 96})
    assert read_curves([logged.directory], "tokens")[0][0].x.tolist() == [96]


def test_a_run_that_diverged(here):
    """Losses that are not finite leave a gap and a cross; odd names are drawn as text."""
    run = new_run("_a $\\frac$ 中 b", {"step": 0, "val_loss": nan})
    run.log([{"step": s, "loss": 3.0 if s < 5 else nan, "val_loss": nan} for s in range(1, 9)])
    run.log([{"step": 9, "skipped": "loss nan"}, {"step": 10, "loss": 2.0, "val_loss": 2.5}])
    [curve], _ = read_curves([run.directory])
    np.testing.assert_array_equal(curve.loss, [3, 3, 3, 3, nan, nan, nan, nan, nan, 2])
    assert curve.val.tolist() == [[10, 2.5]]
    figure = draw([curve])
    crosses = [line for line in figure.axes[0].lines if line.get_marker() == "x"]
    assert list(crosses[0].get_xdata()) == [5, 6, 7, 8, 9]
    figures.save(figure, Path("loss.svg"))
    assert "Loss of the run _a $\\frac$ \\u4e2d b" in Path("loss.svg").read_text()


def test_one_diverged_run_does_not_hide_the_others(here):
    wild = [{"step": s, "loss": 4.0 if s < 50 else 1e6} for s in range(1, 101)]
    runs = [new_run("calm", *fall(100)), new_run("wild", *wild)]
    found, _ = read_curves([run.directory for run in runs])
    figure = draw(found)
    assert figure.axes[0].get_ylim()[1] < 5
    assert "losses reach 1,000,000." in " ".join(figure._supxlabel.get_text().split())
    assert draw(found, log_y=True).axes[0].get_ylim()[1] > 1e6


@pytest.fixture
def twenty(here) -> list[curves.Curve]:
    found = [new_run(f"run-{i}", *fall(100 + i, 4 + 0.01 * i)).directory for i in range(20)]
    return read_curves(found)[0]


def boxes(figure) -> list:
    """Of all labels beside and below the axes, and of the axes."""
    figure.draw_without_rendering()
    texts = [t for axes in figure.axes for t in axes.texts if t.get_text()] + [figure._supxlabel]
    found = [text.get_window_extent() for text in texts]
    return found + [axes.get_window_extent() for axes in figure.axes]


@pytest.mark.parametrize("count", [1, 3, 20])
def test_no_label_covers_another_or_the_data(twenty, count):
    figure = draw(twenty[:count])
    found = boxes(figure)
    labels = [t for axes in figure.axes for t in axes.texts if t.get_text()]
    assert len(labels) == 2 * count and len(figure.axes) == min(2, count)
    for a, b in combinations(found, 2):
        # A pixel for the descenders of one line of text, and the ascenders of the next.
        assert min(a.x1, b.x1) - max(a.x0, b.x0) < 1 or min(a.y1, b.y1) - max(a.y0, b.y0) < 1.5
    width, height = figure.get_size_inches() * figure.dpi
    assert all(b.x0 >= 0 and b.y0 >= 0 and b.x1 <= width and b.y1 <= height for b in found)


def test_twenty_runs_look_different_without_colour(twenty):
    figure = draw(twenty)
    looks = {
        (str(line._unscaled_dash_pattern), line.get_marker())
        for line in figure.axes[1].lines
        if line.get_transform() == figure.axes[1].transAxes
    }
    assert len(looks) == 20


def test_spread():
    assert figures.spread([0.5], 0.1, 0, 1) == [0.5]
    assert figures.spread([0.9, 0.2], 0.1, 0, 1) == [0.9, 0.2]
    assert figures.spread([0.5, 0.5], 0.1, 0, 1) == pytest.approx([0.45, 0.55])
    assert figures.spread([1, 1, 1], 0.2, 0, 1) == pytest.approx([0.6, 0.8, 1])
    assert figures.spread([0, 0, 0], 9, 0, 1) == pytest.approx([0, 0.5, 1])


def refusal(*argv: str) -> str:
    return message(command.main, list(argv), "gptjax plot")


def test_nothing_to_draw(run):
    assert refusal() == f"runs/a {NONE}"
    run.log([{"step": 0, "loss": nan}, {"step": 1, "skipped": "loss nan"}])
    assert refusal() == f"runs/a {NONE}"
    assert refusal("b") == (
        "runs/b is not a run's folder (it has no config.json); available runs: a"
    )


def test_runs_that_cannot_be_drawn_are_named(run, capsys):
    """Half written, of another version, or without a finite loss: the rest is drawn."""
    run.log(fall(9))
    new_run("empty")
    new_run("newer", *fall(5))
    Path("runs/newer/config.json").write_text('{"format": 99}')
    half = new_run("half", *fall(5)).metrics_path
    half.write_text("nonsense\n" + half.read_text()[:-20])
    argv = ["a", "empty", "newer", "half", "--x", "tokens", "--out", "x.png"]
    command.main(argv, "gptjax plot")
    said = capsys.readouterr().err.splitlines()
    assert said[0] == f"left out: runs/empty {NONE}"
    assert "runs/newer" in said[1] and "newer" in said[1] and len(said) == 3
    assert said[2].startswith("runs/half/metrics.jsonl is damaged: line 1: ")
    found, _ = read_curves([Path("runs/newer"), Path("runs/half")])  # steps need no config
    assert [curve.name for curve in found] == ["newer", "half"]


def test_a_picture_that_cannot_be_written(run):
    run.log(fall(3))
    assert refusal("a", "--out", "nowhere/loss.png") == (
        "cannot write nowhere/loss.png: there is no folder nowhere; make it, or give another --out"
    )
    assert refusal("a", "--out", "loss.txt").startswith("cannot write loss.txt: give --out a name")
    Path("folder.png").mkdir()
    assert refusal("a", "--out", "folder.png").startswith("cannot write folder.png: Is a directory")


def test_flags_that_do_not_go_together(run):
    run.log(fall(3))
    assert "two pictures" in refusal("--attention", "x", "--losses", "x")
    assert refusal("--losses", "x", "--x", "tokens").startswith("--x is for loss curves")
    assert refusal("--head", "0").startswith("--head needs --attention")
    assert refusal("--checkpoint", "last").startswith("--checkpoint needs --attention")
    assert refusal("--losses", "x", "a", "a").startswith("--losses looks into one run")
    assert refusal("--terminal", "--out", "x.png").startswith("--terminal writes no picture")
    assert refusal("--smooth", "0") == "--smooth 0 is too small; give 1 or more"
    assert refusal("--losses", "") == "the text of --losses has no characters; give one or more"


def test_without_matplotlib(run, monkeypatch):
    run.log(fall(3))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert refusal().startswith("this needs the package matplotlib: pip install 'gptjax[plot]'")


@pytest.mark.parametrize("columns", [40, 80])
@pytest.mark.parametrize("count", [1, 20])
def test_in_a_terminal(twenty, count, columns, capsys, monkeypatch):
    """As wide as the terminal, without colours where there is none."""
    monkeypatch.setenv("COLUMNS", str(columns))
    command.main([*(f"run-{i}" for i in range(count)), "--terminal"], "gptjax plot")
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= columns and "\x1b" not in printed
    letters = ".abcdefghijklmnopqrst"[:1] if count == 1 else "abcdefghijklmnopqrst"
    for i, letter in enumerate(letters[:count]):
        assert re.search(
            rf"^{re.escape(letter)} +run-{i} +\d\.\d+ +2\.0000$", printed, re.MULTILINE
        )
    assert not list(Path("runs").rglob("*.png"))


def test_in_a_terminal_of_ascii(run, capsys, monkeypatch):
    run.log(fall(9))
    monkeypatch.setattr("gptjax.pictures.terminal._has", lambda characters: False)
    command.main(["--terminal", "--log-x", "--log-y"], "gptjax plot")
    assert capsys.readouterr().out.isascii()


def test_without_uniplot(run, monkeypatch):
    run.log(fall(3))
    monkeypatch.setitem(sys.modules, "uniplot", None)
    assert refusal("--terminal").startswith("this needs the package uniplot: pip install")
