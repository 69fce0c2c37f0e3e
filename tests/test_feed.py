"""Tests of the batches: the same ones wherever the tokens lie, however many processes ask."""

import json
import re
import signal
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console
from test_training import TINY, SignalAt, arrays, records

from gptjax import feed
from gptjax.config import Config, DataConfig, ModelConfig
from gptjax.console import Report
from gptjax.errors import UserError
from gptjax.parallel import flops
from gptjax.programs import Programs
from gptjax.step import Batches, batch_at
from gptjax.text.dataset import open_dataset
from gptjax.tools.replay import replay
from gptjax.training import train

CONFIG = Config(
    batch_size=8, seed=5, model=ModelConfig(n_layer=1, n_head=1, n_embd=4, block_size=16)
)
SHUFFLED = replace(CONFIG, data=DataConfig(order="shuffled"))
TOKENS = np.random.default_rng(0).integers(0, 2**16, 5000).astype(np.uint16)
QUIET = Report(quiet=True)


def test_random_batches_are_those_that_the_device_cuts(tmp_path):
    path = tmp_path / "train.bin"
    path.write_bytes(TOKENS.tobytes())
    mapped = np.memmap(path, np.uint16, "r")
    rows = feed.random_rows(CONFIG, mapped, 3, 4)
    assert rows.shape == (4, 8, 17) and rows.dtype == np.uint16
    for i in range(4):
        batch = batch_at(CONFIG, jnp.asarray(TOKENS), jax.random.key(5), 3 + i)
        np.testing.assert_array_equal(rows[i], batch)


@pytest.mark.parametrize("kind", ["random", "shuffled"])
def test_processes_share_the_batches_that_one_would_make(kind: str):
    if kind == "shuffled":
        pytest.importorskip("grain", reason="needs the extra text")
        rows = feed.shuffled_rows(SHUFFLED, ((TOKENS, 1.0),))
    else:
        rows = lambda *args: feed.random_rows(CONFIG, TOKENS, *args)
    whole = rows(7, 3)
    for size in (4, 2, 1):
        shares = [rows(7, 3, slice(i, i + size)) for i in range(0, 8, size)]
        assert shares[0].shape == (3, size, 17)
        np.testing.assert_array_equal(np.concatenate(shares, axis=1), whole)
    np.testing.assert_array_equal(rows(8, 1)[0], whole[1])  # whatever else was asked for


def test_batches_train_only_the_state_that_they_were_made_for():
    """A call that was sent ahead finds the state before a step that was skipped: it must not train
    on the batches of later steps."""
    programs = Programs(CONFIG, 2**16)
    rows = jnp.asarray(feed.random_rows(CONFIG, TOKENS, 3, 8))
    state = programs.start()
    before = jax.device_get(state)
    state, _ = programs.train_steps(state, Batches(3, rows), programs.seed_key, 8)
    jax.tree.map(np.testing.assert_array_equal, before, jax.device_get(state))
    state, _ = programs.train_steps(state, Batches(0, rows), programs.seed_key, 2)
    assert int(state.step) == 2


def test_starts_beyond_32_bits():
    """As far as they can be tested without a file of 4 GB and more."""
    n = 2**40
    starts = feed._starts(replace(CONFIG, batch_size=1000), n, 0, 3)
    assert starts.shape == (3, 1000) and starts.dtype == np.int64
    assert starts.min() >= 0 and starts.max() < n - CONFIG.model.block_size
    shares, _ = np.histogram(starts, bins=10, range=(0, n))
    assert np.abs(shares - 300).max() < 5 * np.sqrt(300)
    low, _ = np.histogram(starts % 2**20, bins=10, range=(0, 2**20))
    assert np.abs(low - 300).max() < 5 * np.sqrt(300)


def test_a_shuffled_pass_has_each_window_once():
    pytest.importorskip("grain", reason="needs the extra text")
    T = CONFIG.model.block_size
    tokens = np.arange(40 * T + 1, dtype=np.uint16)
    rows = feed.shuffled_rows(SHUFFLED, ((tokens, 1.0),))
    passes = [rows(5 * i, 5).reshape(40, T + 1) for i in range(3)]  # 40 windows, 8 in a batch
    for windows in passes:
        np.testing.assert_array_equal(windows, windows[:, :1] + np.arange(T + 1))
        assert sorted(windows[:, 0].tolist()) == list(range(0, 40 * T, T))
    orders = [tuple(windows[:, 0].tolist()) for windows in passes]
    assert len({*orders, tuple(range(0, 40 * T, T))}) == 4
    other = feed.shuffled_rows(replace(SHUFFLED, seed=6), ((tokens, 1.0),))(0, 5)
    assert tuple(other.reshape(40, T + 1)[:, 0].tolist()) not in orders


def test_a_mixture_keeps_its_weights():
    pytest.importorskip("grain", reason="needs the extra text")
    a, b = np.zeros(1000, np.uint16), np.ones(500, np.uint16)
    rows = feed.shuffled_rows(SHUFFLED, ((a, 3.0), (b, 1.0)))
    shares = rows(0, 50)[:, :, 0].mean(axis=1)
    np.testing.assert_allclose(shares, 0.25, atol=0.13)  # in each batch, to one window
    np.testing.assert_allclose(shares.mean(), 0.25, atol=0.005)


def test_without_grain(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "grain", None)
    with pytest.raises(UserError) as error:
        feed.shuffled_rows(SHUFFLED, ((TOKENS, 1.0),))
    assert str(error.value) == (
        "this needs the package grain: pip install 'gptjax[text]', or from a checkout pip install "
        "-e '.[text]'"
    )


def test_batches_are_made_ahead_and_never_mixed_up():
    made: list[tuple[int, str]] = []

    def put(make: Callable[[slice], np.ndarray]) -> Any:
        rows = make(slice(None))
        made.append((int(rows[0, 0, 0]), threading.current_thread().name[:4]))
        return rows

    ahead = feed.OnDisk(CONFIG, ((TOKENS, 1.0),), put)
    expected = lambda step: feed.random_rows(CONFIG, TOKENS, step, CONFIG.steps_per_dispatch)
    for step, then in ((0, 8), (8, 16), (16, 20), (3, 11), (11, None), (19, None)):
        batches = ahead(step, then)
        assert batches.first == step
        np.testing.assert_array_equal(batches.rows, expected(step))
    threads = {first: name for first, name in made}
    by_thread = [
        step for step in (0, 8, 16, 20, 3, 11, 19) if threads[expected(step)[0, 0, 0]] == "feed"
    ]
    assert by_thread == [8, 16, 20, 11]


def test_what_fails_ahead_fails_in_the_open():
    def put(make: Callable[[slice], np.ndarray]) -> Any:
        raise OSError("the disk is gone")

    ahead = feed.OnDisk(CONFIG, ((TOKENS, 1.0),), put)
    ahead._ahead = 8, ahead._pool.submit(ahead._make, 8)
    with pytest.raises(OSError, match=r"^the disk is gone$"):
        ahead(8)


# Whole runs


@pytest.fixture(scope="module")
def own(play: str, tmp_path_factory: pytest.TempPathFactory) -> Config:
    path = tmp_path_factory.mktemp("own") / "play.txt"
    path.write_text(play)
    return replace(TINY, eval_batches=2, data=DataConfig(text=str(path)))


def same(one: Path, other: Path, step: int) -> None:
    assert records(one) == records(other)
    for a, b in zip(arrays(one, step), arrays(other, step), strict=True):
        np.testing.assert_array_equal(a, b)


def test_tokens_on_disk_give_the_run_of_tokens_on_the_device(own: Config, tmp_path):
    """Bit for bit, evaluations of the training loss included, and over a stop and a replay."""
    train(own, tmp_path / "device", report=QUIET)
    disk = replace(own, data=replace(own.data, resident_tokens=0))
    train(disk, tmp_path / "disk", report=SignalAt(7, signal.SIGINT))
    assert len(records(tmp_path / "disk")) < 24
    train(disk, tmp_path / "disk", resume=True, report=QUIET)
    device, found = records(tmp_path / "device"), records(tmp_path / "disk")
    for one, other in zip(device, found, strict=True):
        # The whole validation split is evaluated in slabs, and their mean rounds otherwise.
        for name in ("val_loss", "val_bits_per_byte"):
            assert one.pop(name, 0.0) == pytest.approx(other.pop(name, 0.0), abs=1e-5)
    assert device == found
    for a, b in zip(arrays(tmp_path / "device", 24), arrays(tmp_path / "disk", 24), strict=True):
        np.testing.assert_array_equal(a, b)
    values = replay(tmp_path / "disk", 11, report=QUIET)
    assert values["loss"] == found[11]["loss"]


def test_a_shuffled_mixture_resumes_exactly(own: Config, play: str, tmp_path):
    pytest.importorskip("grain", reason="needs the extra text")
    other = tmp_path / "other.txt"
    other.write_text(play[::-1])
    text = f"{own.data.text}=0.7,{other}=0.3"
    config = replace(own, data=DataConfig(text=text, order="shuffled"))
    train(config, tmp_path / "whole", report=QUIET)
    train(config, tmp_path / "parts", report=SignalAt(7, signal.SIGINT))
    train(config, tmp_path / "parts", resume=True, report=QUIET)
    same(tmp_path / "whole", tmp_path / "parts", 24)


def test_what_is_said_of_a_text(own: Config, play: str, tmp_path):
    """Before the steps; and bits per byte, which of bytes are the loss in bits."""
    path = tmp_path / "short.txt"
    path.write_text(play[:1500])
    data = DataConfig(text=str(path), tokenizer="byte")
    config = replace(own, steps=48, batch_size=32, data=data)
    with (tmp_path / "said").open("w+") as file:
        console = Console(file=file, width=500, highlight=False)
        record = train(config, tmp_path / "run", report=Report(console))
        file.seek(0)
        said = [line.strip() for line in file]
    assert record["val_bits_per_byte"] == pytest.approx(record["val_loss"] / np.log(2), rel=1e-12)
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["val_bits_per_byte"] == record["val_bits_per_byte"]
    for name, value in {
        "text": f"{path}: 1,350 training and 150 validation tokens, 256 kinds",
        "tokenizer": "byte-level, vocab 256 (as configured); 1.00 characters, 1.00 bytes per token",
        "split": "by position (validation: the last 150 characters)",
    }.items():
        assert any(line.split(maxsplit=1) == [name, value] for line in said)
    assert any(re.fullmatch(r"memory +\d+ MB for parameters, their gradient .*", x) for x in said)
    assert any(f"({record['val_bits_per_byte']:.4f} bits per byte)" in line for line in said)
    passes = 48 * config.batch_size * config.model.block_size / 1350
    assert (
        f"this model will memorise its text: it has more parameters than the text has tokens and "
        f"reads it {passes:.0f} times (rule of thumb: over 16); the best checkpoint is kept; more "
        f"text, a smaller model, fewer --steps or more --model.dropout help"
    ) in said


@pytest.mark.parametrize(
    ("tokens", "parameters", "passes", "expected"),
    [(100, 101, 16.1, True), (100, 101, 16.0, False), (100, 100, 99.0, False)],
)
def test_who_memorises(tokens: int, parameters: int, passes: float, expected: bool):
    assert flops.will_memorise(tokens, parameters, passes) == expected


def test_batches_are_spread_over_the_devices(own: Config):
    config = replace(own, mesh=replace(own.mesh, data=4, fsdp=2), batch_size=16)
    config = replace(config, data=replace(own.data, resident_tokens=0))
    dataset = open_dataset(config.data, config.model.block_size)
    programs = Programs(config, dataset.tokenizer.vocab_size)
    batches: Any = programs.training(dataset)(0)
    batches = batches.rows
    assert batches.shape == (3, 16, config.model.block_size + 1)
    assert {s.data.shape for s in batches.addressable_shards} == {(3, 2, batches.shape[2])}
