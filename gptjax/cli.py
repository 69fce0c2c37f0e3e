"""The command lines of `train.py` and `sample.py`: typed, and quick (nothing here imports jax).

tyro makes the flags from the dataclasses; what it reports about a bad one becomes one line.
"""

import contextlib
import difflib
import io
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, TypeVar

import tyro

from gptjax.config import OF_A_LOADED_MODEL, Config, MeshConfig, differences
from gptjax.errors import UserError
from gptjax.presets import PRESETS
from gptjax.runs import folders
from gptjax.runs.run import read_config
from gptjax.text.tokenizers import Unknown

T = TypeVar("T")


@dataclass(frozen=True)
class TrainCommand:
    """Train a GPT on a text. Any field of the preset can be set."""

    config: str
    """Preset to start from."""
    run: str | None
    """Name of the run's folder in runs/ (None: made from the preset)."""
    resume: Annotated[bool, tyro.conf.FlagCreatePairsOff]
    """Continue that run, or the newest, from its last checkpoint."""
    settings: Annotated[Config, tyro.conf.arg(name="")]
    replay: int | None = None
    """Make that step of a run again and show its loss, gradient and batch; nothing is written."""
    plan: str | None = None
    """Train nothing: tell what this run would take on v5e:4x4, h100:8, ... or here: memory, time,
    what limits it; where it does not fit, what does."""
    profile: bool = False
    """Trace a few steps into the run's folder profile/, for XProf or TensorBoard."""
    distributed: str | None = None
    """This process is one of several: auto, as SLURM, Open MPI, Kubernetes or a TPU pod say; or
    I/N@HOST:PORT, its number from 0, of how many, and where process 0 can be reached."""
    distributed_wait: int = 300
    """Seconds in which all of them must have come."""

    def directory(self) -> Path:
        """The folder to work in: the run's when resuming, else a new one.

        Raises:
            UserError: the folder of a new run holds something already.
        """
        if self.resume or self.replay is not None:
            return folders.find(self.run, like=self.config)
        return folders.new_directory(self.run, self.config)


@dataclass(frozen=True)
class SampleCommand:
    """Let a trained run speak. The run's folder is all it needs."""

    run: str | None = None
    """Name in runs/, or path of a run's folder (default: the newest)."""
    checkpoint: str = "best"
    """best (by validation loss), last, or a step."""
    prompt: str = "\n"
    """Text to go on from, or file:PATH."""
    unknown: Unknown = "error"
    """What to do with characters of the prompt that the tokenizer lacks."""
    max_new_tokens: int = 500
    """Length of each sample."""
    num_samples: int = 1
    """Samples, drawn side by side."""
    temperature: float = 0.8
    """Below 1 is safer, above 1 wilder; 0 takes the likeliest token each time."""
    top_k: int | None = None
    """Draw from the k likeliest tokens only."""
    top_p: float | None = None
    """Draw from the fewest tokens that hold this much probability."""
    seed: int = 1337
    """The same seed, prompt and settings give the same text."""
    mesh: MeshConfig = field(default_factory=lambda: MeshConfig(data=1))


def parse_train(argv: list[str]) -> TrainCommand:
    """Read `train.py`'s arguments; the defaults are the preset's or, resuming, the run's own.

    Raises:
        UserError: an unknown preset, flag or value, or no run to resume.
    """
    preset, name = _peek(argv, "--config"), _peek(argv, "--run")
    if preset is not None and preset not in PRESETS:
        close = difflib.get_close_matches(preset, PRESETS, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise UserError(f"unknown preset {preset!r}; {hint}presets: {', '.join(PRESETS)}")
    old = "--resume" in argv or _peek(argv, "--replay") is not None
    if old and not _wants_help(argv):
        directory = folders.find(name, like=preset)
        settings, name = read_config(directory), str(directory)
        argv = _without(argv, "--run")
    else:
        preset = preset or ("small" if _peek(argv, "--init") is None else "finetune")
        settings = PRESETS[preset]
    default = TrainCommand(preset or "small", name, False, settings)
    command = parse(TrainCommand, default, argv, "train.py", f"presets: {', '.join(PRESETS)}")
    if command.settings.init is not None and not old:
        changed = differences(settings.model, command.settings.model)
        if fixed := [field for field in changed if field not in OF_A_LOADED_MODEL]:
            flag = f"--model.{fixed[0].replace('_', '-')}"
            raise UserError(
                f"{flag} cannot be set with --init, for the model comes with its weights; what "
                f"can be set of it: {', '.join(OF_A_LOADED_MODEL)}"
            )
    if command.replay is not None and command.distributed is not None:
        raise UserError("--replay is the work of one process; leave --distributed out")
    if command.distributed_wait < 1:
        raise UserError(
            f"--distributed-wait {command.distributed_wait} is too small; give 1 or more seconds"
        )
    return command


def parse_sample(argv: list[str]) -> SampleCommand:
    """Read `sample.py`'s arguments.

    Raises:
        UserError: an unknown flag or a bad value.
    """
    command = parse(SampleCommand, SampleCommand(), argv, "sample.py", "")
    for name in ("max_new_tokens", "num_samples"):
        if (value := getattr(command, name)) < 1:
            raise UserError(f"--{name.replace('_', '-')} {value} is too small; give 1 or more")
    if not 0 <= command.temperature < float("inf"):
        raise UserError(f"--temperature {command.temperature} is out of range; give 0 or more")
    if command.top_k is not None and command.top_k < 1:
        raise UserError(f"--top-k {command.top_k} is too small; give 1 or more")
    if command.top_p is not None and not 0 < command.top_p <= 1:
        raise UserError(f"--top-p {command.top_p} is out of range; give 0 < top-p <= 1")
    if not 0 <= command.seed < 2**32:
        raise UserError(f"--seed {command.seed} is out of range; give 0 <= seed < 2**32")
    return command


def read_prompt(prompt: str) -> str:
    """The prompt itself, or the text of `file:PATH`.

    Raises:
        UserError: no such file, or not UTF-8, or nothing in it.
    """
    if prompt.startswith("file:"):
        path = Path(prompt.removeprefix("file:"))
        try:
            prompt = path.read_bytes().decode("utf-8")
        except OSError as error:
            raise UserError(f"prompt file {path}: {error.strerror}") from None
        except UnicodeDecodeError as error:
            raise UserError(f"prompt file {path} is not UTF-8 (byte {error.start})") from None
    if not prompt:
        raise UserError("the prompt has no characters; give one or more, or leave --prompt out")
    return prompt


def _wants_help(argv: list[str]) -> bool:
    return "-h" in argv or "--help" in argv


def _peek(argv: list[str], flag: str) -> str | None:
    """The value of `--flag VALUE` or `--flag=VALUE`, the last one as tyro takes it."""
    value = None
    for i, word in enumerate(argv):
        if word == flag and i + 1 < len(argv):
            value = argv[i + 1]
        elif word.startswith(flag + "="):
            value = word.removeprefix(flag + "=")
    return value


def _without(argv: list[str], flag: str) -> list[str]:
    """`argv` without `--flag VALUE` and `--flag=VALUE`."""
    kept: list[str] = []
    words = iter(argv)
    for word in words:
        if word == flag:
            next(words, None)
        elif not word.startswith(flag + "="):
            kept.append(word)
    return kept


def parse(cls: type[T], default: T, argv: list[str], prog: str, description: str) -> T:
    """Read arguments into a dataclass; its docstring and its fields' are the help.

    Raises:
        UserError: what tyro found wrong, on one line.
    """
    text = f"{(cls.__doc__ or '').strip()} {description}".strip()
    if _wants_help(argv):
        return tyro.cli(cls, default=default, args=["--help"], prog=prog, description=text)
    printed, columns = io.StringIO(), os.environ.get("COLUMNS")
    try:
        os.environ["COLUMNS"] = "2000"  # so that no message is wrapped
        with contextlib.redirect_stderr(printed):
            return tyro.cli(cls, default=default, args=argv, prog=prog, description=text)
    except SystemExit:
        raise UserError(f"{_first_message(printed.getvalue())}; see {prog} --help") from None
    finally:
        del os.environ["COLUMNS"]
        if columns is not None:
            os.environ["COLUMNS"] = columns


def _first_message(box: str) -> str:
    """The message of a tyro error box, and its first suggestion, on one line."""
    lines = [line.strip("│╭╮╰╯─ ") for line in box.splitlines()[1:]]
    message = lines[0] if lines else "bad arguments"
    for noise in ("Error parsing settings.", "Error parsing "):
        if message.startswith(noise):
            _, _, rest = message.removeprefix(noise).partition(": ")
            message = rest if noise == "Error parsing settings." else message.removeprefix(noise)
            break
    for i, line in enumerate(lines[:-1]):
        if line.startswith("Perhaps you meant"):
            return f"{message} (did you mean {lines[i + 1].split()[0].rstrip(',')}?)"
    return message
