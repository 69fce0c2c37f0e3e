"""Training batches for the device: cut there from tokens that it holds, or made on the host.

Either way a batch is a function of (seed, step), and for windows at random places it is the same
one. What the host makes is made by a thread, one call ahead of the device.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.config import Config
from gptjax.errors import optional_import
from gptjax.step import BATCH, Batches, batch_at, eval_starts, random_key
from gptjax.text.dataset import random_starts

EVERY = slice(None)  # row of a batch


class Feed(Protocol):
    """Where `train_steps` gets its tokens from."""

    def __call__(self, step: int, then: int | None = None) -> jax.Array | Batches:
        """What the updates after `step` are made of; those after `then` come next."""
        ...

    def batch(self, step: int) -> np.ndarray:
        """The (B, T + 1) windows of the update after `step`."""
        ...

    def sample(self, step: int) -> tuple[Any, Any]:
        """(N,) tokens and the (eval_batches, B) starts in them to measure the training loss at."""
        ...


class Resident:
    """Tokens that the device holds, and cuts windows of by itself.

    Args:
        config: of the run.
        tokens: (N,), on the devices.
        seed_key: of the run.
    """

    def __init__(self, config: Config, tokens: jax.Array, seed_key: jax.Array):
        self._config, self._tokens, self._seed_key = config, tokens, seed_key

    def __call__(self, step: int, then: int | None = None) -> jax.Array:
        return self._tokens

    def batch(self, step: int) -> np.ndarray:
        return np.asarray(batch_at(self._config, self._tokens, self._seed_key, step))

    def sample(self, step: int) -> tuple[Any, Any]:
        n_tokens = self._tokens.shape[0]
        return self._tokens, eval_starts(self._config, n_tokens, self._seed_key, step, False)


class OnDisk:
    """Tokens that stay where they are, in memory or in a file, and are read by the batch.

    Args:
        config: of the run.
        parts: training tokens of each text, and how often it is drawn from.
        put: takes a function from a slice of a batch's rows to these of the (n, B, T + 1) batches
            of n = steps_per_dispatch updates, and lays them where the devices need them.
    """

    def __init__(
        self,
        config: Config,
        parts: tuple[tuple[np.ndarray, float], ...],
        put: Callable[[Callable[[slice], np.ndarray]], jax.Array],
    ):
        self._config, self._put = config, put
        self._parts = parts
        if config.data.order == "shuffled":
            self._rows = shuffled_rows(config, parts)
        else:
            self._rows = partial(random_rows, config, parts[0][0])
        self._pool = ThreadPoolExecutor(1, "feed")
        self._ahead: tuple[int, Future[Batches]] | None = None

    def __call__(self, step: int, then: int | None = None) -> Batches:
        ahead, self._ahead = self._ahead, None
        found = ahead[1].result() if ahead and ahead[0] == step else self._make(step)
        if then is not None:
            self._ahead = then, self._pool.submit(self._make, then)
        return found

    def _make(self, step: int) -> Batches:
        n = self._config.steps_per_dispatch
        rows = self._put(lambda share: self._rows(step, n, share))
        return Batches(step, rows)

    def batch(self, step: int) -> np.ndarray:
        return self._rows(step, 1)[0].astype(np.int32)

    def sample(self, step: int) -> tuple[Any, Any]:
        """As `Resident`; in shuffled order, the batches that come next."""
        n = self._config.eval_batches or 1
        if self._config.data.order == "shuffled":
            return in_a_row(self._rows(step, n))
        tokens, key = self._parts[0][0], jax.random.key(self._config.seed)
        starts = eval_starts(self._config, len(tokens), key, step, False)
        return in_a_row(gather(tokens, np.asarray(starts), self._config.model.block_size))


def random_rows(
    config: Config, tokens: np.ndarray, step: int, n: int, share: slice = EVERY
) -> np.ndarray:
    """Windows at random places, those that `batch_at` cuts on the device.

    Args:
        config: of the run.
        tokens: (N,).
        step: of the first batch; n: how many batches.
        share: which rows of each batch.

    Returns:
        (n, rows, T + 1), of the tokens' type.
    """
    starts = _starts(config, len(tokens), step, n)
    return gather(tokens, starts[:, share], config.model.block_size)


def shuffled_rows(
    config: Config, parts: tuple[tuple[np.ndarray, float], ...]
) -> Callable[..., np.ndarray]:
    """The function that makes batches of windows in shuffled order, as `random_rows` does.

    A text is cut into windows that follow on one another. Each comes once in a pass over it, in
    an order that follows from the seed and is another in each pass; several texts take turns by
    their weights.

    Raises:
        UserError: grain is missing.
    """
    grain = optional_import("grain")
    T, B = config.model.block_size, config.batch_size

    class Windows:
        def __init__(self, tokens: np.ndarray):
            self.tokens = tokens

        def __len__(self) -> int:
            return (len(self.tokens) - 1) // T

        def __getitem__(self, i: int) -> np.ndarray:
            return self.tokens[i * T : (i + 1) * T + 1]

    orders = [
        grain.MapDataset.source(Windows(tokens)).seed(config.seed + i).shuffle().repeat()
        for i, (tokens, _) in enumerate(parts)
    ]
    weights = [weight for _, weight in parts]
    mixed = grain.MapDataset.mix(orders, weights) if len(orders) > 1 else orders[0]

    def rows(step: int, n: int, share: slice = EVERY) -> np.ndarray:
        places = np.arange(step * B, (step + n) * B).reshape(n, B)
        mine = places[:, share]
        return np.stack([mixed[int(i)] for i in mine.flat]).reshape(*mine.shape, T + 1)

    return rows


def gather(tokens: np.ndarray, starts: np.ndarray, block: int) -> np.ndarray:
    """The (..., block + 1) windows of (N,) tokens that begin at starts (...)."""
    return np.lib.stride_tricks.sliding_window_view(tokens, block + 1)[starts]


def in_a_row(windows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(n, B, T + 1) windows as one array of tokens, and their (n, B) starts in it."""
    n, B, width = windows.shape
    return windows.ravel(), (np.arange(n * B, dtype=np.int32) * width).reshape(n, B)


def _starts(config: Config, n_tokens: int, step: int, n: int) -> np.ndarray:
    """(n, B) starts, drawn on this machine's processor: the device is busy."""
    try:
        processor: Any = jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # JAX was told to use accelerators only
        processor = None
    shape, block = (n, config.batch_size), config.model.block_size
    with jax.default_device(processor):
        if n_tokens < 2**31:
            return np.asarray(_draw(config.seed, step, n_tokens, shape, block))
        words = np.asarray(_draw_words(config.seed, step, shape)).astype(np.uint64)
    return ((words[..., 0] << np.uint64(32) | words[..., 1]) % (n_tokens - block)).astype(np.int64)


@partial(jax.jit, static_argnums=(2, 3, 4))
def _draw(seed: int, step: int, n_tokens: int, shape: tuple[int, int], block: int) -> jax.Array:
    """What `batch_at` draws, for some steps at once."""
    draw = lambda key: random_starts(key, n_tokens, shape[1:], block)
    return jax.vmap(draw)(_keys(seed, step, shape[0]))


@partial(jax.jit, static_argnums=2)
def _draw_words(seed: int, step: int, shape: tuple[int, int]) -> jax.Array:
    """(n, B, 2) random words, for starts that 32 bits do not hold."""
    draw = lambda key: jax.random.bits(key, (shape[1], 2))
    return jax.vmap(draw)(_keys(seed, step, shape[0]))


def _keys(seed: int, step: int, n: int) -> jax.Array:
    seed_key = jax.random.key(seed)
    return jax.vmap(lambda i: random_key(seed_key, BATCH, step + i))(jnp.arange(n))
