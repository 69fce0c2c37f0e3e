"""Tests of the dataset: split, tokenizer, windows, and full coverage of each split."""

import functools
import math
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.config import Config, DataConfig, ModelConfig
from gptjax.errors import UserError
from gptjax.text import dataset as data
from gptjax.text.tokenizers import CharTokenizer, Tokenizer

BLOCK = 8


def config_of(path: Path, text: str, block: int = BLOCK, val_fraction: float = 0.1) -> Config:
    """A config that reads `text`, written to `path`."""
    path.write_bytes(text.encode())
    model = ModelConfig(n_layer=1, n_head=1, n_embd=4, block_size=block)
    return Config(model=model, data=DataConfig(text=str(path), val_fraction=val_fraction))


def opened(config: Config, tokenizer: Tokenizer | None = None) -> data.Dataset:
    return data.open_dataset(config.data, config.model.block_size, tokenizer)


@pytest.mark.shared
def test_lecture_split(shakespeare: str, tmp_path: Path):
    dataset = opened(config_of(tmp_path / "text", shakespeare))
    assert (len(dataset.train), len(dataset.val)) == (1_003_854, 111_540)
    assert dataset.train.dtype == dataset.val.dtype == np.uint16
    assert dataset.tokenizer.decode(dataset.train) == shakespeare[:1_003_854]
    assert dataset.tokenizer.decode(dataset.val) == shakespeare[1_003_854:]
    window = data.sample_batch(jnp.asarray(dataset.train), jax.random.key(0), 4, 8)
    assert window[:, :-1].shape == window[:, 1:].shape == (4, 8)


@pytest.mark.parametrize("val_fraction", [0.05, 0.1, 0.5])
def test_split_is_by_position(play: str, tmp_path: Path, val_fraction: float):
    config = config_of(tmp_path / "text", play, val_fraction=val_fraction)
    dataset = opened(config)
    assert len(dataset.train) == int((1 - val_fraction) * len(play))
    ids = np.concatenate([dataset.train, dataset.val])
    assert dataset.tokenizer.decode(ids) == play


def test_newlines_are_kept(tmp_path: Path):
    text = "one\r\ntwo\rthree\n" * 20
    dataset = opened(config_of(tmp_path / "text", text))
    assert dataset.tokenizer.decode(np.concatenate([dataset.train, dataset.val])) == text


def characters(n: int) -> str:
    """The first n code points that UTF-8 can hold, without U+FEFF at the start of a file."""
    return "".join(chr(code) for code in range(n + 0x800) if not 0xD800 <= code < 0xE000)[:n]


@pytest.mark.parametrize(("n", "dtype"), [(2**16, np.uint16), (2**16 + 1, np.uint32)])
def test_ids_are_uint16_if_the_vocabulary_allows(tmp_path: Path, n: int, dtype: type):
    config = config_of(tmp_path / "text", characters(n))
    config = replace(config, data=replace(config.data, tokenizer="char"))
    dataset = opened(config)
    assert dataset.train.dtype == dataset.val.dtype == dtype
    np.testing.assert_array_equal(np.concatenate([dataset.train, dataset.val]), np.arange(n))
    # The last ids would overflow a dtype that is too small.
    last = data.cut(jnp.asarray(dataset.val), jnp.array([len(dataset.val) - 2]), 2)
    assert last.tolist() == [[n - 2, n - 1]] and last.dtype == jnp.int32


def test_a_given_tokenizer_is_used(tmp_path: Path):
    config = config_of(tmp_path / "text", "ab" * 100)
    tokenizer = CharTokenizer("\nabz")
    dataset = opened(config, tokenizer)
    assert dataset.tokenizer is tokenizer
    assert dataset.train[:4].tolist() == [1, 2, 1, 2]
    with pytest.raises(UserError) as error:
        opened(config, CharTokenizer("a"))
    assert str(error.value).startswith("100 unknown characters ('b' at 1)")


@pytest.mark.parametrize(
    ("length", "val_fraction", "message"),
    [
        (10, 0.5, "the training split has 5 tokens"),
        (17, 0.5, "the training split has 8 tokens"),
        (80, 0.1, "the validation split has 8 tokens"),
        (80, 0.0, "the validation split has 0 tokens"),
    ],
)
def test_a_split_shorter_than_a_window(
    tmp_path: Path, length: int, val_fraction: float, message: str
):
    with pytest.raises(UserError) as error:
        opened(config_of(tmp_path / "text", "x" * length, 8, val_fraction))
    assert str(error.value).startswith(f"{message}, fewer than one window of block_size + 1 = 9; ")
    assert f"--data.val-fraction (now {val_fraction})" in str(error.value)


def test_a_split_of_one_window_is_enough(tmp_path: Path):
    config = config_of(tmp_path / "text", "x" * 18, 8, 0.5)
    dataset = opened(config)
    assert (len(dataset.train), len(dataset.val)) == (9, 9)
    with pytest.raises(UserError, match="fewer than one window"):
        opened(replace(config, model=replace(config.model, block_size=9)))


def test_cut():
    tokens = jnp.arange(10, dtype=jnp.uint16)
    windows = data.cut(tokens, jnp.array([0, 3, 7]), 3)
    assert windows.tolist() == [[0, 1, 2], [3, 4, 5], [7, 8, 9]]
    assert windows.dtype == jnp.int32
    # Documented: too late a start is moved back, to the last window there is.
    assert data.cut(tokens, jnp.array([8, 10]), 3).tolist() == [[7, 8, 9], [7, 8, 9]]


def test_a_batch_is_a_function_of_its_key():
    tokens = jnp.arange(1000)
    sample = lambda seed: data.sample_batch(tokens, jax.random.key(seed), 16, BLOCK).tolist()
    assert sample(1) == sample(1)
    assert sample(1) != sample(2)


def test_every_window_is_in_the_text_and_y_is_x_shifted(play: str):
    tokenizer = CharTokenizer.fit(play)
    ids = tokenizer.encode(play).astype(np.uint16)
    windows = data.sample_batch(jnp.asarray(ids), jax.random.key(0), 64, BLOCK)
    assert windows.shape == (64, BLOCK + 1) and windows.dtype == jnp.int32
    x, y = windows[:, :-1], windows[:, 1:]
    np.testing.assert_array_equal(x[:, 1:], y[:, :-1])
    assert all(tokenizer.decode(np.asarray(window)) in play for window in windows)
    assert len({tuple(window) for window in windows.tolist()}) > 32  # not one place 64 times


@pytest.mark.parametrize(("n_tokens", "block"), [(9, 8), (14, 8)])
def test_starts_cover_the_first_and_the_last_window(n_tokens: int, block: int):
    starts = data.random_starts(jax.random.key(0), n_tokens, (50, 10), block)
    assert starts.shape == (50, 10) and starts.dtype == jnp.int32
    values, counts = np.unique(starts, return_counts=True)
    assert values.tolist() == list(range(n_tokens - block))
    # Uniform: 500 draws, five standard deviations either side.
    mean = 500 / len(values)
    assert np.abs(counts - mean).max() <= 5 * np.sqrt(mean)


def test_the_last_token_can_be_a_target():
    windows = data.sample_batch(jnp.arange(12), jax.random.key(0), 200, BLOCK)
    assert (int(windows.min()), int(windows.max())) == (0, 11)


def test_whole_split_starts_predict_each_token_once():
    for n_tokens in (2, 3, 8, 9, 10, 16, 17, 18, 40, 41):
        for batch in (1, 2, 3, 5):
            for block in (1, 2, 7, 8, 50):
                starts = data.whole_split_starts(n_tokens, batch, block)
                assert starts.dtype == np.int32 and starts.shape[1] == batch
                targets = [
                    target
                    for start in starts.ravel().tolist()
                    for target in range(start + 1, min(start + block, n_tokens - 1) + 1)
                ]
                assert sorted(targets) == list(range(1, n_tokens))
                # Fillers stand at the end of the last batch, and never fill a whole one.
                filled = starts.ravel() == n_tokens
                assert (~filled).sum() == math.ceil((n_tokens - 1) / block)
                assert filled.sum() < batch and not np.diff(filled.astype(int)).min(initial=0) < 0


def test_a_batch_can_be_cut_inside_jit():
    tokens = jnp.arange(100, dtype=jnp.uint16)
    sample = functools.partial(data.sample_batch, batch=4, block=BLOCK)
    key = jax.random.key(3)
    np.testing.assert_array_equal(jax.jit(sample)(tokens, key), sample(tokens, key))
