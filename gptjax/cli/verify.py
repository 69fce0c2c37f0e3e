"""`gptjax verify`."""

import sys
from dataclasses import dataclass, field

from gptjax.cli.flags import POSITIONAL, parse
from gptjax.cli.recipe import parts_for_run, recipe_of_run
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
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from gptjax.cli.compilation_cache import use_compilation_cache
    from gptjax.tools.verify import verify

    use_compilation_cache()
    own = parts_for_run(recipe, directory, "model", "optimizer")
    checks = verify(str(directory), **own)
    table = Table(box=None, show_header=False)
    for check in checks:
        mark = {True: "sound", False: "WRONG", None: "?"}[check.sound]
        style = {True: "green", False: "bold red", None: "yellow"}[check.sound]
        table.add_row(check.name, f"[{style}]{mark}[/]", escape(check.found))
    Console(highlight=False).print(table)
    if wrong := [f"{check.name}: {check.found}" for check in checks if check.sound is False]:
        print("\n".join(wrong), file=sys.stderr)
        sys.exit(1)
