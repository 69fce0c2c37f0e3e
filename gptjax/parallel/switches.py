"""JAX's own switches that would change a run's numbers, at the values that runs are made with.

They can be set in the environment (`JAX_ENABLE_X64=1`, `JAX_DEFAULT_PRNG_IMPL=rbg`) and by any
program, and nothing in a run would show it: batches, initialisation, dropout and samples follow
from the random numbers, and the rounding from the types and the precision.

And the switches of XLA's compiler for GPUs that make a run there repeat itself.
"""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TypeVar

import jax
from jax._src import xla_bridge

from gptjax.errors import UserError

T = TypeVar("T")
# Those without a context manager of JAX's.
GLOBAL = {"jax_random_seed_offset": 0, "jax_high_dynamic_range_gumbel": False}
# Scatters, matmuls and cuDNN's attention add up in a fixed order, and nothing is timed to choose
# between kernels: what is fastest in one process may not be in the next.
# Source: openxla.org/xla/determinism; openxla/xla pull request 12520.
DETERMINISTIC = "--xla_gpu_deterministic_ops=true --xla_gpu_autotune_level=0"


def use_deterministic_kernels() -> None:
    """Have XLA take no operation on a GPU whose result may vary from run to run; CPUs have none.
    Appended to `XLA_FLAGS`, where the last one counts.

    Raises:
        UserError: JAX has started its devices, and no longer reads them.
    """
    if xla_bridge.backends_are_initialized():
        raise UserError(
            "--deterministic comes too late, for something has used JAX's devices already, such as "
            f"the file of --config; set XLA_FLAGS='{DETERMINISTIC}' before starting instead"
        )
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {DETERMINISTIC}".lstrip()


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
