"""Text to tokens, tokens to windows.

A batch is a function of (key, step): nothing is consumed, so a run's position in its data is its
step. The corpus lives on the device and windows are cut there, inside the jitted step.
"""

import hashlib
import json
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gptjax import corpora
from gptjax.config import Config
from gptjax.errors import UserError
from gptjax.tokenizer import CharTokenizer, Tokenizer

SAMPLED, PIECES = 2**24, 2**8  # tokens of a split that its fingerprint reads, and in how many parts


class Dataset(NamedTuple):
    """A text as tokens: train, val are (N,) arrays, uint16 where the vocabulary allows."""

    tokenizer: Tokenizer
    train: np.ndarray
    val: np.ndarray


def open_dataset(config: Config, tokenizer: Tokenizer | None = None) -> Dataset:
    """Read the configured text, encode it, and split it by position.

    Args:
        config: of the run.
        tokenizer: of a run being resumed; None: fit one on the text.

    Raises:
        UserError: no such text, unknown characters, or a split shorter than one window.

    Source: lecture, "train/val split": the first 90 % trains, the rest validates.
    """
    text = corpora.read_text(config.data.text)
    tokenizer = tokenizer or CharTokenizer.fit(text)
    tokens = tokenizer.encode(text)
    if tokenizer.vocab_size <= 2**16:
        tokens = tokens.astype(np.uint16)
    n_train = int((1 - config.data.val_fraction) * len(tokens))
    dataset = Dataset(tokenizer, tokens[:n_train], tokens[n_train:])
    window = config.model.block_size + 1
    for name, split in (("training", dataset.train), ("validation", dataset.val)):
        if len(split) < window:
            raise UserError(
                f"the {name} split has {len(split)} tokens, fewer than one window of "
                f"block_size + 1 = {window}; give a longer text, a smaller --model.block-size, "
                f"or another --data.val-fraction (now {config.data.val_fraction})"
            )
    return dataset


def fingerprint(dataset: Dataset) -> str:
    """JSON that tells these tokens from others: a run must not go on with another text.

    All of the tokens up to SAMPLED of each split; of more, as many in pieces from all over it.
    """
    splits = []
    for tokens in (dataset.train, dataset.val):
        digest = hashlib.sha256(str(tokens.dtype).encode())
        pieces = min(PIECES, -(-len(tokens) // (SAMPLED // PIECES)))
        last = max(0, len(tokens) - SAMPLED // PIECES)
        for start in np.linspace(0, last, pieces).astype(int):
            digest.update(tokens[start : start + SAMPLED // PIECES].tobytes())
        splits.append({"tokens": len(tokens), "sha256": digest.hexdigest()})
    return json.dumps(splits)


def cut(tokens: jax.Array, starts: jax.Array, length: int) -> jax.Array:
    """Windows of a token array.

    Args:
        tokens: (N,) integer ids.
        starts: (B,) int32, each at most N - length (a later one is moved back to it).
        length: of a window.

    Returns:
        (B, length) int32.
    """
    windows = jax.vmap(lambda start: jax.lax.dynamic_slice_in_dim(tokens, start, length))(starts)
    return windows.astype(jnp.int32)


def random_starts(key: jax.Array, n_tokens: int, shape: tuple[int, ...], block: int) -> jax.Array:
    """Uniform starts of windows of block + 1 tokens, of the given shape, int32."""
    return jax.random.randint(key, shape, 0, n_tokens - block)


def sample_batch(tokens: jax.Array, key: jax.Array, batch: int, block: int) -> jax.Array:
    """(batch, block + 1) int32 windows at random starts; x is all but the last token, y all but
    the first.

    Source: lecture, "data loader: batches of chunks of data".
    """
    return cut(tokens, random_starts(key, tokens.shape[0], (batch,), block), block + 1)


def whole_split_starts(n_tokens: int, batch: int, block: int) -> np.ndarray:
    """Starts of non-overlapping windows that predict each token but the first exactly once.

    Args:
        n_tokens: length of the split.
        batch: windows in one batch.
        block: targets in one window.

    Returns:
        (n, batch) int32; the last batch is filled up with n_tokens, where nothing is left to
        predict.
    """
    starts = np.arange(0, n_tokens - 1, block)
    missing = -len(starts) % batch
    return (
        np.pad(starts, (0, missing), constant_values=n_tokens).reshape(-1, batch).astype(np.int32)
    )
