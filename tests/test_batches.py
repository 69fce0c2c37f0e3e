"""Tests of batches: a function of (seed, step), the same wherever the tokens are."""

import functools
import json
import math
import signal
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from run_helpers import (
    QUIET,
    SignalAt,
    arrays,
    assert_same,
    assert_same_run,
    message,
    records,
    text_file,
)

from gptjax.assembly import assemble, evaluate_batches, evaluate_split, make_source
from gptjax.batches import (
    Batch,
    OnDisk,
    Prefetched,
    Rows,
    Shuffled,
    Windows,
    _host_starts,
    cut,
    fingerprint,
    flat,
    random_key,
    random_starts,
    whole_split_starts,
    windows,
    windows_at,
)
from gptjax.config import Config, DataConfig, MeshConfig, ModelConfig, OptimConfig
from gptjax.lecture.models import Bigram
from gptjax.text.dataset import open_dataset
from gptjax.text.tokenizers import CharTokenizer
from gptjax.tools.replay import replay
from gptjax.training import train

SEED, B, T = 5, 8, 16
KEY = jax.random.key(SEED)
TOKENS = np.random.default_rng(0).integers(0, 2**16, 5000).astype(np.uint16)


# ---------------------------------------------------------------------------------------------
# Windows of tokens


@pytest.mark.core
def test_cut():
    tokens = jnp.arange(10, dtype=jnp.uint16)
    found = cut(tokens, jnp.array([0, 3, 7]), 3)
    assert found.tolist() == [[0, 1, 2], [3, 4, 5], [7, 8, 9]]
    assert found.dtype == jnp.int32
    # Documented: too late a start is moved back, to the last window there is.
    assert cut(tokens, jnp.array([8, 10]), 3).tolist() == [[7, 8, 9], [7, 8, 9]]


@pytest.mark.core
def test_windows_on_the_host_are_those_that_the_device_cuts():
    starts = np.array([[0, 3], [7, 4983]])
    found = windows(TOKENS, starts, T)
    assert found.shape == (2, 2, T + 1) and found.dtype == np.uint16
    for i in range(2):
        np.testing.assert_array_equal(found[i], cut(jnp.asarray(TOKENS), starts[i], T + 1))
    tokens, places = flat(found)  # and so they are when laid out one after the other
    assert places.dtype == np.int32
    np.testing.assert_array_equal(windows(tokens, places, T), found)


@pytest.mark.core
def test_a_batch_is_a_function_of_seed_and_step():
    tokens = jnp.arange(1000)
    sample = lambda seed, step: windows_at(tokens, jax.random.key(seed), step, B, T)
    assert_same(sample(1, 3), sample(1, 3))
    different = [sample(*pair).inputs for pair in ((1, 3), (1, 4), (2, 3))]
    assert len({np.asarray(x).tobytes() for x in different}) == 3


@pytest.mark.core
def test_targets_are_the_inputs_shifted_by_one(play: str):
    tokenizer = CharTokenizer.fit(play)
    ids = tokenizer.encode(play).astype(np.uint16)
    inputs, targets, mask = windows_at(jnp.asarray(ids), KEY, 0, 64, T)
    assert inputs.shape == targets.shape == (64, T) and mask is None
    assert inputs.dtype == targets.dtype == jnp.int32
    np.testing.assert_array_equal(inputs[:, 1:], targets[:, :-1])
    rows = np.concatenate([inputs, targets[:, -1:]], axis=1)
    assert all(tokenizer.decode(row) in play for row in rows)
    assert len({tuple(row) for row in rows.tolist()}) > 32  # not one place 64 times


@pytest.mark.core
@pytest.mark.parametrize(("n_tokens", "block_size"), [(9, 8), (14, 8)])
def test_starts_cover_the_first_and_the_last_window(n_tokens: int, block_size: int):
    starts = random_starts(KEY, n_tokens, (50, 10), block_size)
    assert starts.shape == (50, 10) and starts.dtype == jnp.int32
    values, counts = np.unique(starts, return_counts=True)
    assert values.tolist() == list(range(n_tokens - block_size))
    # Uniform: 500 draws, five standard deviations either side.
    mean = 500 / len(values)
    assert np.abs(counts - mean).max() <= 5 * np.sqrt(mean)


@pytest.mark.core
def test_the_last_token_can_be_a_target():
    batch = windows_at(jnp.arange(20), KEY, 0, 200, T)
    assert (int(batch.inputs.min()), int(batch.targets.max())) == (0, 19)


@pytest.mark.core
def test_whole_split_starts_predict_each_token_once():
    for n_tokens in (2, 3, 8, 9, 10, 16, 17, 18, 40, 41):
        for batch_size in (1, 2, 3, 5):
            for block_size in (1, 2, 7, 8, 50):
                starts = whole_split_starts(n_tokens, batch_size, block_size)
                assert starts.dtype == np.int32 and starts.shape[1] == batch_size
                targets = [
                    target
                    for start in starts.ravel().tolist()
                    for target in range(start + 1, min(start + block_size, n_tokens - 1) + 1)
                ]
                assert sorted(targets) == list(range(1, n_tokens))
                # Padding is at the end of the last batch, and never a whole one.
                filled = starts.ravel() == n_tokens
                assert (~filled).sum() == math.ceil((n_tokens - 1) / block_size)
                assert filled.sum() < batch_size
                assert not np.diff(filled.astype(int)).min(initial=0) < 0


@pytest.mark.core
def test_a_batch_can_be_cut_inside_jit():
    tokens = jnp.arange(100, dtype=jnp.uint16)
    sample = functools.partial(windows_at, batch_size=4, block_size=T)
    assert_same(jax.jit(sample)(tokens, KEY, 3), sample(tokens, KEY, 3))


@pytest.mark.core
def test_purposes_and_steps_have_keys_of_their_own():
    keys = [random_key(KEY, purpose, step) for purpose in range(5) for step in range(5)]
    assert len({jax.random.key_data(key).tobytes() for key in keys}) == 25


# ---------------------------------------------------------------------------------------------
# Sources


@pytest.mark.core
def test_memory_mapped_windows_are_those_that_the_device_cuts(tmp_path):
    path = tmp_path / "train.bin"
    path.write_bytes(TOKENS.tobytes())
    on_disk = OnDisk(np.memmap(path, np.uint16, "r"), SEED, B, T)
    on_device = Windows(jnp.asarray(TOKENS), KEY, B, T)
    for step in (3, 0, 4):
        batch = on_disk.batch(step)
        assert batch.inputs.dtype == np.uint16  # half of what int32 would take to copy
        for found in (on_device.batch(step), windows_at(jnp.asarray(TOKENS), KEY, step, B, T)):
            np.testing.assert_array_equal(batch.inputs, found.inputs)
            np.testing.assert_array_equal(batch.targets, found.targets)


@pytest.mark.core
def test_starts_beyond_32_bits():
    """As far as they can be tested without a file of 4 GB and more."""
    n = 2**40
    starts = np.stack([_host_starts(0, step, n, 1000, T) for step in range(3)])
    assert starts.shape == (3, 1000) and starts.dtype == np.int64
    assert starts.min() >= 0 and starts.max() < n - T
    shares, _ = np.histogram(starts, bins=10, range=(0, n))
    assert np.abs(shares - 300).max() < 5 * np.sqrt(300)
    low, _ = np.histogram(starts % 2**20, bins=10, range=(0, 2**20))
    assert np.abs(low - 300).max() < 5 * np.sqrt(300)


def shuffled(*parts: tuple[np.ndarray, float], seed: int = SEED) -> Shuffled:
    pytest.importorskip("grain", reason="needs the extra text")
    return Shuffled(parts, seed, B, T)


def rows_of(source: Any, first: int, n: int) -> np.ndarray:
    """(n B, T + 1) ids of n batches."""
    batches = [source.batch(step) for step in range(first, first + n)]
    for batch in batches:
        np.testing.assert_array_equal(batch.inputs[:, 1:], batch.targets[:, :-1])
    rows = [np.concatenate([b.inputs, b.targets[:, -1:]], axis=1) for b in batches]
    return np.concatenate(rows)


def test_a_shuffled_epoch_has_each_window_once():
    tokens = np.arange(40 * T + 1, dtype=np.uint16)  # 40 windows, 8 in a batch
    source = shuffled((tokens, 1.0))
    epochs = [rows_of(source, 5 * i, 5) for i in range(3)]
    for epoch in epochs:
        np.testing.assert_array_equal(epoch, epoch[:, :1] + np.arange(T + 1))
        assert sorted(epoch[:, 0].tolist()) == list(range(0, 40 * T, T))
    orders = [tuple(epoch[:, 0].tolist()) for epoch in epochs]
    assert len({*orders, tuple(range(0, 40 * T, T))}) == 4
    other = rows_of(shuffled((tokens, 1.0), seed=6), 0, 5)
    assert tuple(other[:, 0].tolist()) not in orders
    np.testing.assert_array_equal(rows_of(source, 7, 1), epochs[1][16:24])  # in any order


def test_a_mixture_keeps_its_weights():
    source = shuffled((np.zeros(1000, np.uint16), 3.0), (np.ones(500, np.uint16), 1.0))
    shares = rows_of(source, 0, 50)[:, 0].reshape(50, B).mean(axis=1)
    np.testing.assert_allclose(shares, 0.25, atol=0.13)  # in each batch, to one window
    np.testing.assert_allclose(shares.mean(), 0.25, atol=0.005)


@pytest.mark.core
def test_without_grain(monkeypatch):
    monkeypatch.setitem(sys.modules, "grain", None)
    refused = message(Shuffled, [(TOKENS, 1.0)], SEED, B, T)
    assert refused.startswith("this needs the package grain: pip install 'gptjax[text]'")


class Counting:
    """Batches that hold their step, and say which thread made them."""

    def __init__(self, fails_at: int | None = None):
        self.made: dict[int, str] = {}
        self._fails_at = fails_at

    def batch(self, step: int) -> dict[str, np.ndarray]:
        if step == self._fails_at:
            raise OSError("the disk is gone")
        self.made[step] = threading.current_thread().name.rpartition("_")[0]
        return {"x": np.full((B, 2), step), "y": np.full(B, step / 2, np.float32)}


@pytest.mark.core
def test_batches_are_prefetched_and_never_mixed_up():
    source = Counting()
    ahead = Prefetched(source, 4)
    for step, then in ((0, 4), (4, 8), (8, 10), (3, 11), (11, None), (19, None)):
        source.made.clear()
        rows = ahead.data(step, then)
        assert rows.first == step
        np.testing.assert_array_equal(rows.batches["x"][:, 0, 0], np.arange(step, step + 4))
        here = {s for s, thread in source.made.items() if thread != "batches"}
        asked = set(range(step, step + 4))
        assert here == (asked if step in (0, 3, 19) else set())  # the others were ready
        time.sleep(0.05)  # so that no batch made ahead counts for the next one
    assert ahead.batch(7)["x"][0, 0] == 7


@pytest.mark.core
def test_an_error_while_prefetching_is_raised_where_the_batch_is_needed():
    ahead = Prefetched(Counting(fails_at=6), 4)
    ahead.data(0, then=4)
    with pytest.raises(OSError, match=r"^the disk is gone$"):
        ahead.data(4)


@pytest.mark.core
def test_the_batch_of_a_step_is_taken_out_of_those_that_were_made():
    batches = {
        "ids": jnp.arange(6, dtype=jnp.uint16).reshape(3, 2),
        "weight": jnp.asarray([[0.5], [1.5], [2.5]]),
    }
    at = jax.jit(Prefetched.at)(Rows(10, batches), KEY, 11)
    assert at["ids"].tolist() == [2, 3] and at["ids"].dtype == jnp.int32
    assert at["weight"].tolist() == [1.5] and at["weight"].dtype == jnp.float32


@pytest.mark.core
def test_fingerprints_of_batches():
    class Same:
        def __init__(self, x: Any):
            self._x = x

        def batch(self, step: int) -> Any:
            return self._x

    zeros = np.zeros((2, 3), np.int32)
    first = fingerprint(Same(zeros))
    assert json.loads(first).keys() == {"first batch"} and fingerprint(Same(zeros.copy())) == first
    one = zeros.copy()
    one[1, 2] = 1
    others = [one, zeros.astype(np.float32), zeros.reshape(3, 2), Batch(zeros, one)]
    assert len({first, *(fingerprint(Same(x)) for x in others)}) == 5


# ---------------------------------------------------------------------------------------------
# Whole runs

CONFIG = Config(
    steps=12,
    batch_size=4,
    eval_every=6,
    eval_batches=2,
    save_every=6,
    steps_per_dispatch=3,
    model=ModelConfig(n_layer=1, n_head=1, n_embd=8, block_size=8, dropout=0.1),
    optim=OptimConfig(learning_rate=1e-2, accumulate=2),
    mesh=MeshConfig(data=1),
)


@pytest.fixture(scope="module")
def config(play: str, tmp_path_factory: pytest.TempPathFactory) -> Config:
    return replace(CONFIG, data=text_file(tmp_path_factory.mktemp("text"), play))


def test_streaming_from_disk_changes_no_number(config: Config, tmp_path: Path):
    """Bit for bit, evaluations of the training loss included, and over a stop and a replay."""
    train(config, tmp_path / "device", report=QUIET)
    disk = replace(config, data=replace(config.data, resident_tokens=0))
    train(disk, tmp_path / "disk", report=SignalAt(4, signal.SIGINT))
    assert len(records(tmp_path / "disk")) < 12
    train(disk, tmp_path / "disk", resume=True, report=QUIET)
    device, found = records(tmp_path / "device"), records(tmp_path / "disk")
    for one, other in zip(device, found, strict=True):
        # The whole validation split is evaluated in parts, and their mean rounds otherwise.
        for name in ("val_loss", "val_bits_per_byte"):
            assert one.pop(name, 0.0) == pytest.approx(other.pop(name, 0.0), abs=1e-5)
    assert device == found
    assert_same(arrays(tmp_path / "device", 12), arrays(tmp_path / "disk", 12))
    assert replay(tmp_path / "disk", 8, report=QUIET)["loss"] == found[8]["loss"]


def test_a_shuffled_mixture_resumes_bit_for_bit(config: Config, play: str, tmp_path: Path):
    pytest.importorskip("grain", reason="needs the extra text")
    other = tmp_path / "other.txt"
    other.write_text(play[::-1])
    text = f"{config.data.text}=0.7,{other}=0.3"
    config = replace(config, data=DataConfig(text=text, order="shuffled"))
    train(config, tmp_path / "whole", report=QUIET)
    train(config, tmp_path / "parts", report=SignalAt(4, signal.SIGINT))
    train(config, tmp_path / "parts", resume=True, report=QUIET)
    assert_same_run(tmp_path / "whole", tmp_path / "parts", 12)


def test_batches_are_spread_over_the_devices(config: Config):
    config = replace(config, mesh=MeshConfig(data=4, fsdp=2), batch_size=16)
    config = replace(config, data=replace(config.data, resident_tokens=0))
    dataset = open_dataset(config.data, config.model.block_size)
    setup = assemble(config, dataset.tokenizer.vocab_size, batch_at=Prefetched.at)
    source = make_source(config, dataset, setup.mesh, setup.seed_key())
    batch = source.data(0).batches
    assert batch.mask is None
    for x in (batch.inputs, batch.targets):
        assert x.shape == (3, 16, 8)
        assert {s.data.shape for s in x.addressable_shards} == {(3, 2, 8)}


@pytest.mark.core
def test_evaluating_batches_weighs_them_by_their_targets():
    """The same loss as that of the split they were cut from."""
    setup = assemble(replace(CONFIG, optim=OptimConfig()), 11, model=Bigram)
    params, tokens = setup.start().params, TOKENS[:100] % 11
    padded = np.pad(tokens, (0, 9)).astype(np.int32)
    batches = []
    for starts in whole_split_starts(100, 4, 8):
        inside = starts[:, None] + np.arange(8) < 99
        batch = Batch.of_windows(windows(padded, starts, 8))
        batches.append(batch._replace(mask=inside.astype(np.float32)))
    assert batches[-1].mask.sum() < 32
    found = evaluate_batches(setup, params, batches)["loss"]
    assert found == pytest.approx(
        evaluate_split(setup, params, jnp.asarray(tokens))["loss"], rel=1e-6
    )
