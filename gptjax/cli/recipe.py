"""A config file: Python that defines `config`, and optionally own parts of a run.

    config = replace(PRESETS["small"], steps=500)          # required
    model = MyGPT               # a class or function that takes (config.model, vocab_size), or a
                                # module
    optimizer = optax.lion(3e-4)                           # or a function config -> optimizer
    loss_fn, batches, metrics                              # as `gptjax.training.train` takes them

Such a file runs only when it is named on the command line; what is stored in a run never does.
"""

import difflib
import importlib.util
import math
import os
import sys
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from gptjax.config import Config, differences
from gptjax.errors import UserError
from gptjax.presets import LECTURE_MODELS, PRESETS
from gptjax.runs import config_json, files, folders
from gptjax.runs.config_json import Stored

SPEEDRUN = "fast", "record"  # once presets, now config files in examples/speedrun/
PARTS = "model", "optimizer", "loss_fn", "batches", "metrics"
_LECTURE = set(LECTURE_MODELS.values())  # models that come with gptjax
_GEMMA = "Gemma {"  # how the record of one begins; its settings come with the weights of `init`


@dataclass(frozen=True)
class Recipe:
    """What a config file defines; None: the part is left to the config."""

    path: str
    """As typed."""
    config: Config
    model: Any = None
    """A flax module, or what makes one of a ModelConfig and a vocabulary size."""
    optimizer: Any = None
    """An optax transformation, or a function from a config to one."""
    loss_fn: Any = None
    batches: Any = None
    metrics: Any = None

    def parts(self, config: Config, *only: str) -> dict[str, Any]:
        """The parts that the file defines, as keyword arguments of a function that trains.

        Args:
            config: of the run, which may differ from the file's by flags.
            only: names of parts; none: all of them.
        """
        found = {name: getattr(self, name) for name in only or PARTS}
        if callable(found.get("optimizer")):
            found["optimizer"] = self.optimizer(config)
        return {name: part for name, part in found.items() if part is not None}


def is_file(config: str) -> bool:
    """Whether `--config` names a file and not a preset."""
    return config.endswith(".py")


def load_recipe(path: str) -> Recipe:
    """Run a config file. Modules beside it can be imported by it.

    Raises:
        UserError: no such file, an exception in it (with its line), or no sound `config`.
    """
    file = Path(path)
    if not os.path.isfile(path):  # unlike Path's, false for any name that cannot be one
        raise UserError(f"config file {path} is not there; give a Python file or a preset's name")
    module = _run(file)
    config = getattr(module, "config", None)
    if config is None:
        raise UserError(f"config file {path} defines no `config`; give it a gptjax.config.Config")
    if not isinstance(config, Config):
        raise UserError(
            f"config file {path}: `config` is a {type(config).__name__}, expected a "
            f"gptjax.config.Config"
        )
    parts = {name: getattr(module, name, None) for name in PARTS}
    _check_model(parts["model"], path)
    return Recipe(path, config, **parts)


def starting_point(config: str) -> tuple[Config, Recipe | None]:
    """The config that a `--config` names, and the file's other parts if it names a Python file.

    Raises:
        UserError: an unknown preset or run, a file that cannot be used, or a run with parts that
            are not gptjax's.
    """
    if is_file(config):
        recipe = load_recipe(config)
        return recipe.config, recipe
    if config in PRESETS:
        return PRESETS[config], None
    if config in SPEEDRUN:
        raise UserError(
            f"{config!r} is now a config file; from a checkout give "
            f"--config examples/speedrun/{config}.py"
        )
    if (run := stored(config)) is not None:
        own = {name: part for name, part in run.parts.items() if part not in _LECTURE}
        if own.get("model", "").startswith(_GEMMA) and run.config.init is not None:
            del own["model"]
        if own:
            what = ", ".join(f"{name} {part}" for name, part in own.items() if name != "config")
            raise UserError(
                f"{config} was trained with parts that its config does not hold ({what}); give the "
                f"file that defines them, --config {own.get('config', 'FILE.py')}"
            )
        return run.config, None
    close = difflib.get_close_matches(config, PRESETS, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    raise UserError(
        f"unknown preset {config!r}; {hint}give the path of a Python file, a run or its "
        f"config.json, or one of {', '.join(PRESETS)}"
    )


def stored(config: str) -> Stored | None:
    """What a `--config` says that names a run, or the `config.json` of one; None: it names neither,
    or a preset, which has precedence.

    Raises:
        UserError: it is damaged, or another program's.
    """
    if config in PRESETS or is_file(config):
        return None
    if config.endswith(".json") and not os.path.isdir(config):
        text = files.read_file(Path(config), str)
        try:
            return config_json.from_json(text)
        except UserError as error:
            raise UserError(f"{config} is not the config.json of a run: {error}") from None
    if not folders.is_run(config):
        return None
    directory = folders.find(config)
    return files.read_file(directory / folders.CONFIG, config_json.from_json)


def lecture_model(config: str) -> str | None:
    """The lecture's model that a preset, or a run of one, trains; None: a GPT, or another one."""
    model = other_model(config)
    return model if model in _LECTURE else None


def other_model(config: str) -> str | None:
    """The model that a preset or a run trains; None: the config's GPT, or what a file defines."""
    if config in LECTURE_MODELS:
        return LECTURE_MODELS[config]
    run = stored(config)
    return run and run.parts.get("model")


def base_name(config: str) -> str:
    """The name of a run that `--config` starts, before a number is added to it."""
    path = Path(config)
    if config in PRESETS:
        return config
    if path.name == folders.CONFIG and path.resolve().parent.name:
        return path.resolve().parent.name
    return path.stem if path.suffix in (".py", ".json") else path.name


def fitted(config: Config, given: Mapping[str, Any]) -> Config:
    """A starting point, made to fit what is given: what was not asked for must not be in the way
    of what was.

    Args:
        config: the preset's or file's.
        given: values of settings by their names, such as {"steps": 2, "optim.accumulate": 4}.
    """
    optim, rows = config.optim, given.get("batch_size", config.batch_size)
    length = given.get("optim.schedule_steps", optim.schedule_steps)
    length = length or given.get("steps", config.steps)
    if "optim.warmup_steps" not in given and 0 < length < optim.warmup_steps:
        whole = optim.schedule_steps or config.steps
        optim = replace(optim, warmup_steps=optim.warmup_steps * length // whole)
    if "optim.accumulate" not in given and rows > 0:  # the update is the same, whatever it is
        optim = replace(optim, accumulate=math.gcd(optim.accumulate, rows))
    return replace(config, optim=optim)


def changes(old: Config, new: Config) -> str:
    """The settings that `fitted` changed, for a note."""
    changed = differences(old, new).items()
    return " and ".join(f"{name}={after}, not {before}" for name, (before, after) in changed)


def recipe_of_run(config: str | None) -> Recipe | None:
    """The config file that `--config` names for a run that exists; None if none is given.

    Raises:
        UserError: the name of a preset, or a file that cannot be used.
    """
    if config is None:
        return None
    if not is_file(config):
        raise UserError(
            f"--config {config} is not a Python file; the run has its own settings, so give only "
            f"the file with its own model or optimizer, or leave --config out"
        )
    return load_recipe(config)


def parts_for_run(recipe: Recipe | None, directory: Path, *only: str) -> dict[str, Any]:
    """Own parts as keyword arguments.

    Args:
        recipe: the config file; None: there are no own parts.
        directory: of the run.
        only: names of the parts that are used; none: all of them.

    Raises:
        UserError: the run cannot be read.
    """
    if recipe is None:
        return {}
    from gptjax.runs.run import read_config  # not for `--help`

    return recipe.parts(read_config(directory), *only)


def _check_model(model: Any, path: str) -> None:
    """Refuse what is neither a module nor makes one."""
    if model is None or callable(model):  # a module can be called too
        return
    raise UserError(
        f"config file {path}: `model` is {model!r}, expected a flax.linen.Module, a class of them "
        f"or a function (config.model, vocab_size) -> module"
    )


def _run(file: Path) -> ModuleType:
    """Run a file as a registered module, as dataclasses and flax expect; its folder is importable
    meanwhile.

    Raises:
        UserError: an exception in it.
    """
    name, folder = f"gptjax_config_{file.stem}", str(file.resolve().parent)
    spec = importlib.util.spec_from_file_location(name, file.resolve())
    assert spec and spec.loader
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    sys.path.insert(0, folder)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise UserError(
            f"config file {file}{_line(error, spec.origin)}: {_message(error)}"
        ) from None
    finally:
        sys.path.remove(folder)
    return module


def _line(error: Exception, file: str | None) -> str:
    """`, line 3` of a file, where an exception came from."""
    if isinstance(error, SyntaxError) and error.filename == file:
        return f", line {error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == file]
    return f", line {lines[-1]}" if lines else ""


def _message(error: Exception) -> str:
    if isinstance(error, UserError):
        return str(error)
    text = error.msg if isinstance(error, SyntaxError) else str(error)
    return f"{type(error).__name__}: {text}"
