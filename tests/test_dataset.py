"""Tests of the dataset: split, tokenizer, and ids."""

from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.batches import cut
from gptjax.config import Config, DataConfig, ModelConfig
from gptjax.errors import UserError
from gptjax.text import dataset as data
from gptjax.text.tokenizers import CharTokenizer, Tokenizer

pytestmark = pytest.mark.core

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
    last = cut(jnp.asarray(dataset.val), jnp.array([len(dataset.val) - 2]), 2)
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
