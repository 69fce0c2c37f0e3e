"""Windows of a stream of tokens, and what a model makes of each token in them.

Window k has the inputs k * stride .. k * stride + T - 1, and counts the targets that no window
before it had: T of the first window, `stride` of each further one. A token is thus predicted from
all tokens before it, or from at least T - stride + 1 of them. With a stride of T no window overlaps
another, as where validation measures its split.
"""

from collections.abc import Iterable, Iterator
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from gptjax.loss import cross_entropy
from gptjax.parallel.switches import pinned

ROWS = 16  # windows in a batch, at most
TOKENS = 2**13  # tokens in a batch, at most, if it has more than one window
LOGITS = 2**26  # logits that exist at once, a quarter of a gigabyte
SHORTEST = 16  # inputs; windows are padded to powers of two from here on, or to T
MOST_ALTERNATIVES = 20


class Chunk(NamedTuple):
    """The next ids of a stream, (N,), N >= 0; `n_bytes` of text; `last` marks the stream's end."""

    ids: np.ndarray
    n_bytes: int
    last: bool


class Window(NamedTuple):
    """Up to T + 1 ids of a stream, the first `covered` of which a window before it had counted;
    `n_bytes` and `last` as of `Chunk`."""

    ids: np.ndarray
    covered: int
    n_bytes: int = 0
    last: bool = True


class Scored(NamedTuple):
    """Consecutive tokens of a stream, with what the model makes of them.

    Attributes:
        ids: (N,) int32.
        logprobs: (N,) float32, natural logarithm of each token's probability; nan for the first
            token of a stream, which nothing predicts.
        ranks: (N,) int32, 1 for the most likely token of the vocabulary (of equally likely ones
            the lowest id comes first); 0 where nothing predicts the token.
        alternatives: (N, K) int32, the most likely tokens at this position, in that order.
        alternative_logprobs: (N, K) float32.
        n_bytes: UTF-8 bytes of the text that was read for them.
        last: whether the stream ends here.
    """

    ids: np.ndarray
    logprobs: np.ndarray
    ranks: np.ndarray
    alternatives: np.ndarray
    alternative_logprobs: np.ndarray
    n_bytes: int
    last: bool


def join(parts: Iterable[Scored]) -> Scored:
    """Parts of one stream, at least one, as one."""
    columns = list(zip(*parts, strict=True))
    arrays = [np.concatenate(column) for column in columns[:5]]
    return Scored(*arrays, n_bytes=sum(columns[5]), last=columns[6][-1])


def cut(chunks: Iterable[Chunk], block_size: int, stride: int) -> Iterator[Window]:
    """The windows of each stream, in order; a stream without tokens has one, without ids.

    Args:
        chunks: of streams, one after the other.
        block_size: T.
        stride: from the start of a window to that of the next one, 1 to T.
    """
    rest, covered, n_bytes = np.zeros(0, np.int32), 0, 0
    for chunk in chunks:
        rest, n_bytes = np.concatenate([rest, chunk.ids]), n_bytes + chunk.n_bytes
        while len(rest) > block_size + 1:
            yield Window(rest[: block_size + 1], covered, n_bytes, False)
            rest, covered, n_bytes = rest[stride:], block_size + 1 - stride, 0
        if chunk.last:
            yield Window(rest, covered, n_bytes, True)
            rest, covered, n_bytes = rest[:0], 0, 0


def score_windows(
    model: nn.Module,
    params: Any,
    windows: Iterable[Window],
    block_size: int,
    vocab_size: int,
    alternatives: int = 0,
) -> Iterator[Scored]:
    """Score the tokens of each window that no window before it had.

    Args:
        model: of the contract in `model.py`.
        params: its parameters.
        windows: of up to T + 1 ids.
        block_size: T.
        vocab_size: of the tokenizer. Rows of the model's table beyond it count in the
            probabilities, as in training, but not in ranks and alternatives.
        alternatives: K.

    Yields:
        For each window the tokens from `covered` on.
    """
    rows = max(1, min(ROWS, TOKENS // block_size, LOGITS // (block_size * vocab_size)))
    windows, K = iter(windows), min(alternatives, vocab_size)
    while batch := list(islice(windows, rows)):
        longest = max(len(window.ids) for window in batch) - 1
        T = min(block_size, max(SHORTEST, 1 << max(0, longest - 1).bit_length()))
        padded = np.zeros((1 if len(batch) == 1 else rows, T + 1), np.int32)
        for row, window in zip(padded, batch, strict=False):
            row[: len(window.ids)] = window.ids
        found = compute(model, params, padded, vocab_size, K) if longest > 0 else None
        for i, window in enumerate(batch):
            yield _of_window(window, None if found is None else [x[i] for x in found], K)


def _of_window(window: Window, found: list[np.ndarray] | None, K: int) -> Scored:
    """Pick a window's new tokens from what was computed for its row."""
    n, nan = len(window.ids), np.float32(np.nan)
    arrays = [np.full(1, nan), np.zeros(1, int), np.zeros((1, K), int), np.full((1, K), nan)]
    if found is not None:
        # Position i of a row belongs to token i + 1, so that the first token comes before them.
        both = zip(arrays, found, strict=True)
        arrays = [np.concatenate([a.astype(b.dtype), b[: max(0, n - 1)]]) for a, b in both]
    new = [x[window.covered : n] for x in arrays]
    return Scored(window.ids[window.covered :], *new, n_bytes=window.n_bytes, last=window.last)


@pinned()
def compute(
    model: nn.Module, params: Any, windows: np.ndarray, vocab_size: int, alternatives: int
) -> list[np.ndarray]:
    """`Scored`'s logprobs, ranks, alternatives and their logprobs, each (B, T) or (B, T, K), of the
    targets of (B, T + 1) windows."""
    inputs, targets = jnp.asarray(windows[:, :-1]), jnp.asarray(windows[:, 1:])
    found = _compute(model, params, inputs, targets, vocab_size, alternatives)
    return [np.asarray(x) for x in found]


@partial(jax.jit, static_argnums=(0, 4, 5))
def _compute(
    model: nn.Module, params: Any, inputs: jax.Array, targets: jax.Array, V: int, K: int
) -> tuple[jax.Array, ...]:
    variables, (B, T) = {"params": params}, inputs.shape
    if B * T * V <= LOGITS or B > 1 or not hasattr(model, "features"):
        logits, _ = model.apply(variables, inputs)
        return _judge(logits, targets, V, K)
    # Of one long row with a large vocabulary, the logits of some positions at a time.
    x, _ = model.apply(variables, inputs, method="features")
    size = max(n for n in range(1, T + 1) if T % n == 0 and n * V <= max(LOGITS, V))

    def some(part: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, ...]:
        logits: Any = model.apply(variables, part[0], method="head")
        return _judge(logits, part[1], V, K)

    parts = x.reshape(T // size, 1, size, -1), targets.reshape(T // size, 1, size)
    found = jax.lax.map(some, parts)
    return jax.tree.map(lambda y: y.reshape(1, T, *y.shape[3:]), found)


def _judge(logits: jax.Array, targets: jax.Array, V: int, K: int) -> tuple[jax.Array, ...]:
    """What (B, T, V) logits make of (B, T) targets; see `compute`."""
    losses = cross_entropy(logits, targets)
    logits = logits[..., :V].astype(jnp.float32)
    own = jnp.take_along_axis(logits, targets[..., None], -1)
    before = jnp.arange(V)[None, None] < targets[..., None]
    ranks = 1 + ((logits > own) | ((logits == own) & before)).sum(-1, dtype=jnp.int32)
    values, ids = jax.lax.top_k(logits, K)
    return -losses, ranks, ids, values - (own + losses[..., None])
