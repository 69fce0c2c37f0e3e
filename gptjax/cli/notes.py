"""`gptjax notes`."""

from dataclasses import dataclass

from gptjax.cli.flags import parse


@dataclass(frozen=True)
class NotesCommand:
    """Demonstrate the lecture's six notes on attention with numbers."""

    seed: int = 1337
    """Random seed of the inputs and the weights."""


def main(argv: list[str], prog: str) -> None:
    """Print each note and its numbers; jax is imported once the arguments are understood."""
    command = parse(NotesCommand, NotesCommand(), argv, prog)
    from gptjax.lecture.notes import show
    from gptjax.parallel.switches import pinned

    with pinned():
        show(command.seed)
