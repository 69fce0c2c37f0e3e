"""`gptjax score`."""

import dataclasses
import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Literal

from gptjax.cli.flags import POSITIONAL, parse
from gptjax.cli.recipe import parts_for_run, recipe_of_run
from gptjax.errors import UserError, note, visible
from gptjax.runs import folders
from gptjax.text.sources import Piece
from gptjax.text.tokenizers import Unknown

if TYPE_CHECKING:
    from rich.console import Console

    from gptjax.score.report import Side
    from gptjax.score.score import Total

SUFFIXES = ".html", ".csv", ".jsonl"
SHOWN, ON_PAGE = 400, 5  # tokens on a terminal; alternatives of each token of a page
HEAD = 60  # characters of a line that are shown beside its result


@dataclass(frozen=True)
class ScoreCommand:
    """Measure how well a run, or each of two runs, predicts a text: its loss, its perplexity, its
    bits per byte, and the probability of each token. The runs are not changed."""

    run: tuple[str, ...] = dataclasses.field(default=(), metadata=POSITIONAL)
    """One or two names in runs/, or paths of runs' folders; none: the newest run."""
    text: str | None = None
    """The text to score."""
    file: str | None = None
    """The text to score: a file, a folder, a glob, the name of a corpus, or - for standard input.
    A file is a document, and so is each line of a .jsonl file."""
    lines: str | None = None
    """As --file, with a result for each line, which is a document of its own."""
    documents: Literal["packed", "alone"] = "packed"
    """Several documents are read one after the other, with the end-of-text token between them, as
    in training (packed), or each without the others as its context (alone)."""
    separator: str | None = None
    """Text that divides a file into documents, such as <|endoftext|>; it is dropped. None: a file
    is one document."""
    stride: int | None = None
    """Tokens from a window to the next one. A token is predicted from all tokens before it, or from
    more than the context length minus the stride; None: half the context length. The context
    length itself is fastest, and what validation does."""
    special_tokens: bool = True
    """Put around each document the tokens that the run's tokenizer puts around a text, such as a
    BOS, from which the first token of the text is predicted."""
    unknown: Unknown = "error"
    """What to do with characters that the tokenizer lacks."""
    checkpoint: tuple[str, ...] = ()
    """best (by validation loss), last, or a step: one for all runs, or one for each; none: best.
    Two of one run are compared."""
    config: str | None = None
    """Python file that the runs' own model comes from; None: the model of their configs."""
    out: Path | None = None
    """File to write: .csv or .jsonl has a token on each line, .html is the text in colours, with
    the numbers of each token on hover."""
    alternatives: int | None = None
    """Most likely tokens to write for each position, up to 20; None: 5 on a page, else 0."""
    json: bool = False
    """Print JSON: one object, and before it one for each line of --lines."""
    show: int | None = None
    """Tokens to print in colours of their surprise, or of the difference of two runs; None: 400 on
    a terminal, else 0."""
    encoding: str = "utf-8"
    """Encoding of the files."""
    field: str = "text"
    """Field of .jsonl files that has the text."""

    @property
    def suffix(self) -> str:
        """Of --out."""
        return "" if self.out is None else self.out.suffix.lower()


def parse_score(argv: list[str], prog: str = "gptjax score") -> ScoreCommand:
    """Read the arguments.

    Raises:
        UserError: an unknown flag, a bad value, or flags that exclude each other.
    """
    command = parse(ScoreCommand, ScoreCommand(), argv, prog)
    given = [f"--{n}" for n in ("text", "file", "lines") if getattr(command, n) is not None]
    if len(given) != 1:
        raise UserError(
            f"give the text by one of --text, --file and --lines, not by "
            f"{' and '.join(given) or 'none'}; see {prog} --help"
        )
    for what, values in (("runs", command.run), ("--checkpoint", command.checkpoint)):
        if len(values) > 2:
            raise UserError(f"{what}: expected one or two, got {len(values)}; leave some out")
    if command.out is not None and command.suffix not in SUFFIXES:
        raise UserError(f"--out {command.out}: expected a name that ends in {', '.join(SUFFIXES)}")
    for name in ("show", "alternatives"):
        if (getattr(command, name) or 0) < 0:
            raise UserError(f"--{name} {getattr(command, name)} is too small; give 0 or more")
    if command.separator == "":
        raise UserError("--separator is empty; give one character or more, or leave it out")
    if command.separator is not None and command.lines is not None:
        raise UserError("--lines has one document on each line; leave --separator out, or --lines")
    return command


def _sides(command: ScoreCommand) -> list["Side"]:
    """Open the runs; one run with two checkpoints is opened twice.

    Raises:
        UserError: a run or a checkpoint that cannot be used, or the same one twice.
    """
    from gptjax.runs.loaded import load
    from gptjax.score.report import Side

    recipe = recipe_of_run(command.config)
    directories = [folders.find(name) for name in command.run] or [folders.find(None)]
    checkpoints = command.checkpoint or ("best",)
    n = max(len(directories), len(checkpoints))
    directories = directories if len(directories) == n else directories * n
    checkpoints = checkpoints if len(checkpoints) == n else checkpoints * n
    sides = []
    for directory, checkpoint in zip(directories, checkpoints, strict=True):
        own = parts_for_run(recipe, directory, "model")
        sides.append(Side(folders.run_name(directory), load(directory, checkpoint, **own)))
    if n == 2 and directories[0].resolve() == directories[1].resolve():
        if sides[0].run.step == sides[1].run.step:
            raise UserError(
                f"both are the checkpoint of step {sides[0].run.step} of {sides[0].name}; name "
                f"another run, or two checkpoints, such as --checkpoint best last"
            )
        for side in sides:
            side.name += f" step {side.run.step}"
    return sides


def main(argv: list[str], prog: str) -> None:
    """Score the text and print what was found; jax is imported once the arguments are known."""
    command = parse_score(argv, prog)
    from gptjax.score import texts

    options = command.encoding, command.field, command.separator, note
    if command.text is not None:
        read = texts.of_string(command.text, command.separator)
    else:
        name = command.file or command.lines or ""
        read = texts.of_files(name, command.lines is not None, *options)
    from rich.console import Console

    from gptjax.cli.compilation_cache import use_compilation_cache
    from gptjax.score.files import replacing

    use_compilation_cache()
    sides = _sides(command)
    console = Console(highlight=False)
    if command.out is None:
        totals = _score(command, sides, read, console, None)
    else:
        with replacing(command.out) as file:
            totals = _score(command, sides, read, console, file)
    _print(command, sides, totals, console)
    if command.out is not None:
        note(f"written: {visible(str(command.out))}")


def _score(
    command: ScoreCommand,
    sides: list["Side"],
    read: Callable[[], Iterator[Piece]],
    console: "Console",
    file: IO[str] | None,
) -> list["Total"]:
    """Score the text; print the result of each line, and write the file, on the way.

    Returns:
        The sums of each run.

    Raises:
        UserError: a text that cannot be scored.
    """
    from gptjax.score import page, report
    from gptjax.score.files import writer
    from gptjax.score.score import Policy, Total

    as_page = command.suffix == ".html"
    policy = Policy(
        packed=command.lines is None and command.documents == "packed",
        stride=command.stride,
        special_tokens=command.special_tokens,
        unknown=command.unknown,
        alternatives=ON_PAGE * as_page if command.alternatives is None else command.alternatives,
    )
    keep = max(_shown(command, console), page.TOKENS * as_page)
    write = writer(file, command.suffix) if file and not as_page else None
    heads: deque[str] = deque()
    texts = _heads(read(), heads) if command.lines is not None else read(), read()
    found = [
        report.documents(side, text, policy, _notice_of(side.name), keep, write)
        for side, text in zip(sides, texts, strict=False)
    ]
    sums = [Total() for _ in sides]
    for i, totals in enumerate(zip(*found, strict=True)):
        sums = [a + b for a, b in zip(sums, totals, strict=True)]
        if command.lines is not None:
            _print_line(command, sides, i + 1, list(totals), heads.popleft(), console)
    if not all(total.predicted for total in sums):
        raise UserError(
            f"the text has too few tokens ({min(total.tokens for total in sums)}): nothing "
            f"predicts the first one of a document; give a document of two or more"
        )
    if file and as_page:
        what = command.file or command.lines or "text"
        remark = report.remark(sides, policy, page.TOKENS)
        pages = [page.Side(side.name, side.run.tokenizer, side.kept) for side in sides]
        file.write(page.page(f"{what}, scored", report.summary(sides, sums), remark, pages))
    return sums


def _notice_of(name: str) -> Callable[[str], None]:
    return lambda line: note(visible(f"{name}: {line}"))


def _shown(command: ScoreCommand, console: "Console") -> int:
    """Tokens to print."""
    if command.show is not None:
        return command.show
    return SHOWN * (console.is_terminal and not command.json and command.lines is None)


def _heads(pieces: Iterable[Piece], heads: deque[str]) -> Iterator[Piece]:
    """The pieces; the beginning of each document is appended to `heads`."""
    begins = True
    for piece in pieces:
        if begins:
            heads.append(piece.text[:HEAD])
        begins = piece.last
        yield piece


def _print_line(
    command: ScoreCommand,
    sides: list["Side"],
    number: int,
    totals: list["Total"],
    head: str,
    console: "Console",
) -> None:
    """Print the result of a line of the text."""
    from gptjax.score.report import as_json

    if command.json:
        print(json.dumps({"line": number, "runs": as_json(sides, totals)}))
        return
    if number == 1:
        names = "".join(f" {side.name[:9]:>9}" for side in sides)
        print(f"{'line':>6}{names}  (bits per byte)")
    figures = "".join(f" {total.bits_per_byte:9.4f}" for total in totals)
    begin = f"{number:>6}{figures.replace('nan', '  -')}  "
    room = console.width - len(begin) - 1 if console.is_terminal else HEAD
    print(begin + visible(head.replace("\n", " "))[: max(0, room)])


def _print(
    command: ScoreCommand, sides: list["Side"], totals: list["Total"], console: "Console"
) -> None:
    """Print the sums, and the text in colours."""
    from rich.table import Table
    from rich.text import Text

    from gptjax.console import print_table
    from gptjax.score import terminal
    from gptjax.score.cells import align
    from gptjax.score.report import as_json, summary

    if command.json:
        print(json.dumps({"runs": as_json(sides, totals)}))
        return
    head, *rows = summary(sides, totals)
    table = Table(box=None, pad_edge=False, show_header=len(sides) > 1)
    for i, name in enumerate(head):
        table.add_column(Text(visible(name)), justify="right" if i else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    print_table(table, console)
    if not (n := _shown(command, console)):
        return
    colour = console.color_system is not None
    shown = [side.kept[:n] for side in sides]
    segments = align(shown[0], shown[1]) if len(sides) == 2 else None
    if segments is not None:
        what = f"bits of {sides[1].name} minus those of {sides[0].name}"
        console.print(terminal.legend(what, terminal.DIFFERENCE, colour))
        console.print(terminal.difference(segments, colour))
        return
    if len(sides) == 2:
        note("the tokenizers decode to different texts; only the sums can be compared")
    for side, cells in zip(sides, shown, strict=True):
        what = f"bits of each token of {side.name}"
        console.print(terminal.legend(what, terminal.SURPRISE, colour))
        console.print(terminal.surprise(cells, colour))
