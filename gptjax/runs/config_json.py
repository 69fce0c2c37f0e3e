"""The JSON form of a config: written from the dataclasses, read with every key and type checked."""

import json
import types
import typing
from dataclasses import asdict, is_dataclass
from typing import Any, Literal

from gptjax.config import Config
from gptjax.errors import UserError

FORMAT = 1  # raised when an old program could misread a new file


def to_json(config: Config) -> str:
    """The text of a run's `config.json`."""
    return json.dumps({"format": FORMAT, **asdict(config)}, indent=2) + "\n"


def from_json(text: str) -> Config:
    """Read a run's `config.json`; fields it lacks keep their defaults.

    Args:
        text: what `to_json` wrote; keys and types are checked, nothing is executed.

    Raises:
        UserError: not JSON, a newer format, an unknown key, a wrong type or value.
    """
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"not JSON: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"expected a JSON object, got {type(values).__name__}")
    version = values.pop("format", None)
    if type(version) is not int or version != FORMAT:
        raise UserError(
            f"format {version!r} is not the format {FORMAT} this gptjax reads; update gptjax"
        )
    return _build(Config, values, "")


def _build(cls: type, values: dict[str, Any], prefix: str) -> Any:
    """Make the dataclass `cls` from plain JSON values, checking every key and type."""
    hints = typing.get_type_hints(cls)
    if unknown := sorted(values.keys() - hints.keys()):
        raise UserError(f"unknown key {prefix + unknown[0]!r}; known: {', '.join(hints)}")
    checked = {}
    for name, value in values.items():
        if is_dataclass(hints[name]):
            if not isinstance(value, dict):
                raise UserError(f"{prefix}{name}: expected an object, got {value!r}")
            checked[name] = _build(typing.cast(type, hints[name]), value, f"{prefix}{name}.")
        else:
            checked[name] = _check(f"{prefix}{name}", value, hints[name])
    return cls(**checked)


def _check(name: str, value: Any, hint: Any) -> Any:
    """`value` if it is of the declared type; an int counts as a float."""
    if typing.get_origin(hint) is Literal:
        if value in typing.get_args(hint):
            return value
        raise UserError(f"{name}: expected one of {typing.get_args(hint)}, got {value!r}")
    allowed = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    for kind in allowed:
        if type(value) is kind:
            return value
        if kind is float and type(value) is int and abs(value) < 2**53:
            return float(value)
    expected = " or ".join("null" if kind is type(None) else kind.__name__ for kind in allowed)
    raise UserError(f"{name}: expected {expected}, got {value!r}")
