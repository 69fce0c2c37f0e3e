"""`gptjax verify`."""

import sys
from dataclasses import dataclass, field

from gptjax.cli.flags import POSITIONAL, parse
from gptjax.cli.recipe import parts_for_run, recipe_of_run
from gptjax.errors import note, visible
from gptjax.runs import folders


@dataclass(frozen=True)
class VerifyCommand:
    """Check that a run is sound; nothing is written. The exit code is 1 if something is wrong."""

    run: str | None = field(default=None, metadata=POSITIONAL)
    """Name in runs/, or path of a run's folder; None: the newest run."""
    config: str | None = None
    """Python file that the run's own model or optimizer comes from."""


def main(argv: list[str], prog: str) -> None:
    """Print a table of the checks; what is wrong once more, below it, on stderr."""
    command = parse(VerifyCommand, VerifyCommand(), argv, prog)
    recipe, directory = recipe_of_run(command.config), folders.find(command.run)
    from rich.table import Table
    from rich.text import Text

    from gptjax.cli.compilation_cache import use_compilation_cache
    from gptjax.console import print_table
    from gptjax.tools.verify import verify

    use_compilation_cache()
    own = parts_for_run(recipe, directory, "model", "optimizer")
    checks = verify(str(directory), **own)
    table = Table(box=None, show_header=False, pad_edge=False)
    for check in checks:
        mark = {True: "sound", False: "WRONG", None: "?"}[check.sound]
        style = {True: "green", False: "bold red", None: "yellow"}[check.sound]
        table.add_row(check.name, Text(mark, style), Text(visible(check.found)))
    print_table(table)
    if wrong := [f"{check.name}: {check.found}" for check in checks if check.sound is False]:
        note("\n".join(wrong))
        sys.exit(1)
