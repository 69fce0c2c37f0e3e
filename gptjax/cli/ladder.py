"""`gptjax ladder`."""

from dataclasses import dataclass

from gptjax.cli.flags import parse


@dataclass(frozen=True)
class LadderCommand:
    """Train the lecture's stages and compare their losses with its figures. Runs that are finished
    are not trained again."""

    seeds: int = 3
    """Runs of each stage, with seeds 1337, 1338, ..."""
    stages: tuple[str, ...] = ()
    """Some of 1-bigram .. 8-scale; none: all of them up to 7-layernorm."""
    scale: bool = False
    """Train 8-scale too: minutes on an accelerator, half a day on a few cores."""
    docs: bool = False
    """Write the table into docs/lecture.md and the curves into docs/lecture.png."""
    folder: str = "ladder"
    """Folder in runs/ that the runs are kept in."""
    steps: int | None = None
    """Updates of each run, for a first look; None: as many as the preset has."""
    text: str = "tiny_shakespeare"
    """Text to train on; the lecture's figures are of this one."""


def main(argv: list[str], prog: str) -> None:
    """Train the stages and show them; jax is imported once the arguments are understood."""
    command = parse(LadderCommand, LadderCommand(), argv, prog)
    from gptjax.errors import optional_import, visible
    from gptjax.lecture import ladder
    from gptjax.runs.folders import RUNS

    optional_import("matplotlib", "plot")  # before hours of training
    console = ladder.Console(highlight=False, soft_wrap=True)
    stages, counted = ladder.climb(
        console,
        stages=command.stages,
        scale=command.scale,
        seeds=command.seeds,
        steps=command.steps,
        text=command.text,
        folder=RUNS / command.folder,
    )
    ladder.show(stages, counted, command.seeds, console)
    if command.docs:
        out = ladder.update_page(stages, counted, command.seeds)
    else:
        out = RUNS / command.folder / "ladder.png"
    ladder.draw(stages, counted, out)
    print(visible(str(out)))
