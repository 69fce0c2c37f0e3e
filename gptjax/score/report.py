"""One run or two on the same text: the sums of each document, and what is kept to be shown."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from gptjax.console import rounded
from gptjax.runs.loaded import LoadedRun
from gptjax.score.cells import Cell, cells
from gptjax.score.files import Row, number, rows
from gptjax.score.score import Policy, Total, score, total
from gptjax.score.windows import Scored
from gptjax.text.sources import Piece


@dataclass
class Side:
    """A run and what is known of a text by it.

    Attributes:
        name: of the run, for people.
        run: opened.
        kept: the first cells of the text.
    """

    name: str
    run: LoadedRun
    kept: list[Cell] = field(default_factory=list)


def documents(
    side: Side,
    pieces: Iterable[Piece],
    policy: Policy,
    notice: Callable[[str], None],
    keep: int = 0,
    write: Callable[[Row], None] | None = None,
) -> Iterator[Total]:
    """Score a text, and give the sums of each of its streams as soon as it is read.

    Args:
        side: the run; its `kept` is filled.
        pieces, policy, notice: see `score`.
        keep: cells to keep, from the beginning.
        write: called with each token, see `files.rows`; None: with none.
    """
    sums = Total()
    ended: deque[Total] = deque()  # streams, whose sums have yet to be given

    def counted() -> Iterator[Scored]:
        nonlocal sums
        for part in score(side.run, pieces, policy, notice):
            sums = sums + total(side.run, part)
            if part.last:
                ended.append(sums)
                sums = Total()
            yield part

    def ready() -> Iterator[Total]:
        while ended:
            yield ended.popleft()

    parts = counted()
    if keep or write:
        for cell in cells(side.run.tokenizer, parts):
            if len(side.kept) < keep:
                side.kept.append(cell)
            elif write is None:
                break
            if write is not None:
                for row in rows(side.name, side.run.tokenizer, cell):
                    write(row)
            yield from ready()
    for _ in parts:
        yield from ready()
    yield from ready()


def as_json(sides: list[Side], totals: list[Total]) -> list[dict[str, Any]]:
    """The sums of each run as JSON has them; null for what is not a finite number."""
    return [
        {
            "run": side.name,
            "checkpoint": side.run.step,
            "loss": number(sums.loss),
            "perplexity": number(sums.perplexity),
            "bits_per_byte": number(sums.bits_per_byte),
            "tokens": sums.tokens,
            "predicted": sums.predicted,
            "bytes": sums.n_bytes,
        }
        for side, sums in zip(sides, totals, strict=True)
    ]


def summary(sides: list[Side], totals: list[Total]) -> list[tuple[str, ...]]:
    """The same as rows of a table for people; the first one has the runs' names."""
    return [
        ("", *(side.name for side in sides)),
        ("loss (nats per token)", *(f"{sums.loss:.4f}" for sums in totals)),
        ("perplexity", *(rounded(sums.perplexity) for sums in totals)),
        ("bits per byte", *(f"{sums.bits_per_byte:.4f}" for sums in totals)),
        ("tokens", *(f"{sums.tokens:,}" for sums in totals)),
        ("of them predicted", *(f"{sums.predicted:,}" for sums in totals)),
        ("bytes predicted", *(f"{sums.n_bytes:,}" for sums in totals)),
        ("checkpoint", *(f"step {side.run.step:,}" for side in sides)),
    ]


def remark(sides: list[Side], policy: Policy, most: int) -> str:
    """How the text was read, and how much of it the first `most` cells are."""
    found = []
    for side in sides:
        T = side.run.config.model.block_size
        stride = policy.stride_of(T)
        found.append(
            f"{side.name}: windows of {T} tokens, {stride} apart, so that a token is predicted "
            f"from all before it or from {T - stride + 1} and more."
        )
        if len(side.kept) == most:
            found.append(f"Only the first {most:,} tokens are shown.")
    return " ".join(found)
