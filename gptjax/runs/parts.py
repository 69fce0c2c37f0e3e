"""Parts of a run that are the caller's own: recorded by name, given again when they are needed.

A run's folder holds no code. It says that its model (or optimizer, loss, batches) was not the
config's, and whose; loading the run then takes that part from the caller, or refuses.
"""

import dataclasses
import json
import re
import shlex
from functools import partial
from typing import Any

import flax.linen as nn

from gptjax.assembly import make_model
from gptjax.errors import UserError
from gptjax.interop.gemma import Gemma, GemmaConfig
from gptjax.lecture.models import STAGES
from gptjax.model import GPT, Model
from gptjax.runs import config_json
from gptjax.runs.files import Damaged, unique_json
from gptjax.runs.run import Run

STANDARD = ("config", "vocab_size", "kernel", "parent", "name")  # fields that name no part


def describe(recipe: str | None = None, **parts: Any) -> dict[str, str]:
    """Which parts are the caller's own.

    Args:
        recipe: path of the config file they come from, if any.
        parts: by name; None is the config's own.

    Returns:
        Their descriptions by name, such as {"model": "NGramHead(n=4)", "config": "fast.py"}.
    """
    found = {name: text for name, part in parts.items() if (text := _describe_one(part))}
    return {**found, "config": recipe} if found and recipe else found


def check(run: Run, given: dict[str, str], names: tuple[str, ...] | None = None) -> None:
    """See that parts are those that a run was trained with.

    Args:
        run: of the folder.
        given: from `describe`.
        names: of the parts to compare; None: all.

    Raises:
        UserError: one is missing, another, or not the run's.
    """
    for name in sorted({*run.parts, *given} - {"config"}):
        ours, theirs = run.parts.get(name), given.get(name)
        if ours == theirs or (names is not None and name not in names):
            continue
        if theirs is None:
            file = shlex.quote(run.parts.get("config", "FILE.py"))
            raise UserError(
                f"{run.directory} was trained with a {name} that is not part of gptjax, {ours}; "
                f"give --config {file}, or {name}= in Python"
            )
        if ours is None:
            raise UserError(
                f"{run.directory} was trained with the {name} of its config, and {theirs} was "
                f"given; leave it out"
            )
        raise UserError(
            f"{run.directory} was trained with the {name} {ours}, and {theirs} was given; give "
            f"that one"
        )


def run_model(run: Run, model: Model | None = None) -> nn.Module:
    """The model of a run.

    Args:
        run: of the folder.
        model: the caller's own, for a run that was trained with one.

    Raises:
        UserError: the run needs a model of the caller's, or another one.
    """
    model = model or known_model(run)
    made = make_model(run.config.model, run.tokenizer.vocab_size, model)
    check(run, describe(model=made), ("model",))
    return made


def known_model(run: Run) -> Model | None:
    """The model that a run was trained with, if it is not the config's but comes with gptjax: one
    of the lecture's, or a Gemma. Such need not be given.

    Raises:
        UserError: the record of a Gemma is damaged.
    """
    name, _, settings = run.parts.get("model", "").partition(" ")
    if name != Gemma.__name__ or not settings:
        return STAGES.get(run.parts.get("model", ""))
    try:
        values = unique_json(settings)
        names = {field.name for field in dataclasses.fields(GemmaConfig)}
        if not isinstance(values, dict) or values.keys() != names:
            raise ValueError(f"expected an object with {', '.join(sorted(names))}")
        gemma = config_json.build(GemmaConfig, values, "")
        if len(gemma.local) != run.config.model.n_layer:
            raise ValueError(f"local has {len(gemma.local)} values, one for each layer expected")
    except (ValueError, RecursionError, UserError) as error:
        raise Damaged(
            f"{run.directory}/config.json is damaged: the settings of its {name}: {error}"
        ) from None
    return partial(Gemma, gemma=gemma)


def _describe_one(part: Any) -> str | None:
    if part is None:
        return None
    if isinstance(part, nn.Module):
        return _describe_module(part)
    if isinstance(part, tuple):  # an optax transformation is a pair of functions without a name
        return type(part).__name__
    part = part.func if isinstance(part, partial) else part
    return getattr(part, "__qualname__", type(part).__qualname__)


def _describe_module(model: nn.Module) -> str | None:
    fields = [field for field in dataclasses.fields(model) if field.name not in STANDARD]
    values = {
        field.name: value
        for field in fields
        if (value := getattr(model, field.name)) is not field.default and value != field.default
    }
    if type(model) is GPT and not values:
        return None
    if type(model) is Gemma and values.keys() == {"gemma"}:
        return f"Gemma {json.dumps(dataclasses.asdict(model.gemma))}"
    name = type(model).__qualname__.rpartition("<locals>.")[2]
    if not values:
        return name
    settings = ", ".join(f"{name}={_name(value)}" for name, value in values.items())
    return f"{name}({settings})"


def _name(value: Any) -> str:
    name = getattr(value, "__qualname__", None)
    name = repr(value) if name is None else name.rpartition("<locals>.")[2]
    return re.sub(r" at 0x[0-9a-f]+", "", name)
