"""`gptjax presets`."""

from dataclasses import dataclass

from gptjax.cli.flags import parse
from gptjax.config import Config
from gptjax.presets import PRESETS


@dataclass(frozen=True)
class PresetsCommand:
    """List the presets, one a line. All settings of one: gptjax train --config NAME --help."""


def described(config: Config) -> str:
    """A config in one line."""
    model = config.model
    start = f"from {config.init}, " if config.init else ""
    return (
        f"{start}{model.n_layer} layers, width {model.n_embd:,}, context {model.block_size:,}; "
        f"{config.steps:,} steps of {config.batch_size:,} windows; {config.data.text}"
    )


def main(argv: list[str], prog: str) -> None:
    """Print the list."""
    parse(PresetsCommand, PresetsCommand(), argv, prog)
    width = max(map(len, PRESETS))
    for name, config in PRESETS.items():
        print(f"{name:<{width}}  {described(config)}")
