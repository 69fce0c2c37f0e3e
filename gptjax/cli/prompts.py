"""Where the prompts of `gptjax sample` come from: its arguments, a file, standard input."""

import json
import os
import select
import stat
import sys
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from gptjax.cli.flags import flags_of
from gptjax.errors import UserError, note
from gptjax.runs.files import MAX_JSON, read_bytes, unique_json

C = TypeVar("C")  # a command with a prompt
STDIN = "-"
PATIENCE = 5  # seconds
JSON_LINES = (".jsonl", ".ndjson")
PER_LINE = (  # settings that a line of a JSON lines file may have besides its prompt
    *("system", "unknown", "special_tokens", "max_new_tokens", "num_samples", "temperature"),
    *("top_k", "top_p", "min_p", "repetition_penalty", "logit_bias", "seed", "stop", "ignore_eos"),
)


def read_prompt(prompt: str | None) -> str | None:
    """The prompt itself; the text of `file:PATH` without its byte order mark; for "-" what comes
    from standard input, and for None too if that is a pipe or a file which has something.

    Raises:
        UserError: no such file, not UTF-8, or an empty prompt.
    """
    if prompt is None:
        return (_stdin() or None) if _something_comes() else None
    if prompt == STDIN:
        prompt = _stdin()
    elif prompt.startswith("file:"):
        prompt = _file(Path(prompt.removeprefix("file:")), "prompt file")
    if not prompt:
        raise UserError("the prompt has no characters; give one or more, or leave --prompt out")
    return prompt


def read_prompts(command: C, path: str) -> list[C]:
    """A command for each prompt of a file, with the settings of its line.

    Args:
        command: its settings hold where a line has none.
        path: of a file with a prompt in each line, blank ones left out; *.jsonl has a JSON object
            in each line, {"prompt": text, "temperature": 0.5, ...}; "-": standard input.

    Raises:
        UserError: no such file, not UTF-8, no prompt, or a line that cannot be used.
    """
    text = _stdin() if path == STDIN else _file(Path(path), "prompts file")
    numbered = enumerate(text.replace("\r\n", "\n").split("\n"), start=1)
    lines = [(i, line) for i, line in numbered if line.strip()]
    if not lines:
        raise UserError(f"the prompts file {path} has no prompt; write one in each line")
    if not path.endswith(JSON_LINES):
        return [replace(command, prompt=line) for _, line in lines]  # pyright: ignore
    commands = []
    for i, line in lines:
        try:
            commands.append(_of_json(command, line))
        except UserError as error:
            raise UserError(f"{path} line {i}: {error}") from None
    return commands


def _of_json(command: C, line: str) -> C:
    """The command with the prompt and the settings of a JSON object."""
    try:
        values = unique_json(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"not JSON ({error})") from None
    if not isinstance(values, dict) or not isinstance(values.get("prompt"), str):
        raise UserError('expected {"prompt": text, ...}')
    flags = {flag.path[0]: flag for flag in flags_of(type(command))}
    settings = {}
    for name, value in values.items():
        if name == "prompt":
            continue
        if name not in PER_LINE:
            raise UserError(f"{name!r} is no setting of a line; expected {', '.join(PER_LINE)}")
        flag = flags[name]
        if name == "logit_bias" and isinstance(value, dict):
            value = [f"{token}={bias}" for token, bias in value.items()]
        found = value if flag.many and isinstance(value, list) else [value]
        types = (int, float) if flag.type is float else getattr(flag, "type", str)
        types = str if flag.choices else types
        for x in found:
            if x is None and flag.optional:
                continue
            if not isinstance(x, types) or (isinstance(x, bool) and flag.type is not bool):
                raise UserError(f"{name}={json.dumps(value)[:40]}: expected {flag.metavar}")
            if flag.choices and x not in flag.choices:
                raise UserError(f"{name}={x!r}: expected one of {', '.join(flag.choices)}")
        settings[name] = tuple(found) if flag.many else value
    return replace(command, prompt=values["prompt"], **settings)  # pyright: ignore


def _something_comes() -> bool:
    """Whether standard input is a file, or a pipe in which there is something soon: the pipe of a
    program that started this one may stay open, and empty, for ever."""
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (AttributeError, OSError, ValueError):  # closed, or something else in its place
        return False
    if stat.S_ISREG(mode) or not stat.S_ISFIFO(mode) or os.name == "nt":
        return stat.S_ISREG(mode)
    if select.select([sys.stdin], [], [], PATIENCE)[0]:
        return True
    note(
        f"nothing came from standard input in {PATIENCE} s: this begins without a prompt "
        f"(--prompt - would wait)"
    )
    return False


def _stdin() -> str:
    """All of standard input, without the line end that `echo` puts there."""
    text = _text(sys.stdin.buffer.read(MAX_JSON + 1), "standard input")
    return text.removesuffix("\n").removesuffix("\r")


def _file(path: Path, what: str) -> str:
    try:
        return _text(read_bytes(path), f"{what} {path}")
    except OSError as error:
        raise UserError(f"{what} {path}: {error.strerror}") from None


def _text(content: bytes, what: str) -> str:
    if len(content) > MAX_JSON:
        raise UserError(f"{what} is larger than {MAX_JSON} bytes; give less")
    try:
        text = content.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise UserError(f"{what} is not UTF-8 (byte {error.start})") from None
    if "\0" in text:
        raise UserError(f"{what} has NULs, as in UTF-16; store it as UTF-8")
    return text
