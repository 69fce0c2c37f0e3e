"""Command-line flags from a dataclass, which checks their values; argparse formats the help.

A field is a flag, and the string below it is its help text. The fields of a nested dataclass are
`--section.field`. Field metadata say otherwise: `POSITIONAL`; `INLINE`, a nested dataclass whose
fields have no section of their own; `HIDDEN`, a field without a flag.
"""

import argparse
import ast
import dataclasses
import functools
import inspect
import itertools
import re
import textwrap
import types
import typing
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from gptjax.cli import names
from gptjax.errors import UserError

T = TypeVar("T")
SWITCH = {"true": True, "false": False}  # values of a bool that is given one
POSITIONAL, INLINE, HIDDEN = ({"cli": role} for role in ("positional", "inline", "hidden"))


@dataclass(frozen=True)
class Flag:
    """A flag or a positional argument."""

    name: str
    """As typed, `--optim.learning-rate`; a positional argument's is in capitals."""
    path: tuple[str, ...]
    """Attributes that lead from the command to the field."""
    owner: type
    """The dataclass that has the field."""
    type: Any
    """int, float, str, bool, Path or a Literal of strings."""
    optional: bool
    """Whether None is a value."""
    many: bool
    """Whether the field is a tuple of such values."""
    default: Any
    """MISSING if the flag must be given."""

    @property
    def positional(self) -> bool:
        return not self.name.startswith("-")

    @property
    def section(self) -> str:
        """`optim` of `--optim.learning-rate`; empty at the top level."""
        return self.name[2:].rpartition(".")[0]

    @property
    def negative(self) -> str:
        """The flag that switches a bool off, `--model.no-bias`."""
        start, dot, leaf = self.name[2:].rpartition(".")
        return f"--{start}{dot}no-{leaf}"

    @property
    def choices(self) -> tuple[str, ...]:
        return typing.get_args(self.type) if typing.get_origin(self.type) is Literal else ()

    @property
    def metavar(self) -> str:
        """What stands for a value in `--help`."""
        if self.choices:
            return "{" + ",".join(self.choices) + "}"
        return {int: "INT", float: "FLOAT", Path: "PATH"}.get(self.type, "TEXT")

    def convert(self, text: str) -> Any:
        """The value that `text` stands for.

        Raises:
            UserError: it stands for none.
        """
        if self.optional and text == "None":
            return None
        try:
            if self.type is int:
                return _integer(text)
            if not self.choices:
                return self.type(text)
            if text in self.choices:
                return text
        except ValueError:
            pass
        article = {int: "an integer", float: "a number"}.get(self.type, "a value")
        wanted = f"one of {', '.join(self.choices)}" if self.choices else article
        wanted += " or None" if self.optional else ""
        raise UserError(f"{self.name}: expected {wanted}, got {text[:100]!r}")


def _integer(text: str) -> int:
    """An integer, also as `1_000` or `1e3`; floats hold integers exactly up to 2**53."""
    try:
        return int(text)
    except ValueError:
        number = float(text)
        if not number.is_integer() or abs(number) > 2**53:
            raise
        return int(number)


def flags_of(cls: type, default: Any = None, prefix: str = "--") -> Iterator[Flag]:
    """The flags of a dataclass, in the order of its fields.

    Args:
        cls: the dataclass.
        default: an instance; its nested dataclasses may be subclasses. None: the class's defaults.
        prefix: of the names.
    """
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        role, value, kind = field.metadata.get("cli"), field.default, hints[field.name]
        if default is not None:
            value = getattr(default, field.name)
        elif field.default_factory is not MISSING:
            value = field.default_factory()
        name = f"{prefix}{field.name}".replace("_", "-")
        if role == "hidden":
            continue
        if is_dataclass(value):
            for flag in flags_of(type(value), value, prefix if role == "inline" else f"{name}."):
                yield dataclasses.replace(flag, path=(field.name, *flag.path))
            continue
        union = typing.get_origin(kind) in (types.UnionType, typing.Union)
        parts = typing.get_args(kind) if union else (kind,)
        [kind] = [part for part in parts if part is not types.NoneType]
        if many := typing.get_origin(kind) is tuple:
            kind = typing.get_args(kind)[0]
        if role == "positional":
            name = field.name.upper()
        yield Flag(name, (field.name,), cls, kind, len(parts) > 1, many, value)


def parse(cls: type[T], default: T | None, argv: Sequence[str], prog: str, about: str = "") -> T:
    """Read arguments into a dataclass.

    Args:
        cls: the dataclass.
        default: what holds where a flag is not given; None: the class's own defaults.
        argv: the words after the command.
        prog: the command as typed, for messages.
        about: what `--help` says besides the docstrings.

    Raises:
        UserError: an unknown flag or a bad value.
        SystemExit: after `--help`.
    """
    flags = {flag.name: flag for flag in flags_of(cls, default)}
    if wants_help(argv):
        print(help_text(flags, prog, f"{inspect.cleandoc(cls.__doc__ or '')} {about}"), end="")
        raise SystemExit(0)
    try:
        given = read(argv, flags)
    except UserError as error:
        raise UserError(f"{error}; see {prog} --help") from None
    return _build(cls, default, given)


def given(cls: type, default: Any, argv: Sequence[str]) -> dict[str, Any]:
    """The values of the settings (the fields of an `INLINE` dataclass) that the arguments give, by
    their names: {"optim.accumulate": 4}; nothing where `parse` will refuse."""
    try:
        found = read(argv, {flag.name: flag for flag in flags_of(cls, default)})
    except UserError:
        return {}
    return {".".join(path[1:]): value for path, value in found.items() if len(path) > 1}


def read(argv: Sequence[str], flags: dict[str, Flag]) -> dict[tuple[str, ...], Any]:
    """The values given for flags and positional arguments, by path; the last one holds.

    Raises:
        UserError: an unknown flag, a bad value, or none where one is needed.
    """
    given: dict[tuple[str, ...], Any] = {}
    positional = [flag for flag in flags.values() if flag.positional]
    words = deque(argv)
    while words:
        word = words.popleft()
        if not _is_flag(word) and not re.fullmatch("-[A-Za-z]", word):
            if not positional:
                hint = f"; is it --config {word}?" if "--config" in flags else ""
                raise UserError(f"unexpected {word!r}{hint}")
            flag = positional[0] if positional[0].many else positional.pop(0)
            value = flag.convert(word)
            given[flag.path] = (*given.get(flag.path, ()), value) if flag.many else value
            continue
        typed, equals, text = word.partition("=")
        flag, on = names.resolve(typed, flags)
        if flag.type is bool:
            if not equals:
                text = words.popleft() if words and words[0].lower() in SWITCH else "true"
            if text.lower() not in SWITCH:
                raise UserError(f"{flag.name} is on or off: give it alone, or {flag.negative}")
            given[flag.path] = SWITCH[text.lower()] is on
        elif flag.many:
            texts = [text] if equals else []
            while not equals and words and not _is_flag(words[0]):
                texts.append(words.popleft())
            none = flag.optional and texts == ["None"]
            given[flag.path] = None if none else tuple(map(flag.convert, texts))
        else:
            if not equals and (not words or _is_flag(words[0])):
                hint = f"{flag.name}=VALUE also takes one that begins with --"
                raise UserError(f"{flag.name} needs a value ({hint})")
            given[flag.path] = flag.convert(text if equals else words.popleft())
    missing = [f.name for f in flags.values() if f.default is MISSING and f.path not in given]
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        raise UserError(f"{' and '.join(missing)} {verb} missing")
    return given


def _is_flag(word: str) -> bool:
    return re.fullmatch(r"--[^\s=]+(=.*)?", word, re.DOTALL) is not None


def _build(cls: type[T], default: T | None, given: dict[tuple[str, ...], Any]) -> T:
    """The dataclass with what was given in place of its defaults; its fields are checked together.

    Raises:
        UserError: values that the dataclass refuses.
    """
    values: dict[str, Any] = {path[0]: value for path, value in given.items() if len(path) == 1}
    for name in {path[0] for path in given if len(path) > 1}:
        inner = {path[1:]: value for path, value in given.items() if path[0] == name}
        before = getattr(default or cls(), name)
        values[name] = _build(type(before), before, inner)
    if default is None:
        return cls(**values)
    return dataclasses.replace(default, **values)  # pyright: ignore[reportArgumentType]


def wants_help(argv: Sequence[str]) -> bool:
    return "-h" in argv or "--help" in argv


def peek(argv: Sequence[str], name: str) -> str | None:
    """The last value of `--name VALUE` or `--name=VALUE`, for what must be known beforehand."""
    value = None
    for word, following in itertools.zip_longest(argv, argv[1:]):
        if word == name and following is not None:
            value = following
        elif word.startswith(f"{name}="):
            value = word.removeprefix(f"{name}=")
    return value


def help_text(flags: Mapping[str, Flag], prog: str, about: str) -> str:
    """What `--help` prints."""
    operands = "".join(f" {_operand(flag)}" for flag in flags.values() if flag.positional)
    parser = argparse.ArgumentParser(
        prog=prog,
        usage=f"%(prog)s{operands} [--flag VALUE ...]",
        description=about,
        add_help=False,
        formatter_class=functools.partial(argparse.HelpFormatter, max_help_position=32),
    )
    parser.add_argument("-h", "--help", action="help", help="Print this help and exit.")
    groups: dict[str, Any] = {"": parser}
    for flag in flags.values():
        if flag.section not in groups:
            title = inspect.cleandoc(flag.owner.__doc__ or "")
            groups[flag.section] = parser.add_argument_group(flag.section, title)
        names, options = [flag.name], {"metavar": flag.metavar}
        if flag.positional:
            names, options = [flag.name], {}
        elif flag.type is bool:
            names, options = [flag.name, flag.negative], {"action": "store_true"}
        groups[flag.section].add_argument(*names, help=_help(flag), **options)
    return parser.format_help()


def _operand(flag: Flag) -> str:
    if flag.default is MISSING:
        return flag.name
    return f"[{flag.name} ...]" if flag.many else f"[{flag.name}]"


def _help(flag: Flag) -> str:
    """The field's docstring and its default."""
    text = docstrings(flag.owner).get(flag.path[-1], "")
    if flag.default is not MISSING and flag.default != ():
        shown = str(flag.default)
        text += f" (default: {shown if shown.strip() else repr(shown)})"
    return text.replace("%", "%%")  # argparse would fill in %(name)s


@functools.cache
def docstrings(cls: type) -> dict[str, str]:
    """The strings below the fields of a dataclass, its bases' included, by field."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        try:
            [definition] = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        except (OSError, TypeError, SyntaxError):  # its source is not at hand
            continue
        body = getattr(definition, "body", [])
        for field, below in itertools.pairwise(body):
            match field, below:
                case ast.AnnAssign(target=ast.Name(name)), ast.Expr(ast.Constant(str(text))):
                    found[name] = " ".join(text.split())
    return found
