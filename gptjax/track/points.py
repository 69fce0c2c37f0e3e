"""A run's records as points of curves, under the names that users of trackers expect."""

from collections.abc import Mapping
from typing import NamedTuple

from gptjax.runs.records import Record

NAMES = {"loss": "train/loss"}
SECTIONS = {"train_sampled_": "train/sampled_", "val_": "val/"}
RATE_EVERY = 0.5  # seconds of training, at least, between points of the rate


class Point(NamedTuple):
    """The values of a step.

    Attributes:
        step: of the record.
        seconds: of training up to it.
        values: numbers by name.
        text: the sample of the step, if there is one.
    """

    step: int
    seconds: float
    values: dict[str, float]
    text: str | None = None


def named(record: Record) -> dict[str, float]:
    """The numbers of a record by the names that trackers show; 1 for a skipped step."""
    values: dict[str, float] = {}
    for name, value in record.items():
        if name == "skipped":
            values[name] = 1.0
        elif isinstance(value, int | float) and name not in ("step", "seconds"):
            section = next((s for s in SECTIONS if name.startswith(s)), "")
            name = NAMES.get(name, SECTIONS.get(section, "") + name.removeprefix(section))
            values[name] = float(value)
    return values


class Curve:
    """Makes points of a run's records, in order; knows the rate from the times in them.

    The steps of one dispatch have the same time, so a rate is taken from the first of such steps
    to the first of later ones.

    Args:
        tokens_per_step: of a batch.
        peaks: tokens per second at an MFU of 1, by the step from which they hold.
    """

    def __init__(self, tokens_per_step: int, peaks: Mapping[int, float]):
        self._tokens, self._peaks = tokens_per_step, sorted(peaks.items())
        self._since: tuple[int, float] | None = None

    def point(self, record: Record, text: str | None = None) -> Point:
        """The record's point, with "tokens" and, where time has passed, "tokens_per_second" and
        "mfu"; `text` is the sample of the step."""
        step, seconds = record["step"], record.get("seconds") or 0.0
        values = named(record) | {"tokens": float(step * self._tokens)}
        if self._since is None or seconds < self._since[1]:
            self._since = step, seconds
        elif (passed := seconds - self._since[1]) >= RATE_EVERY:
            rate = (step - self._since[0]) * self._tokens / passed
            self._since = step, seconds
            values["tokens_per_second"] = rate
            if found := [peak for first, peak in self._peaks if first < step]:
                values["mfu"] = rate / found[-1]
        return Point(step, seconds, values, text)
