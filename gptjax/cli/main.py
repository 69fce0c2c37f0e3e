"""The command `gptjax`: its subcommands, each in the module of its name."""

import difflib
import sys
from collections.abc import Sequence
from importlib import import_module

from gptjax import __version__
from gptjax.cli import streams
from gptjax.errors import UserError, one_line_errors

COMMANDS = {
    "train": "Train a GPT on a text, or resume a run.",
    "sample": "Generate text from a run.",
    "score": "Measure how well a run, or each of two, predicts a text, token by token.",
    "serve": "Serve runs over HTTP: OpenAI's completions, and a page in the browser.",
    "import": "Make a run of a pretrained model: GPT-2, Llama, GGUF, nanoGPT.",
    "export": "Write a run as a folder that transformers loads.",
    "runs": "List runs: how far each is, its size and its loss.",
    "diff": "Compare two runs: settings, data, environment, losses.",
    "track": "Write a run into TensorBoard, W&B, Trackio or MLflow.",
    "plot": "Draw loss curves of runs; of one, attention, losses of tokens, embeddings.",
    "verify": "Check that a run's files are intact and that its losses can be measured again.",
    "replay": "Recompute one step of a run and show its loss, gradient and batch.",
    "plan": "Estimate memory, time and network traffic of a run on TPUs or GPUs.",
    "meshes": "Compare meshes of simulated devices: what each device stores and sends.",
    "ladder": "Train the stages of the lecture and compare their losses with its figures.",
    "notes": "Demonstrate the lecture's six notes on attention with numbers.",
    "presets": "List the presets.",
    "completion": "Print a completion script for bash, zsh or fish.",
}


def usage() -> str:
    """The text of `gptjax --help`."""
    listed = "\n".join(f"  {name:<12}{sentence}" for name, sentence in COMMANDS.items())
    return (
        "usage: gptjax COMMAND [arguments]\n\n"
        "Train, sample and inspect small GPTs in JAX.\n\n"
        f"commands:\n{listed}\n\n"
        "options:\n"
        "  -h, --help  Print this help, or after a command that command's.\n"
        "  --version   Print the version."
    )


def module_name(command: str) -> str:
    """The module of a command; `import` is a keyword."""
    return f"gptjax.cli.{'import_' if command == 'import' else command}"


def run(name: str, argv: Sequence[str], prog: str) -> None:
    """Run a command; a `UserError` becomes one line on stderr and exit code 2.

    Args:
        name: one of `COMMANDS`.
        argv: the words after it.
        prog: the command as typed, which begins the line of an error.
    """
    streams.prepare()
    with one_line_errors(prog):
        import_module(module_name(name)).main(list(argv), prog)


def main(argv: Sequence[str] | None = None) -> None:
    """The console script. `argv`: the words after `gptjax`; None: those of the process."""
    words = sys.argv[1:] if argv is None else list(argv)
    match words:
        case ["help", name, *_] if name in COMMANDS:
            run(name, ["--help"], f"gptjax {name}")
        case [name, *rest] if name in COMMANDS:
            run(name, rest, f"gptjax {name}")
        case _:
            streams.prepare()
            with one_line_errors("gptjax"):
                _answer(words)


def _answer(words: list[str]) -> None:
    """What `gptjax` says without a command of its own.

    Raises:
        UserError: an unknown command.
    """
    match words:
        case [] | ["-h" | "--help" | "help"]:
            print(usage())
        case ["-V" | "--version"]:
            print(f"gptjax {__version__}")
        case [name, *_]:
            close = difflib.get_close_matches(name, COMMANDS, n=1)
            hint = f"did you mean {close[0]}? " if close else ""
            raise UserError(f"unknown command {name!r}; {hint}commands: {', '.join(COMMANDS)}")
