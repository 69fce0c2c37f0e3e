"""What differs between two runs: the library of `gptjax diff`. Nothing is written."""

import hashlib
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

from gptjax.config import differences
from gptjax.errors import UserError
from gptjax.runs import config_json, environment, files, folders, records

METRICS = "metrics.jsonl"
SHOWN = 6  # steps at which each loss is compared in print
LOSSES = {"loss": "train", "val_loss": "val", "val_sampled_loss": "~val"}  # ~: sampled batches
UNKNOWN = "unknown"
TRAINING, VALIDATION = "training tokens", "validation tokens"
OF_A_START = {"time", "step", "parameters"}  # of an entry of environment.json

Pair = tuple[Any, Any]


class Comparison(NamedTuple):
    """Two runs side by side; of each pair the first value is the first run's.

    Attributes:
        settings: the settings and own parts that differ, by name.
        data: what differs of the tokenizer and of the tokens, by name; "unknown" where a run has no
            checkpoint that tells.
        environment: what differs of where they were trained, by name. Several values of one run,
            which was resumed elsewhere, are a list.
        steps: the last step of each; None: it has none.
        common: the number of steps that both have.
        unequal_at: the first of them at which a loss differs; None: there is none.
        losses: at some of them, (name, step, loss, loss); the last one is among them.
    """

    settings: dict[str, Pair]
    data: dict[str, Pair]
    environment: dict[str, Pair]
    steps: Pair
    common: int
    unequal_at: int | None
    losses: list[tuple[str, int, float, float]]

    @property
    def same(self) -> bool:
        """Whether settings and data are the same, and every loss at every common step. The
        environments may differ: that is then a reproduction."""
        return not self.settings and not self.other_data and self.unequal_at is None

    @property
    def other_data(self) -> bool:
        """Whether the data are known to differ."""
        return any(UNKNOWN not in pair for pair in self.data.values())


def compare(a: Path, b: Path) -> Comparison:
    """Compare two runs.

    Raises:
        UserError: a config that is missing, damaged or of another version.
    """
    stored = [files.read_file(run / folders.CONFIG, config_json.from_json) for run in (a, b)]
    settings = differences(stored[0].config, stored[1].config)
    parts = _unequal(stored[0].parts, stored[1].parts)
    where = [_where(run) for run in (a, b)]
    if not all(where):
        where = [{environment.NAME: "recorded" if found else "not recorded"} for found in where]
    found = [{r["step"]: r for r in records.read(run / METRICS)[0]} for run in (a, b)]
    common = sorted(found[0].keys() & found[1].keys())
    unequal = (step for step in common if _differ(found[0][step], found[1][step]))
    return Comparison(
        settings | {f"own {name}": pair for name, pair in parts.items()},
        _unequal(_data(a), _data(b)),
        _unequal(*where),
        (max(found[0], default=None), max(found[1], default=None)),
        len(common),
        next(unequal, None),
        [loss for key in LOSSES for loss in _at_some(key, common, *found)],
    )


def _unequal(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Pair]:
    names = dict.fromkeys((*a, *b))
    return {name: (a.get(name), b.get(name)) for name in names if a.get(name) != b.get(name)}


def _differ(a: records.Record, b: records.Record) -> bool:
    """Whether two records of a step have another loss. Runs may be evaluated at other steps."""
    evaluated = [key for key in LOSSES if key in a and key in b]
    return any(a.get(key) != b.get(key) for key in ("loss", *evaluated))


def _at_some(key: str, common: list[int], *found: dict[int, records.Record]) -> list[Any]:
    """(name, step, loss, loss) at up to SHOWN of the steps at which both runs have a loss."""
    number = lambda x: isinstance(x, int | float) and math.isfinite(x)
    steps = [step for step in common if all(number(run[step].get(key)) for run in found)]
    last, places = len(steps) - 1, min(SHOWN, len(steps))
    some = {steps[round(i * last / max(1, places - 1))] for i in range(1, places)} | {*steps[-1:]}
    return [(LOSSES[key], s, *(float(run[s][key]) for run in found)) for s in sorted(some)]


def _data(run: Path) -> dict[str, Any]:
    """The tokenizer and the tokens that a run was trained on, as far as its files tell."""
    found: dict[str, Any] = {}
    try:
        text = files.read_file(run / folders.TOKENIZER, str)
        kind = json.loads(text).get("type")
        found["tokenizer"] = f"{kind}, sha256 {hashlib.sha256(text.encode()).hexdigest()[:12]}"
    except (UserError, ValueError, AttributeError, RecursionError):
        found["tokenizer"] = UNKNOWN
    for _, text in folders.copies(run, folders.TEXT):
        try:
            values = json.loads(text)
            if isinstance(values, dict):  # batches of the caller's own
                return found | {name: str(value)[:12] for name, value in values.items()}
            splits = [f"{x['tokens']:,}, sha256 {x['sha256'][:12]}" for x in values]
            return found | {TRAINING: "; ".join(splits[:-1]), VALIDATION: splits[-1]}
        except (ValueError, LookupError, TypeError, RecursionError):
            break
    return found | {TRAINING: UNKNOWN, VALIDATION: UNKNOWN}


def _where(run: Path) -> dict[str, Any]:
    """What the entries of `environment.json` say, by names such as "versions.jax"."""
    values: dict[str, list[Any]] = {}
    try:
        entries = environment.read(run)
    except UserError:
        return {}
    for entry in entries:
        for name, value in _flat(entry).items():
            seen = values.setdefault(name, [])
            if value not in seen:
                seen.append(value)
    return {name: seen[0] if len(seen) == 1 else seen for name, seen in values.items()}


def _flat(entry: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in entry.items():
        if not prefix and name in OF_A_START:
            continue
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{name}.")
        elif isinstance(value, list):
            found[prefix + name] = " ".join(map(str, value))
        else:
            found[prefix + name] = value
    return found
