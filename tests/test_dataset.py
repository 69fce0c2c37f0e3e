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


# ---------------------------------------------------------------------------------------------
# A validation text of one's own


def test_a_validation_text_of_ones_own(play: str, tmp_path: Path):
    """All of the text trains, all of the other one validates, by the first one's vocabulary."""
    config = config_of(tmp_path / "text", play, val_fraction=0.5)
    (tmp_path / "val").write_text(play[-500:-100], encoding="utf-8")
    own = replace(config, data=replace(config.data, val=str(tmp_path / "val"), val_limit=20))
    dataset = opened(own)
    assert dataset.tokenizer.decode(dataset.train) == play
    assert dataset.tokenizer.decode(dataset.val) == play[-500:-100]
    assert dataset.val_bytes == len(play[-499:-100].encode())
    assert dataset.tokenizer.to_json() == opened(config).tokenizer.to_json()
    assert dataset.notes["split"] == f"all of the text trains; {tmp_path / 'val'} validates"


def test_a_change_of_the_validation_text_changes_the_fingerprint(play: str, tmp_path: Path):
    config = config_of(tmp_path / "text", play)
    config = replace(config, data=replace(config.data, val=str(tmp_path / "val")))
    found = []
    for text in (play[:100], play[1:101]):
        (tmp_path / "val").write_text(text, encoding="utf-8")
        found.append(data.fingerprint(opened(config)))
    assert found[0] != found[1]


def test_token_files_beside_a_validation_text(play: str, tmp_path: Path):
    """A folder's own val.bin is then not used; a folder is no validation text."""
    ids = np.arange(100, dtype=np.uint16) % 50
    for name, values in (("train", ids), ("val", ids[:20]), ("other", ids[::-1])):
        values.tofile(tmp_path / f"{name}.bin")
    make = lambda val: DataConfig(text=str(tmp_path), tokenizer="byte", val=str(tmp_path / val))
    dataset = data.open_dataset(make("other.bin"), BLOCK)
    np.testing.assert_array_equal(dataset.train, ids)
    np.testing.assert_array_equal(dataset.val, ids[::-1])
    with pytest.raises(UserError, match="has two token files; name the one to validate on"):
        data.open_dataset(make(""), BLOCK)


@pytest.mark.parametrize(
    "text, message",
    [
        ("é" * 50, "--data.val .*: 50 unknown characters .'é' at 0.*that of the training text"),
        ("and", "the validation split has 3 tokens.*or another --data.val$"),
    ],
)
def test_a_validation_text_that_cannot_be_used(play: str, tmp_path: Path, text: str, message: str):
    config = config_of(tmp_path / "text", play)
    (tmp_path / "val").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=message) as caught:
        opened(replace(config, data=replace(config.data, val=str(tmp_path / "val"))))
    assert len(str(caught.value).splitlines()) == 1


def test_named_texts():
    assert data.named(DataConfig(text="a")) == "a"
    assert data.named(DataConfig(text="a", val="b")) == "a with the validation text b"
