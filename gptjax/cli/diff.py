"""`gptjax diff`."""

import json
import re
import textwrap
from dataclasses import dataclass, field
from typing import Any

from rich.cells import cell_len
from rich.console import Console

from gptjax.cli.flags import POSITIONAL, parse
from gptjax.cli.table import on_terminal, one_line
from gptjax.runs import folders
from gptjax.tools.comparison import Comparison, Pair, compare

DIFFERENT = 1  # the exit code; 0: the same, 2: an error


@dataclass(frozen=True)
class DiffCommand:
    """Compare two runs: settings, data, environment, and losses at common steps. The exit code is 0
    if settings, data and all losses are the same, 1 if not, and 2 after an error. Environments may
    differ. In a pipe, values are separated by tabs: section, name, and one for each run."""

    run: str = field(metadata=POSITIONAL)
    """Name in runs/, or path of a run's folder."""
    other: str = field(metadata=POSITIONAL)
    """The run to compare it with."""
    json: bool = False
    """Print a JSON object."""


def main(argv: list[str], prog: str) -> None:
    """Print what differs."""
    command = parse(DiffCommand, None, argv, prog)
    found = compare(folders.find(command.run), folders.find(command.other))
    names = (one_line(command.run), one_line(command.other))
    if command.json:
        print(json.dumps({"same": found.same, **found._asdict()}, indent=2))
    elif on_terminal():
        for section, rows in _sections(found).items():
            _print_section(section, rows, names)
            if any(name.startswith("~") for name in rows):
                print("~ on sampled validation batches")
            print()
        print(_verdict(found))
    else:
        print("\t".join(("section", "name", *names)))
        for section, rows in _sections(found).items():
            for name, pair in rows.items():
                print("\t".join((section, name, *map(_text, pair))))
        print("\t".join(("result", _verdict(found), *map(_text, found.steps))))
    if not found.same:
        raise SystemExit(DIFFERENT)


def _sections(found: Comparison) -> dict[str, dict[str, Pair]]:
    losses = {
        f"{name} {step}": (f"{a:.4f}", f"{b:.4f}" + (f" ({_change(b - a)})" if a != b else ""))
        for name, step, a, b in found.losses
    }
    sections = {
        "settings": found.settings,
        "data": found.data,
        "environment": found.environment,
        "losses at step": losses,
    }
    return {section: rows for section, rows in sections.items() if rows}


def _change(x: float) -> str:
    return f"{x:+.4f}" if abs(x) >= 5e-5 else f"{x:+.0e}"


def _print_section(section: str, rows: dict[str, Pair], names: tuple[str, str]) -> None:
    """Each row on one line where it fits, else its values below its name."""
    width = Console().width
    names = (_short(names[0], width // 4), _short(names[1], width // 4))
    shown = {f"  {name}": (_text(a), _text(b)) for name, (a, b) in rows.items()}
    whole = dict(shown)
    while True:
        first = max(map(cell_len, (section, *whole)))
        second = max(cell_len(a) for a, _ in (names, *whole.values()))
        third = max((cell_len(b) for _, b in whole.values()), default=0)
        if not whole or first + second + third + 4 <= width:
            break
        del whole[max(whole, key=lambda name: sum(map(cell_len, (name, *whole[name]))))]
    print(f"{_padded(section, first)}  {_padded(names[0], second)}  {names[1]}")
    for name, (a, b) in shown.items():
        if name in whole:
            print(f"{_padded(name, first)}  {_padded(a, second)}  {b}")
            continue
        print(name)
        for run, value in zip(names, (a, b), strict=True):
            lines = textwrap.wrap(f"{run}: {value}", width - 6, break_on_hyphens=False)
            print(textwrap.indent("\n".join(lines), " " * 6)[2:])


def _text(value: Any) -> str:
    """A value on one line, of a hash no more than tells it apart."""
    values = value if isinstance(value, list) else [value]
    text = one_line(" then ".join("-" if x is None else str(x) for x in values))
    return re.sub(r"\b([0-9a-f]{12})[0-9a-f]{28,}\b", r"\1", text)


def _padded(text: str, width: int) -> str:
    return text + " " * (width - cell_len(text))


def _short(text: str, width: int) -> str:
    return text if cell_len(text) <= width else f"{text[: width - 3]}..."


def _verdict(found: Comparison) -> str:
    """The last line."""
    a, b = found.steps
    if not found.common:
        losses = "there is no step in common"
    elif found.unequal_at is None:
        losses = f"all losses of the {found.common} common steps are equal"
    else:
        losses = f"losses differ from step {found.unequal_at} on"
    n = len(found.settings)
    settings = f"{n} settings differ" if n > 1 else "1 setting differs"
    what = [settings if n else "settings are the same", "the data differ" * found.other_data]
    lengths = "" if a == b else f" ({_text(a)} and {_text(b)} steps)"
    return f"{'; '.join(filter(None, [*what, losses]))}{lengths}"
