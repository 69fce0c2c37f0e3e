"""Tests of the command lines: what they understand, and one exact line for what they do not."""

import re
import shlex
import subprocess
import sys
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gptjax import cli
from gptjax.cli import SampleCommand, TrainCommand, parse_sample, parse_train, read_prompt
from gptjax.config import Config
from gptjax.errors import LONGEST, UserError, one_line_errors
from gptjax.presets import PRESETS
from gptjax.runs import folders
from gptjax.runs.run import Run
from gptjax.text.tokenizers import CharTokenizer

ROOT = Path(__file__).resolve().parents[1]
PRESET_NAMES = ", ".join(PRESETS)
SEE_TRAIN, SEE_SAMPLE = "; see train.py --help", "; see sample.py --help"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """A working directory without runs/."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def settings_of(*argv: str) -> Config:
    return parse_train(list(argv)).settings


def message_of(read: Any, value: Any) -> str:
    with pytest.raises(UserError) as caught:
        read(value)
    return str(caught.value)


# ---------------------------------------------------------------------------------------------
# train.py


def test_no_arguments_is_the_small_preset():
    assert parse_train([]) == TrainCommand("small", None, False, PRESETS["small"])


@pytest.mark.parametrize("name", PRESETS)
def test_presets(name):
    command = parse_train(["--config", name])
    assert command == TrainCommand(name, None, False, PRESETS[name])
    assert parse_train([f"--config={name}"]) == command


@pytest.mark.parametrize(
    "argv",
    [
        ["--optim.learning-rate", "0.25", "--batch-size", "6"],
        ["--optim.learning_rate", "0.25", "--batch_size", "6"],
        ["--optim.learning-rate=0.25", "--batch_size=6"],
        ["--batch-size=6", "--config", "tiny", "--optim.learning_rate=0.25"],
    ],
)
def test_overrides_in_any_spelling_and_order(argv):
    expected = PRESETS["tiny"]
    expected = replace(expected, batch_size=6, optim=replace(expected.optim, learning_rate=0.25))
    argv = argv if "--config" in argv else ["--config", "tiny", *argv]
    assert settings_of(*argv) == expected


def test_overrides_of_every_kind():
    assert settings_of("--optim.grad-clip", "None").optim.grad_clip is None
    assert settings_of("--optim.grad-clip", "2").optim.grad_clip == 2.0
    assert settings_of("--model.no-bias").model.bias is False
    assert settings_of("--config", "shakespeare", "--model.bias").model.bias is True
    assert settings_of("--model.activation", "relu").model.activation == "relu"
    assert settings_of("--mesh.data", "2").mesh.data == 2
    assert settings_of("--data.text", "my text.txt").data.text == "my text.txt"
    # Only together are these two sound, so they must not be checked one by one.
    model = settings_of("--model.n-head", "3", "--model.n-embd", "48").model
    assert (model.n_head, model.n_embd) == (3, 48)


def test_run_name():
    assert parse_train(["--run", "mine"]).run == "mine"
    assert parse_train(["--run=mine"]).run == "mine"


def test_resume_starts_from_the_runs_own_config(elsewhere):
    config = replace(PRESETS["tiny"], steps=7)
    Run.create(Path("runs/mine"), config, CharTokenizer("ab"))
    command = parse_train(["--run", "mine", "--resume", "--steps", "9"])
    assert command.run == str(Path("runs/mine")) and command.resume
    assert command.settings == replace(config, steps=9)
    assert parse_train(["--resume"]).settings == config


TRAIN_MESSAGES = [
    (
        "--config smal",
        f"unknown preset 'smal'; did you mean small? presets: {PRESET_NAMES}",
    ),
    ("--config zzz", f"unknown preset 'zzz'; presets: {PRESET_NAMES}"),
    (
        "--model.n_layr 3",
        f"Unrecognized options: --model.n_layr, 3 (did you mean --model.n-layer?){SEE_TRAIN}",
    ),
    ("--stepz 4", f"Unrecognized options: --stepz, 4 (did you mean --steps?){SEE_TRAIN}"),
    ("--qqq", f"Unrecognized options: --qqq{SEE_TRAIN}"),
    ("extra", f"Unrecognized options: extra{SEE_TRAIN}"),
    (
        "--model.n-layer x",
        f"--model.n-layer: invalid literal for int() with base 10: 'x'{SEE_TRAIN}",
    ),
    ("--steps 1.5", f"--steps: invalid literal for int() with base 10: '1.5'{SEE_TRAIN}"),
    (
        "--model.dropout abc",
        f"--model.dropout: could not convert string to float: 'abc'{SEE_TRAIN}",
    ),
    (
        "--model.activation swish",
        "invalid choice 'swish' for argument '--model.activation'. Expected one of ('gelu', "
        f"'gelu_erf', 'relu', 'relu2', 'swiglu').{SEE_TRAIN}",
    ),
    (
        "--model.n-head 5",
        "model.n_embd=128 is not divisible by model.n_head=5; change one of them (heads share the "
        f"width equally){SEE_TRAIN}",
    ),
    (
        "--model.n-head",
        f"Missing value for argument '--model.n-head'. Expected 1 values.{SEE_TRAIN}",
    ),
    ("--config", f"Missing value for argument '--config'. Expected 1 values.{SEE_TRAIN}"),
    ("--run", f"Missing value for argument '--run'. Expected 1 values.{SEE_TRAIN}"),
    ("--steps 0", "steps=0 is too small; give 1 or more"),
    (
        "--distributed-wait 0",
        "--distributed-wait 0 is too small; give 1 or more seconds",
    ),
    (
        "--resume --run nope",
        "runs/nope is not a run's folder (it has no config.json); available runs: none",
    ),
    (
        "--resume",
        "there is no run in runs/; train one with python train.py",
    ),
    (
        "--resume --config tiny",
        "there is no run of preset tiny in runs/; train one with python train.py",
    ),
]


@pytest.mark.parametrize(("argv", "message"), TRAIN_MESSAGES, ids=[a for a, _ in TRAIN_MESSAGES])
def test_train_says_what_is_wrong(argv, message):
    assert message_of(parse_train, argv.split()) == message


def test_a_step_is_made_again_by_one_process(elsewhere, monkeypatch):
    monkeypatch.setattr(folders, "find", lambda *args, **kwargs: elsewhere)
    monkeypatch.setattr(cli, "read_config", lambda directory: PRESETS["tiny"])
    assert message_of(parse_train, ["--replay", "3", "--distributed", "auto"]) == (
        "--replay is the work of one process; leave --distributed out"
    )


def test_two_presets_are_not_mixed():
    """The name of the run's folder and its settings must come from the same preset."""
    try:
        command = parse_train(["--config", "small", "--config", "tiny"])
    except UserError:
        return
    assert command.settings == PRESETS[command.config]


def test_a_name_too_long_for_the_disk_is_a_user_error():
    name = "x" * 300
    for action in (
        lambda: parse_train(["--resume", "--run", name]),
        lambda: folders.new_directory(name, "small"),
    ):
        with pytest.raises(UserError):
            action()


# ---------------------------------------------------------------------------------------------
# sample.py


def test_sample_defaults_and_spellings():
    assert parse_sample([]) == SampleCommand()
    expected = SampleCommand(run="mine", max_new_tokens=5, top_k=3, unknown="skip", prompt="--a")
    dashes = ["--run", "mine", "--max-new-tokens", "5", "--top-k", "3", "--unknown", "skip"]
    for argv in (dashes, [word.replace("-n", "_n").replace("top-", "top_") for word in dashes]):
        assert parse_sample([*argv, "--prompt=--a"]) == expected


SAMPLE_MESSAGES = [
    ("--max-new-tokens 0", "--max-new-tokens 0 is too small; give 1 or more"),
    ("--num-samples 0", "--num-samples 0 is too small; give 1 or more"),
    ("--temperature -1", "--temperature -1.0 is out of range; give 0 or more"),
    ("--temperature nan", "--temperature nan is out of range; give 0 or more"),
    ("--temperature inf", "--temperature inf is out of range; give 0 or more"),
    ("--top-k 0", "--top-k 0 is too small; give 1 or more"),
    ("--top-p 0", "--top-p 0.0 is out of range; give 0 < top-p <= 1"),
    ("--top-p 1.5", "--top-p 1.5 is out of range; give 0 < top-p <= 1"),
    ("--seed -1", "--seed -1 is out of range; give 0 <= seed < 2**32"),
    ("--seed 4294967296", "--seed 4294967296 is out of range; give 0 <= seed < 2**32"),
    ("--topk 3", f"Unrecognized options: --topk, 3 (did you mean --top-k?){SEE_SAMPLE}"),
    (
        "--unknown foo",
        "invalid choice 'foo' for argument '--unknown'. Expected one of ('error', 'replace', "
        f"'skip').{SEE_SAMPLE}",
    ),
    ("--prompt", f"Missing value for argument '--prompt'. Expected 1 values.{SEE_SAMPLE}"),
]


@pytest.mark.parametrize(("argv", "message"), SAMPLE_MESSAGES, ids=[a for a, _ in SAMPLE_MESSAGES])
def test_sample_says_what_is_wrong(argv, message):
    assert message_of(parse_sample, argv.split()) == message


def test_prompts(elsewhere):
    Path("start.txt").write_bytes("To be,\r\n\u00e9".encode())
    Path("latin.txt").write_bytes(b"caf\xe9")
    Path("empty.txt").touch()
    assert read_prompt("ROMEO:") == "ROMEO:"
    assert read_prompt("file:start.txt") == "To be,\r\n\u00e9"
    nothing = "the prompt has no characters; give one or more, or leave --prompt out"
    for prompt, message in (
        ("", nothing),
        ("file:empty.txt", nothing),
        ("file:none.txt", "prompt file none.txt: No such file or directory"),
        ("file:.", "prompt file .: Is a directory"),
        ("file:latin.txt", "prompt file latin.txt is not UTF-8 (byte 3)"),
    ):
        assert message_of(read_prompt, prompt) == message


# ---------------------------------------------------------------------------------------------
# The scripts themselves

# Runs a script as its shell line would, then tells on stderr whether jax was imported.
WATCH = """
import runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    print("jax imported:", "jax" in sys.modules, file=sys.stderr)
"""


def run_script(script: str, *argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", WATCH, script, *argv], **spawn_options())


def spawn_options() -> dict[str, Any]:
    return {"capture_output": True, "text": True, "timeout": 60, "cwd": ROOT}


def help_of(script: str, *argv: str) -> str:
    """The help text, frames and line breaks taken out; checks that it came without jax."""
    done = run_script(script, *argv, "--help")
    assert done.returncode == 0
    assert done.stderr == "jax imported: False\n"
    return " ".join(re.sub("[│╭╮╰╯─]", " ", done.stdout).split())


def shown_defaults(config: Any, prefix: str = "") -> dict[str, str]:
    """`{"--model.n-layer": "4"}` for every field of a config."""
    shown = {}
    for f in fields(config):
        value = getattr(config, f.name)
        flag = f"{prefix}{f.name}".replace("_", "-")
        shown |= (
            shown_defaults(value, f"{flag}.")
            if is_dataclass(value)
            else {f"--{flag}": shlex.quote(str(value))}
        )
    return shown


@pytest.mark.parametrize("preset", ["small", "lecture"])
def test_train_help_lists_every_field_and_the_presets_value(preset):
    text = help_of("train.py", "--config", preset)
    for flag, value in shown_defaults(PRESETS[preset]).items():
        # From the flag to the first default after it.
        found = re.search(rf"{re.escape(flag)}[ ,].*?\(default: (.*?)\)", text)
        assert found, flag
        assert found[1] == value, flag
    for name in (*PRESETS, "--config", "--run", "--resume"):
        assert name in text


def test_sample_help_lists_every_field():
    text = help_of("sample.py")
    for flag in SAMPLE_FLAGS:
        assert f"{flag} " in text


def test_help_needs_no_run_to_resume(elsewhere, capsys):
    with pytest.raises(SystemExit) as caught:
        parse_train(["--resume", "--help"])
    assert caught.value.code == 0
    assert "usage: train.py" in capsys.readouterr().out


@pytest.mark.parametrize("script", ["train.py", "sample.py"])
def test_an_unknown_flag_is_one_line_and_exit_2(script):
    done = subprocess.run([sys.executable, script, "--stepz", "4"], **spawn_options())
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith(f"{script}: error: Unrecognized options: --stepz, 4")


def test_ctrl_c_at_any_time_is_one_line(capsys):
    with pytest.raises(SystemExit) as caught, one_line_errors("train.py"):
        raise KeyboardInterrupt
    assert caught.value.code == 130
    assert capsys.readouterr().err == "train.py: interrupted\n"


def test_a_message_is_one_line_that_ends_and_paints_nothing():
    assert str(UserError("red \x1b[31m\nand\u2028more: é 文")) == (
        "red \\x1b[31m\\nand\\u2028more: é 文"
    )
    assert str(UserError("x" * 10**6)) == "x" * LONGEST + "..."


FLAGS = [*shown_defaults(Config()), "--config", "--run", "--resume", "--help", "-h"]
SAMPLE_FLAGS = [*shown_defaults(SampleCommand())]
# What an operating system can pass: no NUL and no lone surrogates.
any_word = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=8)
values = st.sampled_from(
    [
        "",
        "-",
        "--",
        "1",
        "-1",
        "0.5",
        "1e999",
        "nan",
        "None",
        "True",
        "x",
        "tiny",
        "=",
        "~",
        "9" * 5000,
    ]
)
words = st.one_of(
    st.sampled_from(FLAGS + SAMPLE_FLAGS),
    values,
    any_word,
    st.builds("{}={}".format, st.sampled_from(FLAGS + SAMPLE_FLAGS), values),
)


@pytest.mark.parametrize(
    ("parse", "kind"), [(parse_train, TrainCommand), (parse_sample, SampleCommand)]
)
@given(argv=st.lists(words, max_size=5))
@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_words_give_a_command_or_a_user_error(parse, kind, argv):
    try:
        assert isinstance(parse(argv), kind)
    except UserError as error:
        assert len(str(error).splitlines()) == 1
    except SystemExit as leave:
        assert leave.code == 0 and ("-h" in argv or "--help" in argv)


# ---------------------------------------------------------------------------------------------
# Starting from weights


def test_init_starts_from_the_preset_for_it():
    config = parse_train(["--init", "gpt2-xl", "--model.block-size", "256"]).settings
    assert config == replace(
        PRESETS["finetune"],
        init="gpt2-xl",
        model=replace(PRESETS["finetune"].model, block_size=256),
    )
    assert parse_train(["--config", "finetune-shakespeare"]).settings.init == "gpt2"
    small = parse_train(["--config", "small", "--init=runs/other"])
    assert small.settings == replace(PRESETS["small"], init="runs/other")


def test_the_model_of_loaded_weights_cannot_be_changed():
    with pytest.raises(UserError) as error:
        parse_train(["--init", "gpt2", "--model.n-layer", "3"])
    assert str(error.value) == (
        "--model.n-layer cannot be set with --init, for the model comes with its weights; what can "
        "be set of it: block_size, dropout, attn_dropout, attention, dtype, remat, remat_saves"
    )
