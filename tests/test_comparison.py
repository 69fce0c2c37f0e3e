"""Tests of comparing two runs: what differs, its exit code, and how it is printed."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from run_helpers import on_terminal

from gptjax.cli.main import main
from gptjax.config import Config, OptimConfig
from gptjax.errors import UserError
from gptjax.runs import environment, files
from gptjax.runs.run import Run
from gptjax.text.tokenizers import CharTokenizer
from gptjax.tools.comparison import compare

CONFIG = Config(steps=20)
TEXT = [{"tokens": 1000, "sha256": "a" * 64}, {"tokens": 100, "sha256": "b" * 64}]
A, B = Path("runs/a"), Path("runs/b")


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch) -> Path:
    """A folder with runs/a and runs/b, which are the same."""
    monkeypatch.chdir(tmp_path)
    run = Run.create(A, CONFIG, CharTokenizer("abc"))
    lines = [{"step": step, "loss": 4 - step / 10} for step in range(1, 21)]
    lines[9]["val_sampled_loss"] = lines[19]["val_loss"] = 2.5
    run.log([{"step": 0, "val_sampled_loss": 4.0}, *lines])
    checkpoint = A / "checkpoints" / "20"
    checkpoint.mkdir(parents=True)
    (checkpoint / "text.json").write_text(json.dumps(TEXT))
    files.seal(checkpoint)
    environment.append(A, {"command": ["gptjax", "train"], "versions": {"jax": "1"}, "step": 0})
    shutil.copytree(A, B)
    return tmp_path


def change(name: str, old: str, new: str) -> None:
    text = (B / name).read_text()
    assert old in text
    (B / name).write_text(text.replace(old, new))


def test_equal_runs(capsys):
    found = compare(A, B)
    assert found.same and not (found.settings or found.data or found.environment)
    assert (found.steps, found.common, found.unequal_at) == ((20, 20), 21, None)
    assert ("val", 20, 2.5, 2.5) in found.losses and ("~val", 10, 2.5, 2.5) in found.losses
    assert [step for name, step, *_ in found.losses if name == "train"][-1] == 20
    main(["diff", "a", "b"])  # exit code 0
    assert capsys.readouterr().out.splitlines()[-1] == (
        "result\tsettings are the same; all losses of the 21 common steps are equal\t20\t20"
    )


def code_of(*argv: str) -> int | str | None:
    with pytest.raises(SystemExit) as caught:
        main(["diff", *argv])
    return caught.value.code


def test_settings(capsys):
    other = replace(CONFIG, seed=3, optim=OptimConfig(learning_rate=0.5))
    Run.create(Path("runs/c"), other, CharTokenizer("abc"), {"model": "Mine"})
    found = compare(A, Path("runs/c"))
    assert found.settings == {
        "seed": (1337, 3),
        "optim.learning_rate": (1e-3, 0.5),
        "own model": (None, "Mine"),
    }
    assert (found.steps, found.common, found.same) == ((20, None), 0, False)
    assert found.data["training tokens"] == (f"1,000, sha256 {'a' * 12}", "unknown")
    assert found.environment == {"environment.json": ("recorded", "not recorded")}
    assert code_of("a", "c") == 1
    assert "3 settings differ; there is no step in common (20 and - steps)" in (
        capsys.readouterr().out
    )


def test_other_losses_from_a_step_on():
    change("metrics.jsonl", '"loss": 3.3}', '"loss": 3.3000001}')
    found = compare(A, B)
    assert (found.unequal_at, found.same) == (7, False)
    assert code_of("a", "b") == 1


def test_a_step_that_only_one_run_has_or_evaluated_is_no_difference():
    change("metrics.jsonl", ', "val_sampled_loss": 2.5', "")
    lines = (B / "metrics.jsonl").read_text().splitlines(keepends=True)
    (B / "metrics.jsonl").write_text("".join(lines[:-3]))
    found = compare(A, B)
    assert found.same and found.steps == (20, 17) and found.common == 18


def test_a_skipped_step_is_a_difference():
    change("metrics.jsonl", '{"step": 5, "loss": 3.5}', '{"step": 5, "skipped": "loss nan"}')
    assert compare(A, B).unequal_at == 5


@pytest.mark.parametrize("part", [0, 1])
def test_other_data(part):
    text = [dict(split) for split in TEXT]
    text[part]["sha256"] = "c" * 64
    place = B / "checkpoints" / "20"
    (place / "text.json").write_text(json.dumps(text))
    (place / "sha256.json").unlink()
    files.seal(place)
    found = compare(A, B)
    assert list(found.data) == [("training tokens", "validation tokens")[part]]
    assert not found.same


def test_another_tokenizer():
    (B / "tokenizer.json").write_text(CharTokenizer("abd").to_json())
    assert list(compare(A, B).data) == ["tokenizer"] and not compare(A, B).same


def test_an_environment_is_shown_and_does_not_count(capsys):
    entry = {"command": ["gptjax", "train", "--resume"], "versions": {"jax": "2"}, "step": 9}
    environment.append(B, entry)
    found = compare(A, B)
    assert found.environment == {
        "command": ("gptjax train", ["gptjax train", "gptjax train --resume"]),
        "versions.jax": ("1", ["1", "2"]),
    }
    assert found.same
    main(["diff", "a", "b"])
    assert "environment\tversions.jax\t1\t1 then 2\n" in capsys.readouterr().out
    main(["diff", "a", "b", "--json"])
    assert json.loads(capsys.readouterr().out)["environment"]["versions.jax"] == ["1", ["1", "2"]]


@pytest.mark.parametrize("width", [40, 80])
def test_on_a_terminal(width):
    """Long values lie below their names; hashes are short."""
    environment.append(B, {"command": ["gptjax", "x" * 50], "code": {"commit": "abc123" * 8}})
    lines = on_terminal(width, "diff", "a", "b")
    assert max(map(len, lines[:-1])) <= width
    assert "  train 20      2.0000  2.0000" in lines
    text = "".join(line.strip() for line in lines)
    assert "x" * 50 in text.replace("b: gptjax", "")
    assert "abc123abc123" in text and "abc123abc123a" not in text


def test_runs_that_cannot_be_compared(capsys):
    (B / "config.json").write_text("{")
    with pytest.raises(UserError, match="is damaged: not JSON"):
        compare(A, B)
    assert code_of("a", "b") == 2 and code_of("a", "nope") == 2 and code_of("a") == 2
    assert len(capsys.readouterr().err.splitlines()) == 3
