"""`gptjax replay`; also `train.py --replay`."""

from dataclasses import dataclass, field
from pathlib import Path

from gptjax.cli.flags import POSITIONAL, parse
from gptjax.cli.recipe import Recipe, parts_for_run, recipe_of_run
from gptjax.runs import folders


@dataclass(frozen=True)
class ReplayCommand:
    """Recompute one step of a run and show its loss, gradient and batch; nothing is written."""

    step: int = field(metadata=POSITIONAL)
    """The step; 1 is the first."""
    run: str | None = None
    """Name in runs/, or path of a run's folder; None: the newest run."""
    config: str | None = None
    """Python file that the run's own model, optimizer, loss_fn or batches come from."""


def replay_step(directory: Path, step: int, recipe: Recipe | None) -> None:
    """Replay a step with the parts of the config file, if there is one.

    Raises:
        UserError: see `gptjax.tools.replay.replay`.
    """
    from gptjax.tools.replay import replay

    own = parts_for_run(recipe, directory, "model", "optimizer", "loss_fn", "batches")
    replay(directory, step, **own)


def main(argv: list[str], prog: str) -> None:
    """Replay a step; jax is imported once the arguments are understood."""
    command = parse(ReplayCommand, None, argv, prog)
    recipe, directory = recipe_of_run(command.config), folders.find(command.run)
    from gptjax.cli.compilation_cache import use_compilation_cache

    use_compilation_cache()
    replay_step(directory, command.step, recipe)
