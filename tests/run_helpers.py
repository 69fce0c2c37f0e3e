"""Helpers of the tests that train: run folders, signals, refusals, a model of one's own."""

import io
import json
import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import by_path

from gptjax.cli.main import main
from gptjax.config import Config, DataConfig, MeshConfig, ModelConfig, OptimConfig
from gptjax.console import Report
from gptjax.errors import UserError
from gptjax.runs import samples

QUIET = Report(quiet=True)
CONFIG = Config(
    steps=8,
    batch_size=4,
    eval_every=4,
    save_every=4,
    steps_per_dispatch=3,
    sample_tokens=8,
    model=ModelConfig(n_layer=1, n_head=1, n_embd=8, block_size=8, dropout=0.1),
    optim=OptimConfig(learning_rate=1e-2),
    mesh=MeshConfig(data=1),
)


def message(function: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    """The one line with which a call is refused."""
    with pytest.raises(UserError) as caught:
        function(*args, **kwargs)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def text_file(folder: Path, text: str) -> DataConfig:
    """The config of a text that is written to a file."""
    (folder / "play.txt").write_text(text, encoding="utf-8")
    return DataConfig(text=str(folder / "play.txt"))


def assert_same(a: Any, b: Any) -> None:
    """Bit for bit."""
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y, strict=True), a, b)


def assert_close(a: Any, b: Any, atol: float) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=atol, rtol=0), a, b)


class SignalAt(Report):
    """A report that sends this process a signal once a step is reached."""

    def __init__(self, at: int, number: int = signal.SIGTERM):
        super().__init__(quiet=True)
        self.at, self.number = at, number

    def step(self, step: int, loss: float, seconds: float) -> None:
        if self.at is not None and step >= self.at:
            self.at = None
            os.kill(os.getpid(), self.number)


def records(directory: Path) -> list[dict[str, Any]]:
    """The metrics without their times, which differ from run to run; every line is strict JSON."""
    strict = lambda constant: pytest.fail(f"{constant} is not JSON")
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    found = [json.loads(line, parse_constant=strict) for line in lines]
    return [{k: v for k, v in record.items() if k != "seconds"} for record in found]


def arrays(directory: Path, step: int) -> dict[str, np.ndarray]:
    """Every array of a checkpoint by its path, read without gptjax."""
    from orbax.checkpoint import v1 as ocp

    folder = directory.absolute() / "checkpoints" / str(step)
    metadata = ocp.checkpointables_metadata(str(folder)).metadata
    wanted = {name: metadata[name] for name in ("params", "training")}
    empty = jax.tree.map(lambda m: np.empty(m.shape, m.dtype) if hasattr(m, "shape") else 0, wanted)
    loaded = ocp.load_checkpointables(str(folder), empty)
    return {name: np.asarray(x) for name, x in by_path(loaded).items()}


def assert_same_run(a: Path, b: Path, step: int) -> None:
    """Metrics but for the seconds, samples, and all arrays of a checkpoint, bit for bit."""
    assert records(a) == records(b)
    assert samples.read(a) == samples.read(b)
    first, second = arrays(a, step), arrays(b, step)
    assert first.keys() == second.keys()
    for name, x in first.items():
        assert x.tobytes() == second[name].tobytes(), name


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def on_terminal(width: int, *argv: str) -> list[str]:
    """The lines that a command prints on a terminal of that width, without its colours."""
    output = Terminal()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", str(width))
        patch.setattr(sys, "stdout", output)
        main(list(argv))
    text = re.sub(r"\x1b\[[0-9;]*m", "", output.getvalue())
    return [line.rstrip() for line in text.splitlines()]


def contents(directory: Path) -> dict[str, bytes]:
    """Every file of a folder: what a refused command must leave as it was. The lock is no part."""
    paths = sorted(p for p in directory.rglob("*") if p.is_file() and p.name != ".lock")
    return {str(path.relative_to(directory)): path.read_bytes() for path in paths}


class MeanOfThePast(nn.Module):
    """A model of one's own: no more than the contract in `gptjax/model.py` asks of a module."""

    config: ModelConfig
    vocab_size: int

    @nn.compact
    def __call__(self, tokens: jax.Array, cache: None = None, train: bool = False) -> Any:
        x = nn.Embed(self.vocab_size, 8)(tokens)
        mean = jnp.cumsum(x, axis=1) / jnp.arange(1, tokens.shape[1] + 1)[None, :, None]
        x = nn.Dropout(0.1, deterministic=not train)(nn.relu(jnp.concatenate([x, mean], -1)))
        return nn.Dense(self.vocab_size)(x), None

    @nn.nowrap
    def init_cache(self, batch: int) -> None:
        return None
