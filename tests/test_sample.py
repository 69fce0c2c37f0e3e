"""Tests of `gptjax sample`: where prompts come from, what is printed and written, conversations."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from run_helpers import message

from gptjax.assembly import assemble
from gptjax.cli import prompts
from gptjax.cli.main import run as run_command
from gptjax.cli.prompts import read_prompt, read_prompts
from gptjax.cli.sample import SampleCommand, parse_sample
from gptjax.config import Config, ModelConfig
from gptjax.runs.checkpoint import Checkpoints
from gptjax.runs.run import Run
from gptjax.text.tokenizers import CharTokenizer

VOCABULARY = "\n abcdefghijklmnopqrstuvwxyz"
S = 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of a random model in it, whose text is random letters."""
    place = tmp_path_factory.mktemp("sample")
    config = Config(model=ModelConfig(n_layer=1, n_head=1, n_embd=8, block_size=S))
    tokenizer = CharTokenizer(VOCABULARY, len(VOCABULARY))
    run = Run.create(place / "runs" / "it", config, tokenizer)
    checkpoints = Checkpoints(run.checkpoints_path)
    state = assemble(config, tokenizer.vocab_size).start()
    record = {"step": 0, "seconds": 0.0}
    checkpoints.save(0, state, record, run.texts)
    checkpoints.finish_save()
    run.log([record])
    return place


@pytest.fixture
def here(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in, beside which the run lies."""
    (tmp_path / "runs").symlink_to(folder / "runs")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def pipe(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[bytes], None]]:
    """A function that makes standard input a pipe with this content."""
    with ExitStack() as stack:

        def put(content: bytes) -> None:
            reading, writing = os.pipe()
            os.write(writing, content)
            os.close(writing)
            monkeypatch.setattr(sys, "stdin", stack.enter_context(os.fdopen(reading)))

        yield put


def sample(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """What the command prints."""
    run_command("sample", ["--run", "it", *argv], "gptjax sample")
    return capsys.readouterr().out


# ---------------------------------------------------------------------------------------------
# Prompts


@pytest.mark.parametrize(
    ("content", "prompt"),
    [(b"Once\n", "Once"), (b"a\n\n", "a\n"), (b"\xef\xbb\xbfa\r\n", "a"), ("é".encode(), "é")],
)
def test_a_prompt_from_a_pipe(content: bytes, prompt: str, pipe: Any):
    for given in (None, "-"):
        pipe(content)
        assert read_prompt(given) == prompt


def test_an_empty_pipe_is_no_prompt(pipe: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any):
    pipe(b"")
    assert read_prompt(None) is None
    pipe(b"\n")
    assert "has no characters" in message(read_prompt, "-")
    pipe(b"caf\xe9")
    assert message(read_prompt, "-") == "standard input is not UTF-8 (byte 3)"
    # A pipe that stays open and empty is not waited for, which is said.
    monkeypatch.setattr(prompts, "PATIENCE", 0.01)
    reading, writing = os.pipe()
    with os.fdopen(reading) as stdin, os.fdopen(writing, "w"):
        monkeypatch.setattr(sys, "stdin", stdin)
        assert read_prompt(None) is None
    assert "nothing came from standard input" in capsys.readouterr().err


def test_prompts_from_lines(tmp_path: Path, pipe: Any):
    content = "one\r\n\n \ntwo \u2028 {\n"
    (tmp_path / "lines.txt").write_text(content, newline="")
    pipe(content.encode())
    for path in (str(tmp_path / "lines.txt"), "-"):
        commands = read_prompts(SampleCommand(top_k=3), path)
        assert [command.prompt for command in commands] == ["one", "two \u2028 {"]
        assert all(command.top_k == 3 for command in commands)
    (tmp_path / "empty").write_text("\n")
    assert "has no prompt" in message(read_prompts, SampleCommand(), str(tmp_path / "empty"))
    assert "No such file" in message(read_prompts, SampleCommand(), str(tmp_path / "none"))


def test_prompts_from_json_lines(tmp_path: Path):
    path = tmp_path / "prompts.jsonl"
    path.write_text(
        '{"prompt": "a", "temperature": 0, "stop": "x", "logit_bias": {"3": -2}}\n\n'
        '{"prompt": "b", "top_k": null, "stop": ["y", "z"], "ignore_eos": true}\n'
    )
    first, second = read_prompts(SampleCommand(top_k=3, seed=5), str(path))
    assert first == SampleCommand(
        prompt="a", temperature=0, stop=("x",), logit_bias=("3=-2",), top_k=3, seed=5
    )
    assert second == SampleCommand(prompt="b", stop=("y", "z"), ignore_eos=True, seed=5)


@pytest.mark.parametrize(
    ("line", "refusal"),
    [
        ("{", "not JSON ("),
        ("[1]", 'expected {"prompt": text, ...}'),
        ('{"prompt": 3}', 'expected {"prompt": text, ...}'),
        ('{"prompt": "a", "prompt": "b"}', "not JSON (the key 'prompt' is there twice)"),
        ('{"prompt": "a", "run": "x"}', "'run' is no setting of a line; expected system, "),
        ('{"prompt": "a", "top_k": 1.5}', "top_k=1.5: expected INT"),
        ('{"prompt": "a", "top_k": true}', "top_k=true: expected INT"),
        ('{"prompt": "a", "temperature": "hot"}', 'temperature="hot": expected FLOAT'),
        ('{"prompt": "a", "temperature": null}', "temperature=null: expected FLOAT"),
        ('{"prompt": "a", "temperature": NaN}', "--temperature nan is out of range"),
        ('{"prompt": "a", "unknown": "x"}', "unknown='x': expected one of error, replace, skip"),
        ('{"prompt": "a", "seed": -1}', "--seed -1 is out of range"),
        ('{"prompt": "a", "stop": [3]}', "stop=[3]: expected TEXT"),
        ('{"prompt": "a", "ignore_eos": 1}', "ignore_eos=1: expected "),
    ],
)
def test_a_bad_line_is_named(line: str, refusal: str, tmp_path: Path):
    path = tmp_path / "prompts.jsonl"
    path.write_text(f'{{"prompt": "fine"}}\n{line}\n')
    said = message(read_prompts, SampleCommand(), str(path))
    assert said.startswith(f"{path} line 2: {refusal}")


@pytest.mark.parametrize(
    ("argv", "refusal"),
    [
        ("--prompts x --prompt y", "--prompts and --prompt exclude one another"),
        ("--interactive --json", "--interactive and --json exclude one another"),
        ("--interactive --num-samples 2", "draws one answer at a time"),
        ("--logprobs 2", "--logprobs is written with --json"),
        ("--json --logprobs 21", "--logprobs 21 is out of range; give 0 to 20"),
        ("--system x", "--system belongs to a chat"),
        ("--out .", "--out . exists already"),
        ("--stop=", "--stop has an empty text"),
        ("--logit-bias x", "--logit-bias 'x': expected ID=BIAS"),
        ("--logit-bias 3=inf", "--logit-bias '3=inf': expected ID=BIAS"),
        ("--min-p 2", "--min-p 2.0 is out of range"),
        ("--repetition-penalty 0", "--repetition-penalty 0.0 is out of range"),
        ("--seed 4294967295 --num-samples 2", "--seed 4294967295 is out of range"),
    ],
)
def test_flags_that_cannot_be_used(argv: str, refusal: str):
    assert refusal in message(parse_sample, argv.split())
