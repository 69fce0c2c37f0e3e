"""`gptjax export`."""

from dataclasses import dataclass, field
from pathlib import Path

from gptjax.cli.flags import POSITIONAL, parse
from gptjax.cli.recipe import parts_for_run, recipe_of_run
from gptjax.errors import visible
from gptjax.runs import folders


@dataclass(frozen=True)
class ExportCommand:
    """Write a run's weights and tokenizer as a folder that transformers loads."""

    run: str = field(metadata=POSITIONAL)
    """Name in runs/, or path of a run's folder."""
    folder: Path = field(metadata=POSITIONAL)
    """Folder to write; new or empty."""
    checkpoint: str = "best"
    """best (by validation loss), last, or a step."""
    config: str | None = None
    """Python file that the run's own model comes from; None: the model of its config."""


def main(argv: list[str], prog: str) -> None:
    """Export, and say how to load the folder; jax is imported once the arguments are understood."""
    command = parse(ExportCommand, None, argv, prog)
    recipe, directory = recipe_of_run(command.config), folders.find(command.run)
    from gptjax.interop.export import export

    own = parts_for_run(recipe, directory, "model")
    kind = export(directory, command.folder, command.checkpoint, **own)
    folder = visible(str(command.folder))
    print(f"wrote {folder}; to load it: transformers.{kind}.from_pretrained(...)")
