"""What the folders of runs say of themselves: the library of `gptjax runs`.

A run that is half written, damaged or of another version gives what can be read of it, and says
what cannot. Nothing is written, and no jax is needed.
"""

import json
import math
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gptjax.config import Config, ModelConfig, differences
from gptjax.errors import UserError
from gptjax.presets import LECTURE_MODELS, PRESETS
from gptjax.runs import config_json, environment, files, folders, records
from gptjax.text import tokenizers

FILES = (folders.CONFIG, folders.TOKENIZER, "metrics.jsonl", "checkpoints", folders.LOCK)
FAR = 12  # settings in which a run differs from every preset, to be called a run of none
WHOLE, SAMPLED, TRAINING = "whole validation split", "sampled validation batches", "training batch"
SOURCES = {"val_loss": WHOLE, "val_sampled_loss": SAMPLED, "loss": TRAINING}


@dataclass(frozen=True)
class Listed:
    """A run in the list; None: unknown."""

    name: str
    """Of the folder."""
    folder: str
    """Its path."""
    preset: str | None = None
    """The nearest preset, "small +2" if two settings differ from it; or the config file of a run
    with parts of its own."""
    state: str = "stopped"
    """running, complete, stopped, empty (no step is logged), or unreadable (its config is)."""
    step: int | None = None
    """The last one in its metrics."""
    steps: int | None = None
    """Of the whole run."""
    parameters: int | None = None
    """Of its model."""
    loss: float | None = None
    """The lowest validation loss, in nats per token; without any, the last training loss."""
    loss_kind: str | None = None
    """What it was measured on: one of `SOURCES`."""
    loss_step: int | None = None
    """The step it was measured after."""
    changed: float | None = None
    """When something was last logged, in seconds since 1970."""
    bytes: int = 0
    """Size of its files."""
    version: str | None = None
    """Of the gptjax that wrote its config."""
    problem: str | None = None
    """What cannot be read, if anything."""


def find(places: list[Path]) -> list[Path]:
    """The folders of runs, half-written ones too.

    Args:
        places: folders of runs, or folders that contain such.

    Raises:
        UserError: one is no folder, or cannot be read.
    """
    found: list[Path] = []
    for place in places:
        if not os.path.isdir(place):
            raise UserError(f"{place} is not a folder; give one that contains runs, or a run's own")
        try:
            inside = sorted(path for path in place.iterdir() if path.is_dir())
        except OSError as error:
            raise UserError(f"cannot read {place}: {error.strerror}") from None
        found += [place] if _looks_like_a_run(place) else filter(_looks_like_a_run, inside)
    return found


def describe(folder: Path) -> Listed:
    """What can be read of a run."""
    listed = Listed(folder.absolute().name, str(folder), bytes=_size(folder))
    problems: list[str] = []
    config, parts = None, {}
    try:
        text = _text(folder, folders.CONFIG)
        values = _lenient(text)
        known = lambda name, kind: values[name] if type(values.get(name)) is kind else None
        listed = replace(listed, steps=known("steps", int), version=known("gptjax", str))
        config, parts = config_json.from_json(text)
    except (UserError, OSError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        place = "" if folders.CONFIG in reason else f"{folders.CONFIG}: "
        problems.append(f"{place}{reason}")
    try:
        listed = replace(listed, **_progress(folder / "metrics.jsonl"))
    except OSError as error:
        problems.append(f"metrics.jsonl: {error.strerror}")
    state = "stopped" if listed.step is not None else "empty"
    if folders.is_locked(folder):
        state = "running"
    elif config is None:
        state = "unreadable"
    elif listed.step is not None and listed.step == listed.steps:
        state = "complete"
    return replace(
        listed,
        state=state,
        preset=config and _preset(config, parts),
        parameters=_parameters(folder, config, parts),
        changed=_changed(folder),
        problem="; ".join(problems) or None,
    )


def nearest_preset(config: Config, model: str | None = None) -> tuple[str, int] | None:
    """The preset from which a config differs in the fewest settings, and in how many.

    Args:
        config: of a run.
        model: the model that the run trained, if not the config's GPT.

    Returns:
        None if even the nearest is FAR.
    """
    candidates = {
        name: len(differences(preset, config))
        for name, preset in PRESETS.items()
        if model is None or LECTURE_MODELS.get(name) == model
    }
    if model is None:
        candidates = {name: n for name, n in candidates.items() if name not in LECTURE_MODELS}
    nearest = min(candidates, key=lambda name: candidates[name], default="")
    return (nearest, candidates[nearest]) if candidates.get(nearest, FAR) < FAR else None


def count_parameters(m: ModelConfig, vocab_size: int) -> int:
    """The number of a GPT's parameters, as `GPT` makes them.

    Args:
        m: the network.
        vocab_size: rows of the embedding table.
    """
    C, D, T, V = m.n_embd, m.head_size, m.block_size, vocab_size
    H, G, F = m.n_head, m.n_kv_head or m.n_head, m.n_inner or 4 * C
    read, up = (H + 2 * G) * D, F * (2 if m.activation == "swiglu" else 1)
    norm = C * (2 if m.norm == "layer" and m.bias else 1)
    attention = C * read + H * D * C + 2 * D * m.qk_norm_scale
    attention += read * (m.bias if m.attn_bias is None else m.attn_bias) + C * m.bias
    mlp = C * up + F * C + (up + C) * m.bias
    tables = V * C * (1 if m.tie_head else 2) + T * C * (m.position == "learned")
    return m.n_layer * (attention + mlp + 2 * norm) + norm + tables


def _looks_like_a_run(folder: Path) -> bool:
    """Whether a folder has a file of a run, or cannot be read."""
    try:
        return not set(FILES).isdisjoint(os.listdir(folder))
    except OSError:
        return True


def _text(folder: Path, name: str) -> str:
    """A small file of a run, or an intact copy of it.

    Raises:
        OSError, UserError: there is neither.
    """
    try:
        return files.read_file(folder / name, str)
    except UserError:
        for _, text in folders.copies(folder, name):
            return text
        raise


def _lenient(text: str) -> dict[str, Any]:
    """The values in a JSON object, whatever they are; none of what is no such object."""
    with suppress(ValueError, RecursionError):
        values = json.loads(text)
        return values if isinstance(values, dict) else {}
    return {}


def _progress(metrics: Path) -> dict[str, Any]:
    """How far a run is, and its loss. Only the lines with a validation loss, and the last one, are
    parsed: there may be millions.

    Raises:
        OSError: there is a file that cannot be read.
    """
    last, lowest = b"", {}
    if not metrics.exists():
        return {}
    files.check_regular(metrics)
    with metrics.open("rb") as file:
        for line in _lines(file):
            last = line
            if b'"val_' not in line or not (record := _record(line)):
                continue
            for key in ("val_loss", "val_sampled_loss"):
                value = record.get(key)
                if value is not None and math.isfinite(value):
                    lowest[key] = min(lowest.get(key, (math.inf, 0)), (value, record["step"]))
    if not (record := _record(last)):
        return {}
    found: dict[str, Any] = {"step": record["step"]}
    if not lowest and isinstance(record.get("loss"), float) and math.isfinite(record["loss"]):
        lowest = {"loss": (record["loss"], record["step"])}
    for key, kind in SOURCES.items():
        if key in lowest:
            loss, step = lowest[key]
            return {**found, "loss": loss, "loss_kind": kind, "loss_step": step}
    return found


def _lines(file: Any) -> Iterator[bytes]:
    """Whole lines; a last one without an end is still being written."""
    for line in iter(lambda: file.readline(records.MAX_LINE), b""):
        if line.endswith(b"\n"):
            yield line


def _record(line: bytes) -> records.Record | None:
    with suppress(ValueError, RecursionError):
        return records.as_record(json.loads(line))
    return None


def _preset(config: Config, parts: dict[str, str]) -> str | None:
    if "config" in parts:
        return parts["config"]
    found = nearest_preset(config, parts.get("model"))
    return found and found[0] + f" +{found[1]}" * bool(found[1])


def _parameters(folder: Path, config: Config | None, parts: dict[str, str]) -> int | None:
    """As the run recorded it; of a GPT of an earlier version, by its config."""
    with suppress(UserError, OSError, IndexError, KeyError):
        count = environment.read(folder)[-1]["parameters"]
        return count if type(count) is int else None
    if config is None or "model" in parts:
        return None
    with suppress(UserError, OSError):
        rows = config.model.vocab_size
        rows = rows or tokenizers.from_json(_text(folder, folders.TOKENIZER)).vocab_size
        return count_parameters(config.model, rows)
    return None


def _changed(folder: Path) -> float | None:
    for name in ("metrics.jsonl", folders.CONFIG, ""):
        with suppress(OSError):
            return (folder / name).stat().st_mtime
    return None


def _size(folder: Path) -> int:
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):  # pruned meanwhile
                total += os.lstat(os.path.join(parent, name)).st_size
    return total
