"""Tests of `gptjax sample`: where prompts come from, what is printed and written, conversations."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from chat_helpers import CHATML, special_tokenizer
from run_helpers import message

from gptjax.assembly import assemble
from gptjax.cli import draw, prompts
from gptjax.cli.main import run as run_command
from gptjax.cli.prompts import read_prompt, read_prompts
from gptjax.cli.sample import SampleCommand, parse_sample
from gptjax.config import Config, ModelConfig
from gptjax.generation.chat import ChatFormat, ChatTemplate
from gptjax.generation.engine import Engine
from gptjax.runs.checkpoint import Checkpoints
from gptjax.runs.run import Run
from gptjax.text.tokenizers import CharTokenizer, Tokenizer

VOCABULARY = "\n abcdefghijklmnopqrstuvwxyz"
S = 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the run of a random model, whose text is random letters."""
    place = tmp_path_factory.mktemp("sample")
    make_run(place / "runs" / "it", CharTokenizer(VOCABULARY, len(VOCABULARY)), S)
    return place


@pytest.fixture(scope="module")
def chatty(folder: Path) -> ChatTemplate:
    """The chat template of one more run there, `chatty`, whose text is random bytes."""
    pytest.importorskip("minijinja", reason="needs the extra chat")
    tokenizer = special_tokenizer()
    form = ChatFormat(CHATML, {}, (tokenizer.token_id("<|im_end|>"),))  # pyright: ignore
    make_run(folder / "runs" / "chatty", tokenizer, 128, form.to_json())
    return ChatTemplate(CHATML, {}, tokenizer)


def make_run(directory: Path, tokenizer: Tokenizer, window: int, chat: str | None = None) -> None:
    """Write a run that was stopped before its first step."""
    config = Config(model=ModelConfig(n_layer=1, n_head=1, n_embd=8, block_size=window))
    run = Run.create(directory, config, tokenizer, chat=chat)
    checkpoints = Checkpoints(run.checkpoints_path)
    state = assemble(config, tokenizer.vocab_size).start()
    record = {"step": 0, "seconds": 0.0}
    checkpoints.save(0, state, record, run.texts)
    checkpoints.finish_save()
    run.log([record])


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
    ],
)
def test_flags_that_cannot_be_used(argv: str, refusal: str):
    assert refusal in message(parse_sample, argv.split())


# ---------------------------------------------------------------------------------------------
# What is printed and written


def test_one_sample_and_several(here: Path, capsys: Any):
    alone = sample(capsys, "--prompt", "to be", "--max-new-tokens", "40", "--ignore-eos")
    several = sample(
        capsys,
        *("--prompt", "to be", "--max-new-tokens", "40", "--ignore-eos", "--num-samples", "3"),
    )
    parts = re.split(r"--- (\d) of 3\n", several)
    assert parts[0] == "" and parts[1::2] == ["1", "2", "3"]
    assert parts[2] == alone  # what it is alone
    assert len(set(parts[2::2])) == 3


def test_samples_of_several_prompts(here: Path, capsys: Any):
    long = "a" * 60
    (here / "p.jsonl").write_text(
        f'{{"prompt": "to\\nbe", "num_samples": 2}}\n{{"prompt": "{long}", "temperature": 0}}\n'
    )
    out = sample(capsys, "--prompts", "p.jsonl", "--max-new-tokens", "5")
    headings = [line for line in out.splitlines() if line.startswith("---")]
    assert headings == [
        "--- 1 of 3: to be",
        "--- 2 of 3: to be",
        f"--- 3 of 3: {'a' * 37}...",
    ]


def test_pieces_are_shown_one_sample_after_the_other():
    from gptjax.generation.requests import Piece

    samples = [draw.Sample(SampleCommand(), 1, None) for _ in range(3)]  # pyright: ignore
    steps = [
        {0: Piece("a", (), None), 1: Piece("x", (), "stop")},
        {0: Piece("b", (), None), 2: Piece("u", (), None)},
        {0: Piece("c", (), "length"), 2: Piece("v", (), None)},
        {2: Piece("w", (), "stop")},
    ]
    shown = [
        (samples.index(sample), piece.text) for sample, piece in draw.in_order(samples, iter(steps))
    ]
    assert shown == [(0, "a"), (0, "b"), (0, "c"), (1, "x"), (2, "u"), (2, "v"), (2, "w")]


def test_json_lines(here: Path, capsys: Any):
    argv = ["--prompt", "to be", "--max-new-tokens", "9", "--num-samples", "2", "--ignore-eos"]
    lines = sample(capsys, *argv, "--json", "--logprobs", "2").splitlines()
    found = [json.loads(line) for line in lines]
    tokenizer = CharTokenizer(VOCABULARY, len(VOCABULARY))
    for i, one in enumerate(found, start=1):
        assert (one["prompt"], one["sample"], one["seed"]) == ("to be", i, 1337)
        assert tokenizer.decode(one["tokens"]) == one["text"] and one["finish"] == "length"
        assert [token["id"] for token in one["logprobs"]] == one["tokens"]
        assert "".join(token["text"] for token in one["logprobs"]) == one["text"]
        for token in one["logprobs"]:
            likely = token["alternatives"]
            assert len(likely) == 2 and likely[0]["logprob"] >= likely[1]["logprob"]
            assert token["logprob"] <= likely[0]["logprob"] < 0
    assert "logprobs" not in json.loads(sample(capsys, *argv, "--json").splitlines()[0])


def test_a_sample_ends_at_a_stop_text_and_at_the_end_of_text(here: Path, capsys: Any):
    end = f"{len(VOCABULARY)}=100"
    assert sample(capsys, "--logit-bias", end) == "\n"
    argv = ["--prompt", "a", "--logit-bias", end, "--max-new-tokens", "2", "--ignore-eos"]
    assert sample(capsys, *argv) == "<|endoftext|>" * 2 + "\n"
    argv = ["--prompt", "a", "--logit-bias", "2=100", "--max-new-tokens", "5", "--json"]
    assert json.loads(sample(capsys, *argv, "--stop", "x", "aa"))["text"] == ""
    assert json.loads(sample(capsys, *argv))["text"] == "aaaaa"


def test_a_prompt_longer_than_the_context_is_said_so(here: Path, capsys: Any):
    argv = ["--run", "it", "--max-new-tokens", "3", "--temperature", "0", "--prompt"]
    texts = []
    for prompt in ("q" * 9 + "abcdefghijklmnop", "abcdefghijklmnop"):
        run_command("sample", [*argv, prompt], "gptjax sample")
        printed = capsys.readouterr()
        texts.append(printed.out)
        said = (
            "the prompt has 25 tokens and the model's context holds 16: only the last 16 are read"
        )
        assert (said in printed.err) == (prompt[0] == "q")
    assert texts[0] == texts[1]


def test_out_is_a_new_file(here: Path, capsys: Any):
    argv = ["--prompt", "a", "--max-new-tokens", "5", "--num-samples", "2", "--out", "s.txt"]
    assert sample(capsys, *argv) == ""
    assert re.fullmatch(r"--- 1 of 2\n.*\n--- 2 of 2\n.*\n", (here / "s.txt").read_text(), re.S)
    assert "--out s.txt exists already" in message(parse_sample, argv)
    assert sorted(path.name for path in here.iterdir()) == ["runs", "s.txt"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_loses_nothing_of_what_was_drawn(
    number: int, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
):
    press_at(1, number, monkeypatch)
    argv = ["--run", "it", "--prompt", "a", "--json", "--out", "s.jsonl", "--num-samples", "2"]
    with pytest.raises(SystemExit) as caught:
        run_command("sample", [*argv, "--ignore-eos"], "gptjax sample")
    assert caught.value.code == 130
    lines = [json.loads(line) for line in (here / "s.jsonl").read_text().splitlines()]
    assert all(len(line["tokens"]) > 1 and line["finish"] is None for line in lines)
    assert len(lines) == 2
    assert "0 of 2 samples are whole, written to s.jsonl" in capsys.readouterr().err


def press_at(at: int, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Send this process a signal at an engine's step, counted from 0."""
    step, count = Engine.step, iter(range(1000))

    def press(self: Engine, *arguments: Any) -> Any:
        if next(count) == at:
            os.kill(os.getpid(), number)
        return step(self, *arguments)

    monkeypatch.setattr(Engine, "step", press)


@pytest.mark.parametrize(
    ("arguments", "code", "out", "error"),
    [
        ("--prompt é", 2, "", "gptjax sample: error: 1 unknown characters ('\\xe9' at 0)"),
        ("--json >/dev/full", 2, "", "gptjax sample: error: the output cannot be written (No sp"),
        ("--prompt a --max-new-tokens 5000 --ignore-eos | head -c 3", 0, "{{{", ""),
    ],
)
def test_any_output(arguments: str, code: int, out: str, error: str, here: Path):
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    command = f"{sys.executable} -m gptjax sample --run it --logit-bias 3=9 {arguments}"
    done = subprocess.run(
        command,
        shell=True,
        capture_output=True,
        env=environment,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    assert (done.returncode, done.stderr[: len(error)]) == (code, error), done.stderr
    assert done.stdout == out.replace("{", "b")
    assert "Traceback" not in done.stderr


# ---------------------------------------------------------------------------------------------
# Conversations


def converse(capsys: Any, pipe: Any, said: str, *argv: str) -> tuple[str, str]:
    """What is printed on stdout and on stderr."""
    pipe(said.encode())
    run_command("sample", ["--interactive", "--run", "it", *argv], "gptjax sample")
    printed = capsys.readouterr()
    return printed.out, printed.err


def test_a_text_by_turns(here: Path, capsys: Any, pipe: Any):
    argv = ["--max-new-tokens", "4", "--ignore-eos", "--temperature", "0"]
    out, error = converse(capsys, pipe, "to be\n\n/reset\nto be\n", *argv)
    first, second, third = out.splitlines()
    assert first == third and error.count("[4 tokens; --max-new-tokens allows more]") == 3
    whole = sample(capsys, "--prompt", f"to be{first}", *argv)
    assert f"{second}\n" == whole  # an empty line continues
    out, error = converse(capsys, pipe, "a\\\nb\n", *argv)
    assert out == sample(capsys, "--prompt", "a\nb", *argv)


def test_a_conversation_survives_what_cannot_be_said(here: Path, capsys: Any, pipe: Any):
    said = "é\n/nothing\n/system x\n/help\nto be\n"
    out, error = converse(capsys, pipe, said, "--max-new-tokens", "2", "--logit-bias", "3=100")
    assert out == "bb\n"
    for line in (
        "error: 1 unknown characters ('é' at 0)",
        "error: unknown command '/nothing'; /help lists the commands",
        "error: there is no system message: this model has no chat template",
        "/reset          forget everything",
    ):
        assert line in error
    for argv in (["--interactive", "--system", "x"], ["--interactive", "--chat"], ["--chat"]):
        with pytest.raises(SystemExit) as caught:
            run_command("sample", ["--run", "it", *argv], "gptjax sample")
        assert caught.value.code == 2
        assert "has no chat template" in capsys.readouterr().err


def test_ctrl_c_ends_the_answer_only(
    here: Path, capsys: Any, pipe: Any, monkeypatch: pytest.MonkeyPatch
):
    before = signal.getsignal(signal.SIGINT)  # a shell may start a job with this signal ignored
    press_at(2, signal.SIGINT, monkeypatch)  # the first step is before any message
    argv = ["--max-new-tokens", "48", "--ignore-eos", "--logit-bias", "3=100"]
    out, _ = converse(capsys, pipe, "a\na\n", *argv)
    stopped, whole = map(len, out.splitlines())
    assert 0 < stopped < whole == 48
    assert signal.getsignal(signal.SIGINT) is before


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The prompts that engines get from here on."""
    prompts, add = [], Engine.add

    def note(self: Engine, request: Any) -> int:
        prompts.append(request.prompt.tolist())
        return add(self, request)

    monkeypatch.setattr(Engine, "add", note)
    return prompts


def test_a_chat(chatty: ChatTemplate, here: Path, capsys: Any, pipe: Any, asked: list[list[int]]):
    x = int(chatty.tokenizer.encode("x")[0])
    argv = ["--run", "chatty", "--max-new-tokens", "3", "--logit-bias", f"{x}=100"]
    out, _ = converse(capsys, pipe, "Hi\n\n//y\n/system Be\nHi\n/reset\nHi\n", *argv)
    assert out == "xxx\n" * 4
    user = lambda text: {"role": "user", "content": text}
    system = {"role": "system", "content": "Be"}
    first = [user("Hi"), {"role": "assistant", "content": "xxx"}, user("/y")]
    expected = [[user("Hi")], first, [system, user("Hi")], [system, user("Hi")]]
    assert asked[1:] == [chatty.encode(messages).tolist() for messages in expected]
    # One message through the template; an answer ends with the model's own token.
    end = int(chatty.tokenizer.token_id("<|im_end|>"))  # pyright: ignore
    argv = ["--run", "chatty", "--chat", "--prompt", "Hi", "--system", "Be"]
    assert sample(capsys, *argv, "--logit-bias", f"{end}=100") == "\n"
    assert asked[-1] == asked[-2]


def test_a_chat_longer_than_the_context(
    chatty: ChatTemplate, here: Path, capsys: Any, pipe: Any, asked: list[list[int]]
):
    x = int(chatty.tokenizer.encode("x")[0])
    argv = ["--run", "chatty", "--max-new-tokens", "3", "--logit-bias", f"{x}=100"]
    said = "".join(f"{letter * 20}\n" for letter in "abcd") + "e" * 200 + "\nf\n"
    out, error = converse(capsys, pipe, f"/system B\n{said}", *argv)
    assert out == "xxx\n" * 5
    assert error.count("oldest messages are no longer read]") == 1
    assert "error: this message has 2" in error and "has room for 125" in error
    assert all(len(ids) <= 125 for ids in asked)
    texts = [chatty.tokenizer.decode(ids) for ids in asked[1:]]
    assert all("system\nB<" in text for text in texts)
    assert "aaa" in texts[1] and "aaa" not in texts[-1] and "ddd" in texts[-1]
