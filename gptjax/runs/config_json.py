"""The JSON form of a config: written from the dataclasses, read with every key and type checked."""

import json
import types
import typing
from dataclasses import asdict, is_dataclass
from typing import Any, Literal, NamedTuple

from gptjax import __version__
from gptjax.config import Config
from gptjax.errors import UserError
from gptjax.runs.files import unique_json

FORMAT = 2  # raised when an old program could misread a new file

# Fields of a model that format 1 (gptjax 0.1) had and this one has not, with the value that means
# nothing; and values that this one has not.
REMOVED = {"kind": "gpt", "qkv_bias": True, "ngram": 1, "pair_rows": None, "recall": None}
REMOVED_VALUES = {"norm": "none", "init": "torch"}


class Stored(NamedTuple):
    """What `config.json` says.

    Attributes:
        config: of the run.
        parts: its parts that are not the config's own, by name, such as {"model": "NGramHead(n=4)"}
            (see `parts.py`); nothing of them is executed.
    """

    config: Config
    parts: dict[str, str]


def to_json(config: Config, parts: dict[str, str] | None = None) -> str:
    """The text of a run's `config.json`."""
    values = {"format": FORMAT, "gptjax": __version__, "parts": parts or {}, **asdict(config)}
    return json.dumps(values, indent=2) + "\n"


def from_json(text: str) -> Stored:
    """Read a run's `config.json`; fields it lacks keep their defaults.

    Args:
        text: what `to_json` wrote; keys and types are checked, nothing is executed.

    Raises:
        UserError: not JSON, a newer format, an unknown key, a wrong type or value.
    """
    try:
        values = unique_json(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"not JSON: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"expected a JSON object, got {type(values).__name__}")
    version, parts = values.pop("format", None), values.pop("parts", {})
    values.pop("gptjax", None)
    if type(version) is not int or version not in (1, FORMAT):
        raise UserError(
            f"format {version!r} is not the format {FORMAT} this gptjax reads; update gptjax"
        )
    if version == 1 and isinstance(values.get("model"), dict):
        values["model"], parts = _from_format_1(values["model"])
    if not isinstance(parts, dict) or not all(isinstance(x, str) for x in parts.values()):
        raise UserError(f"parts: expected an object of strings, got {parts!r}")
    return Stored(build(Config, values, ""), parts)


def _from_format_1(model: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """The model's fields of gptjax 0.1 as this version's, and the parts they stand for."""
    parts = {}
    if model.get("kind") == "bigram":  # a table, whatever its other fields say
        model = {name: model[name] for name in ("block_size", "vocab_size") if name in model}
        parts = {"model": "Bigram"}
    elif model.get("bias") is False:
        model = {**model, "qkv_bias": True}  # meant nothing without the other biases
    for name, value in model.items():
        gone = name in REMOVED and value != REMOVED[name]
        if gone or (name in REMOVED_VALUES and value == REMOVED_VALUES[name]):
            raise UserError(
                f"model.{name}={value!r} is a setting of gptjax 0.1 that this version does not "
                f"have; use the run with a checkout of 0.1, or start a new one"
            )
    model = {name: value for name, value in model.items() if name not in REMOVED}
    return model, parts


def build(cls: type, values: dict[str, Any], prefix: str) -> Any:
    """Make the dataclass `cls` from plain JSON values, checking every key and type.

    Raises:
        UserError: names the key, after `prefix`, that is unknown, or whose value is of another
            type or out of range.
    """
    hints = typing.get_type_hints(cls)
    if unknown := sorted(values.keys() - hints.keys()):
        raise UserError(f"unknown key {prefix + unknown[0]!r}; known: {', '.join(hints)}")
    checked = {}
    for name, value in values.items():
        if is_dataclass(hints[name]):
            if not isinstance(value, dict):
                raise UserError(f"{prefix}{name}: expected an object, got {value!r}")
            checked[name] = build(typing.cast(type, hints[name]), value, f"{prefix}{name}.")
        else:
            checked[name] = _check(f"{prefix}{name}", value, hints[name])
    return cls(**checked)


def _check(name: str, value: Any, hint: Any) -> Any:
    """`value`, if it has the declared type; an int counts as a float."""
    if typing.get_origin(hint) is Literal:
        if value in typing.get_args(hint):
            return value
        raise UserError(f"{name}: expected one of {typing.get_args(hint)}, got {value!r}")
    allowed = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    for kind in allowed:
        if typing.get_origin(kind) is tuple and isinstance(value, list):
            item = typing.get_args(kind)[0]
            return tuple(_check(f"{name}[{i}]", x, item) for i, x in enumerate(value))
        if type(value) is kind:
            return value
        if kind is float and type(value) is int and abs(value) < 2**53:
            return float(value)
    names = {type(None): "null", tuple[float, ...]: "a list of numbers"}
    expected = " or ".join(names.get(kind) or kind.__name__ for kind in allowed)
    raise UserError(f"{name}: expected {expected}, got {value!r}")
