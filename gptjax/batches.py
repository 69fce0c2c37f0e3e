"""Batches: of tokens on the device, of tokens on disk, or your own.

A batch is a function of (seed, step): nothing is consumed, so a run's position in its data is its
step. A source of batches has one method that you write,

    batch(step) -> Batch, or any pytree of arrays whose first axis is the rows

and a training run turns it into a `Source`, whose `data(step, then)` is what one call of the
device needs; `windows_at` or `Prefetched.at`, traced, take the batch of a step out of it.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.errors import optional_import
from gptjax.parallel.switches import pinned

INIT, BATCH, DROPOUT, EVAL, LORA = range(5)  # purposes of a random key


def random_key(seed_key: jax.Array, purpose: int, step: jax.Array | int = 0) -> jax.Array:
    """The key for one purpose at one step."""
    return jax.random.fold_in(jax.random.fold_in(seed_key, purpose), step)


class Batch(NamedTuple):
    """Rows of tokens, and the token to predict at each position.

    Attributes:
        inputs: (B, T) int32 ids.
        targets: (B, T) int32 ids.
        mask: (B, T), the weight of each position in the loss, such as 0 on a prompt and 1 on its
            answer; None: 1 everywhere.
    """

    inputs: Any
    targets: Any
    mask: Any = None

    @classmethod
    def of_windows(cls, windows: Any) -> "Batch":
        """Next-token prediction on (B, T + 1) windows of a text."""
        return cls(windows[:, :-1], windows[:, 1:])


class Batches(Protocol):
    """A source of batches. Your own may have two attributes more: `validation`, a sequence of
    batches to evaluate on, and `tokenizer`, to sample text with."""

    def batch(self, step: int) -> Any:
        """The batch of the update after `step` updates: a `Batch` of numpy arrays, or what your
        own `loss_fn` takes."""
        ...


class Source(Protocol):
    """`Batches` as a training run uses them."""

    def batch(self, step: int) -> Any:
        """The batch of the update after `step` updates, on the host."""
        ...

    def data(self, step: int, then: int | None = None) -> Any:
        """What the updates after `step` need; those from `then` on are prefetched."""
        ...


class Windows:
    """Random windows of tokens that the device holds, cut there.

    Args:
        tokens: (N,) ids, on the devices.
        seed_key: of the run.
        batch_size: B.
        block_size: T.
    """

    def __init__(self, tokens: jax.Array, seed_key: jax.Array, batch_size: int, block_size: int):
        self._tokens, self._seed_key = tokens, seed_key
        self._sizes = batch_size, block_size

    def batch(self, step: int) -> Batch:
        return jax.device_get(windows_at(self._tokens, self._seed_key, step, *self._sizes))

    def data(self, step: int, then: int | None = None) -> jax.Array:
        return self._tokens


def windows_at(
    tokens: jax.Array, seed_key: jax.Array, step: jax.Array | int, batch_size: int, block_size: int
) -> Batch:
    """B random windows of (N,) tokens, for the update after `step` updates.

    Source: lecture, "data loader: batches of chunks of data".
    """
    key = random_key(seed_key, BATCH, step)
    starts = random_starts(key, tokens.shape[0], (batch_size,), block_size)
    return Batch.of_windows(cut(tokens, starts, block_size + 1))


class Rows(NamedTuple):
    """Batches made on the host for the updates from `first` on."""

    first: jax.Array | int
    batches: Any  # each leaf (n, B, ...)


class Prefetched:
    """Batches made on the host, by a thread, one call of the device ahead.

    Args:
        source: whose `batch(step)` makes one.
        n: updates in one call of the device.
        put: lays n stacked batches, each leaf (n, B, ...), onto the devices.
    """

    def __init__(self, source: Batches, n: int, put: Callable[[Any], Any] = jax.device_put):
        self._source, self._n, self._put = source, n, put
        self._pool = ThreadPoolExecutor(1, "batches")
        self._next: tuple[int, Future[Rows]] | None = None

    def batch(self, step: int) -> Any:
        return self._source.batch(step)

    def data(self, step: int, then: int | None = None) -> Rows:
        found, self._next = self._next, None
        rows = found[1].result() if found and found[0] == step else self._make(step)
        if then is not None:
            self._next = then, self._pool.submit(self._make, then)
        return rows

    @pinned()  # a thread does not inherit what its caller pinned
    def _make(self, step: int) -> Rows:
        batches = [self._source.batch(step + i) for i in range(self._n)]
        return Rows(step, self._put(jax.tree.map(lambda *rows: np.stack(rows), *batches)))

    @staticmethod
    def at(data: Rows, seed_key: jax.Array, step: jax.Array) -> Any:
        """The batch of a step; traced."""
        return jax.tree.map(lambda x: as_int32(x[step - data.first]), data.batches)


def as_int32(x: jax.Array) -> jax.Array:
    """Ids of any integer type as int32; other arrays as they are."""
    return x.astype(jnp.int32) if jnp.issubdtype(x.dtype, jnp.integer) else x


class OnDisk:
    """Random windows of tokens that stay in memory or in a memory-mapped file: the same windows as
    `Windows` cuts.

    Args:
        tokens: (N,) ids.
        seed: of the run.
        batch_size: B.
        block_size: T.
    """

    def __init__(self, tokens: np.ndarray, seed: int, batch_size: int, block_size: int):
        self._tokens, self._seed, self._block = tokens, seed, block_size
        self._shape = batch_size, block_size

    def batch(self, step: int) -> Batch:
        starts = _host_starts(self._seed, step, len(self._tokens), *self._shape)
        return Batch.of_windows(windows(self._tokens, starts, self._block))


class Shuffled:
    """Consecutive windows in shuffled order: each once an epoch, in another order every epoch;
    several texts are mixed by their weights.

    Args:
        parts: (N,) ids of each text, and its weight.
        seed: of the run.
        batch_size: B.
        block_size: T.

    Raises:
        UserError: grain is missing.
    """

    def __init__(
        self,
        parts: Sequence[tuple[np.ndarray, float]],
        seed: int,
        batch_size: int,
        block_size: int,
    ):
        grain = optional_import("grain")
        self._batch_size = batch_size
        orders = [
            grain.MapDataset.source(_Consecutive(tokens, block_size))
            .seed(seed + i)
            .shuffle()
            .repeat()
            for i, (tokens, _) in enumerate(parts)
        ]
        weights = [weight for _, weight in parts]
        self._mixed = grain.MapDataset.mix(orders, weights) if len(orders) > 1 else orders[0]

    def batch(self, step: int) -> Batch:
        first = step * self._batch_size
        rows = [self._mixed[i] for i in range(first, first + self._batch_size)]
        return Batch.of_windows(np.stack(rows))


class _Consecutive:
    """The windows of a text that follow on one another, as grain reads them."""

    def __init__(self, tokens: np.ndarray, block_size: int):
        self._tokens, self._block = tokens, block_size

    def __len__(self) -> int:
        return (len(self._tokens) - 1) // self._block

    def __getitem__(self, i: int) -> np.ndarray:
        return self._tokens[i * self._block : (i + 1) * self._block + 1]


def fingerprint(batches: Batches) -> str:
    """JSON that identifies a source of batches by its first one."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(batches.batch(0)):
        array = np.asarray(leaf)
        digest.update(f"{array.dtype}{array.shape}".encode() + array.tobytes())
    return json.dumps({"first batch": digest.hexdigest()})


# ---------------------------------------------------------------------------------------------
# Windows of tokens


def cut(tokens: jax.Array, starts: jax.Array, length: int) -> jax.Array:
    """Windows of a token array, on the device.

    Args:
        tokens: (N,) integer ids.
        starts: (B,) int32, each at most N - length (a later one is moved back to it).
        length: of a window.

    Returns:
        (B, length) int32.
    """
    found = jax.vmap(lambda start: jax.lax.dynamic_slice_in_dim(tokens, start, length))(starts)
    return found.astype(jnp.int32)


def windows(tokens: np.ndarray, starts: np.ndarray, block_size: int) -> np.ndarray:
    """The (..., T + 1) windows of (N,) tokens that begin at starts (...), on the host."""
    return np.lib.stride_tricks.sliding_window_view(tokens, block_size + 1)[starts]


def flat(windows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(n, B, T + 1) windows as one array of tokens, and their (n, B) starts in it."""
    n, B, width = windows.shape
    return windows.ravel(), (np.arange(n * B, dtype=np.int32) * width).reshape(n, B)


def random_starts(
    key: jax.Array, n_tokens: int, shape: tuple[int, ...], block_size: int
) -> jax.Array:
    """Uniform starts of windows of T + 1 tokens, of the given shape, int32."""
    return jax.random.randint(key, shape, 0, n_tokens - block_size)


def whole_split_starts(n_tokens: int, batch_size: int, block_size: int) -> np.ndarray:
    """Starts of non-overlapping windows that predict each token but the first exactly once.

    Args:
        n_tokens: length of the split.
        batch_size: windows in one batch.
        block_size: targets in one window.

    Returns:
        (n, B) int32; the last batch is filled up with n_tokens, where nothing is left to predict.
    """
    starts = np.arange(0, n_tokens - 1, block_size)
    starts = np.pad(starts, (0, -len(starts) % batch_size), constant_values=n_tokens)
    return starts.reshape(-1, batch_size).astype(np.int32)


def _host_starts(
    seed: int, step: int, n_tokens: int, batch_size: int, block_size: int
) -> np.ndarray:
    """The (B,) starts of `windows_at`, drawn on this machine's CPU: the device is busy."""
    try:
        cpu: Any = jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # JAX was told to use accelerators only
        cpu = None
    with jax.default_device(cpu):
        if n_tokens < 2**31:
            return np.asarray(_draw(seed, step, n_tokens, batch_size, block_size))
        words = np.asarray(_draw_words(seed, step, batch_size)).astype(np.uint64)
    places = np.uint64(n_tokens - block_size)
    return ((words[..., 0] << np.uint64(32) | words[..., 1]) % places).astype(np.int64)


@partial(jax.jit, static_argnums=(2, 3, 4))
def _draw(seed: int, step: int, n_tokens: int, batch_size: int, block_size: int) -> jax.Array:
    key = random_key(jax.random.key(seed), BATCH, step)
    return random_starts(key, n_tokens, (batch_size,), block_size)


@partial(jax.jit, static_argnums=2)
def _draw_words(seed: int, step: int, batch_size: int) -> jax.Array:
    """(B, 2) random words, for starts that 32 bits do not hold."""
    return jax.random.bits(random_key(jax.random.key(seed), BATCH, step), (batch_size, 2))
