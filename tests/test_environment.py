"""Tests of what a run records about where it was trained."""

import json
import subprocess
import sys

import pytest

from gptjax.errors import UserError
from gptjax.runs import environment

DEVICES = {"kind": "cpu", "count": 2, "processes": 1}


def entry(monkeypatch, *argv: str, recipe: str | None = None) -> environment.Entry:
    monkeypatch.setattr(sys, "argv", ["gptjax", *argv])
    return environment.describe(recipe, DEVICES, parameters=7, start=3)


def test_an_entry(monkeypatch, tmp_path):
    monkeypatch.setenv("JAX_ENABLE_X64", "1")
    monkeypatch.setenv("XLA_FLAGS", "--proxy=http://me:pass@host/")
    for name in ("JAX_API_KEY", "XLA_TOKEN", "WANDB_API_KEY", "HOME_ADDRESS"):
        monkeypatch.setenv(name, "hush")
    found = entry(monkeypatch, "train", "--steps", "3")
    assert found["command"] == ["gptjax", "train", "--steps", "3"]
    assert (found["step"], found["parameters"], found["devices"]) == (3, 7, DEVICES)
    assert found["versions"]["python"] == sys.version.split()[0]
    assert all(found["versions"][name] for name in environment.PACKAGES)
    assert found["variables"]["JAX_ENABLE_X64"] == "1"
    assert found["variables"]["XLA_FLAGS"] == "--proxy=http://***@host/"
    assert found["recipe"] is None
    text = json.dumps(found)
    assert "hush" not in text and "pass" not in text


@pytest.mark.parametrize(
    ("typed", "shown"),
    [
        ("--api-key abc --steps 3", "--api-key *** --steps 3"),
        ("--hf_token=abc --tokens 5", "--hf_token=*** --tokens 5"),
        ("--password --steps 3", "--password --steps 3"),
        ("--data.tokenizer byte --optim.weight-decay 1", None),
        ("--data.text https://me:abc@host/x", "--data.text https://***@host/x"),
    ],
)
def test_secrets_are_left_out_of_the_command(typed, shown):
    assert " ".join(environment.without_secrets(typed.split())) == (shown or typed)


def test_entries_are_appended_and_a_damaged_list_is_kept_aside(tmp_path):
    assert environment.read(tmp_path) == []
    assert environment.append(tmp_path, {"step": 0}) is None
    assert environment.append(tmp_path, {"step": 5}) is None
    assert environment.read(tmp_path) == [{"step": 0}, {"step": 5}]
    (tmp_path / "environment.json").write_text('{"step": 0}')
    with pytest.raises(UserError, match="is damaged: not a list of objects"):
        environment.read(tmp_path)
    said = environment.append(tmp_path, {"step": 9}) or ""
    assert environment.read(tmp_path) == [{"step": 9}]
    [aside] = tmp_path.glob("environment.json.damaged-*")
    assert aside.read_text() == '{"step": 0}' and aside.name in said
    assert not list(tmp_path.glob("*.tmp"))


def test_the_commit_of_a_config_file(monkeypatch, tmp_path):
    """Clean, changed, with a new file beside it; ignored as in a virtual environment; alone."""

    def git(*words: str) -> str:
        who = ["-c", "user.name=me", "-c", "user.email=me@here"]
        command = ["git", *who, *words]
        return subprocess.run(
            command, cwd=tmp_path, check=True, capture_output=True, text=True
        ).stdout

    code = lambda name="mine.py": entry(monkeypatch, recipe=str(tmp_path / name))["recipe"]
    (tmp_path / "mine.py").write_text("x = 1\n")
    assert (code()["commit"], code()["clean"], len(code()["sha256"])) == (None, None, 64)
    git("init", "-q")
    (tmp_path / ".gitignore").write_text("inside.py\n")
    git("add", ".")
    git("commit", "-qm", "first")
    commit = git("rev-parse", "HEAD").strip()
    monkeypatch.setenv("GIT_DIR", "/nowhere")  # as in a hook of another repository
    clean = code()
    assert (clean["commit"], clean["clean"], clean["changes"]) == (commit, True, None)
    (tmp_path / "mine.py").write_text("x = 2\n")
    changed = code()
    assert (changed["commit"], changed["clean"], len(changed["changes"])) == (commit, False, 64)
    assert changed["sha256"] != clean["sha256"]
    (tmp_path / "mine.py").write_text("x = 1\n")
    (tmp_path / "new.py").touch()
    assert (code()["clean"], code()["changes"]) == (False, None)
    (tmp_path / "inside.py").touch()
    assert code("inside.py")["commit"] is None
    monkeypatch.setenv("PATH", "")  # without git
    assert code()["commit"] is None
