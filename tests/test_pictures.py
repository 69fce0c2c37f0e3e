"""Pictures of a run's model: attention, losses of tokens, near embeddings."""

import math
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from run_helpers import CONFIG, message

import gptjax
from gptjax.cli import plot as command
from gptjax.pictures import inside, tokens
from gptjax.pictures.tokens import attention_maps, label, loss_map, neighbour_table
from gptjax.runs.checkpoint import Checkpoints
from gptjax.runs.loaded import LoadedRun
from gptjax.runs.run import Run
from gptjax.step import TrainState
from gptjax.text.tokenizers import ByteTokenizer, CharTokenizer

TEXT = "the king\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Of a run with two layers of two heads and a context of 16 characters, of random weights."""
    folder = tmp_path_factory.mktemp("pictures")
    config = replace(CONFIG, model=replace(CONFIG.model, n_layer=2, n_head=2, block_size=16))
    tokenizer = CharTokenizer.fit("the king\nspak oflv")
    model, zeros = gptjax.GPT(config.model, tokenizer.vocab_size), jnp.zeros((1, 1), jnp.int32)
    shapes, draw = jax.eval_shape(model.init, jax.random.key(0), zeros), np.random.default_rng(0)
    params = jax.tree.map(lambda x: draw.normal(0, 0.5, x.shape).astype(x.dtype), shapes["params"])
    run = Run.create(folder / "runs" / "a", config, tokenizer)
    checkpoints = Checkpoints(run.checkpoints_path)
    checkpoints.save(2, TrainState(jnp.int32(2), params, ()), {"step": 2})
    checkpoints.finish_save()
    return folder


@pytest.fixture
def run(folder, monkeypatch) -> LoadedRun:
    monkeypatch.chdir(folder)
    return gptjax.load("a")


def printed(capsys, *argv: str) -> str:
    command.main(list(argv), "gptjax plot")
    return capsys.readouterr().out


def refusal(*argv: str) -> str:
    return message(command.main, list(argv), "gptjax plot")


def test_attention_weights(run):
    names, weights = inside.attention_weights(run, TEXT)
    assert names == list(TEXT) and weights.shape == (2, 2, 9, 9)
    np.testing.assert_allclose(weights.sum(axis=-1), 1, rtol=1e-5)
    assert not weights[..., np.triu(np.ones((9, 9), bool), 1)].any()
    figure = attention_maps(names, weights, "title", [0, 1], [0, 1])
    for i, axes in enumerate(figure.axes[:4]):
        drawn = axes.images[0].get_array()
        assert axes.get_title() == f"layer {i // 2}, head {i % 2}"
        assert (drawn.mask == np.triu(np.ones((9, 9), bool), 1)).all()
        np.testing.assert_array_equal(drawn.filled(0), weights[i // 2, i % 2])
    bottom = figure.axes[2]
    for axis in (bottom.xaxis, bottom.yaxis):
        assert [t.get_text() for t in axis.get_ticklabels()] == [*"the", "␣", *"king", "↵"]


def test_losses_of_tokens(run):
    names, losses = inside.losses_of_tokens(run, TEXT)
    assert names == list(TEXT) and math.isnan(losses[0])
    assert np.mean(losses[1:]) == pytest.approx(run.loss(TEXT), rel=1e-5)


def test_the_picture_of_losses(run):
    names, losses = inside.losses_of_tokens(run, TEXT * 2)
    figure = loss_map(names, losses, "title")
    axes = figure.axes[0]
    assert [t.get_text() for t in axes.texts] == [*"the king", "↵"] * 2
    rows = [round(patch.get_y()) for patch in axes.patches]
    assert rows == [0] * 9 + [1] * 9
    dark = np.array([sum(patch.get_facecolor()[:3]) for patch in axes.patches[1:]])
    assert (np.argsort(-dark, kind="stable") == np.argsort(losses[1:], kind="stable")).all()


def test_long_words_and_lines_are_broken():
    cells, rows = tokens._lines(["a" * 200, " b", "\n", "c"])
    assert cells == [(0, 0, "a" * 72), (1, 0, " b"), (1, 2, "↵"), (2, 0, "c")]
    assert rows == 3 and label("\x1b") == "\\x1b"
    assert inside.token_names(ByteTokenizer(), np.array([97, 228, 10])) == ["a", "#228", "\n"]


def test_neighbours(run):
    names, near, cosines = inside.neighbours(run, "kink", 3)
    assert names == list("kin") and cosines.shape == (3, 3)
    table = np.asarray(run.params["wte"]["embedding"])
    one = table[run.tokenizer.encode("k")[0]]
    expected = table @ one / np.linalg.norm(table, axis=1) / np.linalg.norm(one)
    order = np.argsort(-expected)
    assert near[0] == list(run.tokenizer.decode(order[1:4])) and order[0] == run.tokenizer.encode(
        "k"
    )
    np.testing.assert_allclose(cosines[0], expected[order[1:4]], rtol=1e-5)
    figure = neighbour_table(names, near, cosines, "title")
    assert [t.get_text() for t in figure.axes[0].texts][:2] == [
        label(near[0][0]),
        f"{cosines[0, 0]:.2f}",
    ]


@pytest.mark.parametrize("picture", ["attention", "losses", "neighbours"])
def test_the_command(run, picture, capsys):
    assert printed(capsys, f"--{picture}", TEXT) == f"runs/a/{picture}.png\n"
    assert Path(f"runs/a/{picture}.png").read_bytes().startswith(b"\x89PNG")
    Path("text.txt").write_text("\ufeff" + TEXT)
    out = f"{picture}.svg"
    assert printed(capsys, "a", f"--{picture}", "file:text.txt", "--out", out) == f"{out}\n"
    assert "run a, step 2" in Path(out).read_text()


def test_attention_in_a_terminal(run, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    lines = printed(capsys, "--attention", TEXT, "--terminal", "--layer", "1").splitlines()
    assert [line for line in lines if "layer" in line] == ["layer 1, head 0", "layer 1, head 1"]
    assert lines[-9] == "t @" and lines[-1].startswith("↵ ") and len(lines[-1]) == 11
    assert max(map(len, lines[2:])) <= 40
    monkeypatch.setenv("COLUMNS", "10")
    assert "need 11 columns, and the terminal has 10" in refusal("--attention", TEXT, "--terminal")


def test_neighbours_in_a_terminal(run, capsys):
    _, near, cosines = inside.neighbours(run, "ki")
    lines = printed(capsys, "--neighbours", "ki", "--terminal").splitlines()
    assert len(lines) == 3
    assert lines[1].replace("\xa0", " ").split()[:3] == ["k", near[0][0], f"{cosines[0, 0]:.2f}"]


def test_refusals(run):
    long = "the king speaks t"
    assert message(inside.attention_weights, run, long) == (
        "the text has 17 tokens, and the context of runs/a holds 16; give a shorter one"
    )
    assert "has 1 tokens; give one of 2 or more" in message(inside.losses_of_tokens, run, "t")
    assert "remove them from the text" in message(inside.neighbours, run, "中")
    assert message(inside.losses_of_tokens, run, long, 16).startswith(
        "the text has 17 tokens, and a picture holds 16; give a shorter one, or see gptjax score"
    )
    assert "gptjax score --text" in refusal("--losses", "t", "--terminal")
    assert refusal("--losses", "file:nope") == "cannot read nope: No such file or directory"
    assert refusal("--attention", "t", "--head", "2") == (
        "--head 2 is out of range; the model has 0 to 1"
    )


def test_a_model_that_keeps_neither(run):
    class Other:
        def apply(self, variables, ids, mutable):
            return None, {}

    run.model, run.params = Other(), {}  # pyright: ignore[reportAttributeAccessIssue]
    assert "Other of runs/a keeps no attention" in message(inside.attention_weights, run, "t")
    assert "no parameter wte/embedding" in message(inside.neighbours, run, "t")


def test_maps_beyond_a_picture(run):
    weights = np.zeros((80, 2, 3, 3), np.float32)
    assert "give --layer, --head" in message(attention_maps, "abc", weights, "", range(80), [0, 1])
