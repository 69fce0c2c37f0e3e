"""`gptjax presets`."""

from dataclasses import dataclass

from gptjax.cli.flags import parse
from gptjax.cli.table import Column, compact, print_rows
from gptjax.presets import PRESETS, PURPOSES

COLUMNS = (
    Column("preset", fold=24),
    Column("parameters", 2, show=compact),
    Column("tokens/step", 3, show="{:,}".format),
    Column("steps", 4, show="{:,}".format),
    Column("for", 1, fold=16),
)


@dataclass(frozen=True)
class PresetsCommand:
    """List the presets: size, length, and what each is for. All settings of one: gptjax train
    --config NAME --help."""


def main(argv: list[str], prog: str) -> None:
    """Print the table."""
    parse(PresetsCommand, PresetsCommand(), argv, prog)
    rows = []
    for name, config in PRESETS.items():
        parameters, purpose = PURPOSES[name]
        tokens = config.batch_size * config.model.block_size
        rows.append([name, parameters, tokens, config.steps, purpose])
    print_rows(COLUMNS, rows)
