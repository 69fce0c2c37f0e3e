"""`gptjax plan`; also `train.py --plan`."""

import os
from dataclasses import dataclass, field

from gptjax.cli.flags import INLINE, POSITIONAL, given, parse, peek
from gptjax.cli.recipe import Recipe, fitted, other_model, starting_point
from gptjax.config import Config
from gptjax.errors import UserError


@dataclass(frozen=True)
class PlanCommand:
    """Estimate memory, time and the bottleneck of a run on accelerators; nothing is trained. If the
    run does not fit, say what does. Any field of the config can be set."""

    devices: str = field(default="here", metadata=POSITIONAL)
    """v5e:4x4, h100:8, ... or here."""
    config: str = "small"
    """Preset to start from, a Python file that defines `config`, or a run."""
    settings: Config = field(default_factory=Config, metadata=INLINE)


def show(name: str, settings: Config, devices: str, recipe: Recipe | None) -> None:
    """Print the plan of a config; jax is imported here.

    Raises:
        UserError: see `gptjax.plan.plan.plan`; a preset, file or run with a model of its own; or
            weights, whose model may have other sizes than the config.
    """
    if other_model(name):
        raise UserError(f"only a GPT can be planned, and {name} trains none")
    if recipe and recipe.model:
        raise UserError(
            f"only the config's own GPT can be planned, and {recipe.path} defines a model; give a "
            f"config of the same size"
        )
    start = recipe.config if recipe else starting_point(name)[0]
    if settings.init is not None and settings.init != start.init:
        raise UserError(
            f"a plan takes the model's sizes from the config, and those of --init {settings.init} "
            f"come with its weights; import it (gptjax import), and plan the run that this makes "
            f"with --config"
        )
    # The CUDA plug-in, loaded to compile, need not say that there is no GPU.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    from gptjax.plan.plan import plan

    plan(settings, devices)


def main(argv: list[str], prog: str) -> None:
    """Plan a preset or a config file."""
    config = peek(argv, "--config") or PlanCommand.config
    settings, recipe = starting_point(config)
    default = PlanCommand(config=config, settings=settings)
    settings = fitted(settings, given(PlanCommand, default, argv))
    default = PlanCommand(config=config, settings=settings)
    command = parse(PlanCommand, default, argv, prog)
    show(config, command.settings, command.devices, recipe)
