"""Train and compare all stages of the lecture: `gptjax ladder [--docs]`.

Each stage is a preset, and its runs are ordinary runs in runs/ladder/. Finished runs are kept, so
the command can be interrupted and repeated. Losses in the table are means over the whole validation
split, those of the curves over random windows.
"""

import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from gptjax.config import Config, differences
from gptjax.console import Report
from gptjax.errors import UserError
from gptjax.lecture.models import STAGES, CountedBigram, counted_bigram
from gptjax.parallel.flops import count_params, processor
from gptjax.pictures import figures
from gptjax.presets import LECTURE_MODELS, PRESETS
from gptjax.runs import files, folders
from gptjax.runs.records import Record
from gptjax.runs.run import Run, read_config
from gptjax.text.dataset import Dataset, open_dataset
from gptjax.training import train

# The lecture's validation losses, over 200 random batches: from its own run (bigram, at step
# 2,700), as commonly reported (3 to 7), and its final figure (8). It trains no averaging model.
FIGURES = {
    "1-bigram": "2.4911",
    "2-averaging": "-",
    "3-head": "2.40",
    "4-heads": "2.28",
    "5-feedforward": "2.24",
    "6-residual": "2.08",
    "7-layernorm": "2.06",
    "8-scale": "1.4873",
}
SCALE = "8-scale"  # takes hours without an accelerator, so it runs only with --scale
PAGE = Path("docs") / "lecture.md"
MARKERS = "<!-- made by gptjax ladder --docs -->", "<!-- end -->"
NOT_RUN = "not run here"


class Stage(NamedTuple):
    """One row of the table; a stage that was not run has empty lists."""

    name: str
    params: int
    losses: list[float]
    """Validation loss over the whole split, for each seed."""
    seconds: list[float]
    """Training time, for each seed."""
    histories: list[list[Record]]
    """Records of the evaluations, for each seed."""


def climb(
    console: Console,
    *,
    stages: Sequence[str] = (),
    scale: bool = False,
    seeds: int = 3,
    steps: int | None = None,
    text: str = "tiny_shakespeare",
    folder: Path = folders.RUNS / "ladder",
) -> tuple[list[Stage], CountedBigram]:
    """Train the stages that are not trained yet.

    Args:
        console: output for progress.
        stages: names from `FIGURES`; empty: all except 8-scale.
        scale: include 8-scale.
        seeds: number of runs per stage.
        steps: updates per run; None: the preset's.
        text: text to train on.
        folder: folder of the runs.

    Returns:
        All stages in order, and the best possible bigram table of the text.

    Raises:
        UserError: an unknown stage, or a folder with runs of other settings.
    """
    for flag, value in (("seeds", seeds), ("steps", steps)):
        if value is not None and value < 1:
            raise UserError(f"--{flag} {value} is too small; give 1 or more")
    wanted = _wanted(stages, scale)
    config = _config("1-bigram", 0, steps, text)
    dataset = open_dataset(config.data, config.model.block_size)
    counted = counted_bigram(dataset.train, dataset.val, dataset.tokenizer.vocab_size)
    found = []
    for name in FIGURES:
        params = _count_params(name, _config(name, 0, steps, text), dataset)
        found.append(stage := Stage(name, params, [], [], []))
        for i in range(seeds if name in wanted else 0):
            config, start = _config(name, i, steps, text), time.perf_counter()
            directory = folder / f"{name}-{config.seed}"
            history, before = _finished(name, config, directory)
            stage.histories.append(history)
            stage.losses.append(history[-1]["val_loss"])
            stage.seconds.append(history[-1]["seconds"])
            took = "" if before else f", {time.perf_counter() - start:.0f} s with evaluations"
            console.print(f"{directory}: {stage.losses[-1]:.4f}{took}")
    return found, counted


def _wanted(stages: Sequence[str], scale: bool) -> set[str]:
    if unknown := [name for name in stages if name not in FIGURES]:
        raise UserError(f"unknown stage {unknown[0]!r}; stages: {', '.join(FIGURES)}")
    return set(stages or FIGURES.keys() - {SCALE}) | ({SCALE} if scale else set())


def _config(name: str, i: int, steps: int | None, text: str) -> Config:
    """The stage's preset with these steps and this text, and the i-th seed."""
    preset = PRESETS[f"lecture/{name}"]
    steps = steps or preset.steps
    return replace(
        preset,
        seed=preset.seed + i,
        steps=steps,
        eval_every=max(1, preset.eval_every * steps // preset.steps),
        data=replace(preset.data, text=text),
    )


def _count_params(name: str, config: Config, dataset: Dataset) -> int:
    model = _model(name)(config.model, dataset.tokenizer.vocab_size)
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    return count_params(jax.eval_shape(model.init, jax.random.key(0), tokens)["params"])


def _model(name: str) -> type[nn.Module]:
    return STAGES[LECTURE_MODELS[f"lecture/{name}"]]


def _finished(name: str, config: Config, directory: Path) -> tuple[list[Record], bool]:
    """The evaluations of a run, trained or resumed if necessary; and whether it was complete."""
    resume = (directory / "config.json").exists()
    if resume:
        changed = differences(read_config(directory), config)
        for field, (old, new) in changed.items():
            raise UserError(
                f"{directory} holds a run with {field}={old}, not {new}; remove it, or give "
                f"another --folder"
            )
    done = resume and _is_done(Run(directory).metrics(), config)
    if not done:
        train(config, directory, resume=resume, model=_model(name), report=Report(quiet=True))
    records = Run(directory).metrics()
    if not _is_done(records, config):
        raise UserError(f"{directory} was stopped; repeat the command to continue")
    return [record for record in records if "val_sampled_loss" in record], done


def _is_done(records: list[Record], config: Config) -> bool:
    return bool(records) and records[-1]["step"] == config.steps and "val_loss" in records[-1]


# ---------------------------------------------------------------------------------------------
# Output


def rows(stages: Sequence[Stage]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table, as text."""
    head = ["stage", "parameters", "lecture", "ours", "spread", "seconds"]
    body = []
    for stage in stages:
        cells = [stage.name, f"{stage.params:,}", FIGURES[stage.name]]
        if stage.losses:
            spread = max(stage.losses) - min(stage.losses)
            cells += [f"{np.mean(stage.losses):.4f}", f"{spread:.4f}"]
            cells += [f"{np.mean(stage.seconds):.1f}"]
        else:
            cells += [NOT_RUN, "", ""]
        body.append(cells)
    return head, body


def footnotes(seeds: int, counted: CountedBigram) -> list[str]:
    """Footnotes of the table."""
    how_many = "one seed" if seeds == 1 else f"{seeds} seeds"
    return [
        f"ours: validation loss over the whole split, mean of {how_many}; spread: largest minus "
        f"smallest; seconds: training time of one run, including compilation; {machine()}.",
        "lecture: over 200 random batches; 3 to 7 as commonly reported.",
        f"Optimal bigram table, from counts: {counted.train:.4f} on the training split, "
        f"{counted.val:.4f} on the validation split (add-one smoothing, because {counted.unseen:,} "
        f"of its pairs never occur in training); table fitted to the validation split itself: "
        f"{counted.floor:.4f}.",
    ]


def bigram_rows(stages: Sequence[Stage]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the bigram's evaluations with the first seed, beside the lecture's."""
    head = ["step", "train, lecture", "train, ours", "val, lecture", "val, ours"]
    body = []
    for record in itertools.chain.from_iterable(stages[0].histories[:1]):
        ours = [f"{record[f'{split}_sampled_loss']:.4f}" for split in ("train", "val")]
        theirs = [f"{loss:.4f}" for loss in BIGRAM_RUN.get(record["step"], ())] or ["", ""]
        body.append([str(record["step"]), theirs[0], ours[0], theirs[1], ours[1]])
    return head, body


# The lecture's own run of the bigram: step, training and validation loss.
BIGRAM_RUN = {
    0: (4.7305, 4.7241),
    300: (2.8110, 2.8249),
    600: (2.5434, 2.5682),
    900: (2.4932, 2.5088),
    1200: (2.4863, 2.5035),
    1500: (2.4665, 2.4921),
    1800: (2.4683, 2.4936),
    2100: (2.4696, 2.4846),
    2400: (2.4638, 2.4879),
    2700: (2.4738, 2.4911),
}


def machine() -> str:
    """Name and number of the devices."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        return f"{jax.device_count()} x {device.device_kind}"
    return processor()


def markdown(head: list[str], body: list[list[str]]) -> str:
    """A Markdown table, its first column left-aligned."""
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *body]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _tell(console: Console, title: str, head: list[str], body: list[list[str]]) -> None:
    table = Table(title=title, title_justify="left", box=None)
    for i, name in enumerate(head):
        table.add_column(name, justify="right" if i else "left", no_wrap=True)
    for cells in body:
        table.add_row(*cells)
    console.print(table)


def draw(stages: Sequence[Stage], counted: CountedBigram, out: Path) -> None:
    """Plot validation loss over steps: a line for each stage, shaded over the range of its seeds.

    Raises:
        UserError: the plot cannot be written.
    """
    figure = figures.new_figure(8.5, 4.8)
    axes = figure.subplots()
    ends, last = [], 0
    for i, stage in enumerate(stage for stage in stages if stage.histories):
        steps = [record["step"] for record in stage.histories[0]]
        losses = np.array([[r["val_sampled_loss"] for r in history] for history in stage.histories])
        look = figures.line(i) | figures.marks(i)
        axes.fill_between(
            steps, losses.min(axis=0), losses.max(axis=0), color=look["color"], alpha=0.25
        )
        middle = losses.mean(axis=0)
        axes.plot(steps, middle, **look, linewidth=1)
        name = f"{stage.name}  {np.mean(stage.losses):.3f}"
        ends.append(figures.End(steps[-1], middle[-1], name, look))
        last = max(last, steps[-1])
    axes.axhline(counted.val, color="black", linestyle=":", linewidth=1)
    look = {"color": "black", "linestyle": ":"}
    ends.append(figures.End(last, counted.val, f"counted bigrams  {counted.val:.3f}", look))
    values = [end.y for end in ends]
    top = max(values) + 0.4
    axes.set(xlabel="training step", ylabel="validation loss (nats per character)")
    axes.set(xlim=(0, last * 1.02), ylim=(min(values) - 0.08, top))
    axes.set_title("The lecture's stages: each adds one part to the one before", fontsize="medium")
    axes.grid(alpha=0.25)
    figures.note(
        figure,
        "Markers: evaluations on random windows of the validation split, mean of the seeds; bands: "
        "lowest to highest seed. Numbers: the last loss, over the whole split. Dotted: the best "
        f"bigram table, counted. The axis ends at {top:.1f}; untrained models lie above it.",
    )
    figures.label_ends(axes, ends)
    figures.save(figure, out)


def write_page(text: str, page: Path = PAGE) -> None:
    """Replace the text between the page's markers.

    Raises:
        UserError: the page or its markers are missing.
    """
    start, end = MARKERS
    try:
        before, found, rest = page.read_text(encoding="utf-8").partition(start)
    except OSError as error:
        raise UserError(
            f"cannot read {page}: {error.strerror}; run this from the repository's root"
        ) from None
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise UserError(f"{page} lacks the lines {start} and {end}; add them around the table")
    files.write_atomically(page, f"{before}{start}\n{text}{end}{after}")


def _page_text(stages: Sequence[Stage], notes: list[str]) -> Iterator[str]:
    yield f"{markdown(*rows(stages))}\n"
    yield "".join(f"- {note}\n" for note in notes)
    yield f"\n![Validation loss of each stage over its steps]({PAGE.stem}.png)\n"
    if (evaluations := bigram_rows(stages))[1]:
        yield f"\nThe bigram's evaluations, seed 1337:\n\n{markdown(*evaluations)}"


def show(stages: Sequence[Stage], counted: CountedBigram, seeds: int, console: Console) -> None:
    """Print the table, its footnotes, and the bigram's evaluations."""
    _tell(console, "The lecture's stages", *rows(stages))
    for note in footnotes(seeds, counted):
        console.print(note)
    if (evaluations := bigram_rows(stages))[1]:
        _tell(console, "The bigram's evaluations, first seed", *evaluations)


def update_page(stages: Sequence[Stage], counted: CountedBigram, seeds: int) -> Path:
    """Write the tables into `PAGE`.

    Returns:
        The path of the page's picture.

    Raises:
        UserError: see `write_page`.
    """
    write_page("".join(_page_text(stages, footnotes(seeds, counted))))
    return PAGE.with_suffix(".png")
