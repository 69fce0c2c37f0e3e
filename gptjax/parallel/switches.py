"""JAX's own switches that would change a run's numbers, at the values that runs are made with.

They can be set in the environment (`JAX_ENABLE_X64=1`, `JAX_DEFAULT_PRNG_IMPL=rbg`) and by any
program, and nothing in a run would show it: batches, initialisation, dropout and samples follow
from the random numbers, and the rounding from the types and the precision.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TypeVar

import jax

T = TypeVar("T")
# Those without a context manager of JAX's.
GLOBAL = {"jax_random_seed_offset": 0, "jax_high_dynamic_range_gumbel": False}


@contextmanager
def pinned() -> Iterator[None]:
    """Compute as runs are computed, whatever the environment or the caller has set; also a
    decorator, but not of generators."""
    with ExitStack() as stack:
        stack.enter_context(jax.enable_x64(False))
        stack.enter_context(jax.numpy_dtype_promotion("standard"))
        stack.enter_context(jax.default_matmul_precision(None))  # that of the config's dtype
        stack.enter_context(jax.default_prng_impl("threefry2x32"))
        stack.enter_context(jax.threefry_partitionable(True))
        for name, value in GLOBAL.items():
            if (before := getattr(jax.config, name)) != value:
                jax.config.update(name, value)
                stack.callback(jax.config.update, name, before)
        yield


def pinned_pieces(pieces: Iterator[T]) -> Iterator[T]:
    """Make each piece under `pinned`; between them the caller's own settings hold."""
    while True:
        with pinned():
            try:
                piece = next(pieces)
            except StopIteration:
                return
        yield piece
