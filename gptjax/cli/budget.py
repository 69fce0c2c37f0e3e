"""The length of a run: --steps, or a budget of tokens or FLOPs that becomes steps."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptjax.cli.flags import given
from gptjax.cli.recipe import changes, fitted, other_model
from gptjax.config import Config
from gptjax.errors import UserError, above_zero

if TYPE_CHECKING:
    from gptjax.cli.train import TrainCommand


def check(command: "TrainCommand", values: Mapping[str, Any]) -> None:
    """See that one length is given at most.

    Args:
        command: as parsed.
        values: given values of settings, by their names.

    Raises:
        UserError: several are, or FLOPs that are no number above 0.
    """
    lengths = {"--steps": values.get("steps"), "--tokens": command.tokens, "--flops": command.flops}
    if len(several := [flag for flag, value in lengths.items() if value is not None]) > 1:
        raise UserError(f"{' and '.join(several)} exclude each other; give one of them")
    if command.flops is not None:
        above_zero("--flops", command.flops)


def check_warm_up(settings: Config, values: Mapping[str, Any], run: str | None) -> None:
    """See that a resumed run does not end within its warm-up, which was made for more steps.

    Args:
        settings: of the run, so far.
        values: what is given in their place, by their names.
        run: the run's folder.

    Raises:
        UserError: it does.
    """
    steps, optim = values.get("steps", settings.steps), settings.optim
    kept = not {"optim.warmup_steps", "optim.schedule_steps"} & values.keys()
    if kept and optim.schedule_steps is None and 0 < steps < optim.warmup_steps:
        raise UserError(
            f"{steps} steps would end {run} within its warm-up of {optim.warmup_steps}; give "
            f"--steps {optim.warmup_steps} or more, or keep its learning rates with "
            f"--optim.schedule-steps {settings.steps}"
        )


def for_tokens(command: "TrainCommand", argv: list[str]) -> "TrainCommand":
    """A command with the most steps whose tokens are within its budget, if it has one.

    Raises:
        UserError: that is less than one step.
    """
    if command.tokens is None:
        return command
    each, config = _tokens_a_step(command.settings), command.settings
    size = f"{each:,} tokens ({config.batch_size} x {config.model.block_size})"
    if command.tokens < each:
        raise UserError(f"--tokens {command.tokens:,} is less than one step of {size}; give more")
    steps = command.tokens // each
    return _for_steps(
        command, argv, steps, f"{command.tokens:,} tokens are {steps:,} steps of {size}"
    )


def for_flops(command: "TrainCommand", argv: list[str], vocab_size: int) -> "TrainCommand":
    """A command with the most steps whose FLOPs, by the estimate behind MFU, are within its budget.
    Imports jax.

    Args:
        command: with such a budget.
        argv: its words.
        vocab_size: see below.

    Raises:
        UserError: that is less than one step.
    """
    import jax

    from gptjax.assembly import make_model
    from gptjax.parallel.flops import flops_per_token

    config, flops = command.settings, command.flops
    assert flops is not None
    model = make_model(config.model, vocab_size)
    token = jax.ShapeDtypeStruct((1, 1), "int32")
    shapes = jax.eval_shape(model.init, jax.random.key(0), token)["params"]
    tokens = _tokens_a_step(config)
    each = flops_per_token(config.model, shapes) * tokens
    if flops < each:
        raise UserError(f"--flops {flops:.3g} is less than one step of {each:.3g} FLOPs; give more")
    steps = int(flops // each)
    size = f"{each:.3g} FLOPs ({tokens:,} tokens)"
    command = _for_steps(command, argv, steps, f"{flops:.3g} FLOPs are {steps:,} steps of {size}")
    return replace(command, flops=None)


def vocab_size(command: "TrainCommand", directory: Path | None) -> int:
    """The vocabulary size of the GPT that is to be trained, which its FLOPs depend on.

    Args:
        command: as parsed.
        directory: of the run, which exists if it is resumed.

    Raises:
        UserError: the model is no GPT of the config, its vocabulary is not known before the run
            starts, or the text cannot be used.
    """
    config, recipe = command.settings, command.recipe
    run = None
    if command.resume and directory:
        from gptjax.runs.run import Run

        run = Run(directory)
    if run.parts.get("model") if run else other_model(command.config) or (recipe and recipe.model):
        raise UserError(
            "--flops is for the config's own GPT, and this run trains another model, whose FLOPs "
            "are not known; give --tokens or --steps"
        )
    if run:
        return run.tokenizer.vocab_size
    if config.model.vocab_size:
        return config.model.vocab_size
    if config.init or (recipe and recipe.batches):
        raise UserError(
            "--flops needs the model's vocabulary size, which comes with the weights of --init or "
            "with batches of your own; give --tokens or --steps"
        )
    from gptjax.text.dataset import open_dataset

    return open_dataset(config.data, config.model.block_size).tokenizer.vocab_size


def _tokens_a_step(config: Config) -> int:
    return config.batch_size * config.model.block_size


def _for_steps(command: "TrainCommand", argv: list[str], steps: int, budget: str) -> "TrainCommand":
    """A command of so many steps; a new run's settings are made to fit them."""
    settings, values = command.settings, given(type(command), command, argv)
    fit = settings
    if command.resume:
        check_warm_up(settings, {**values, "steps": steps}, command.run)
    else:
        fit = fitted(settings, {**values, "steps": steps})
    text = " and ".join(filter(None, [command.fitted, changes(settings, fit)]))
    return replace(command, settings=replace(fit, steps=steps), fitted=text, budget=budget)
