"""The gptjax sides of the comparisons, which call its functions as its commands do."""

import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import measure
from gptjax.assembly import assemble
from gptjax.batches import Windows
from gptjax.config import Config
from gptjax.generation.slots import generate
from gptjax.parallel import sharding
from gptjax.parallel.flops import count_params, flops_per_token, matmul_peak
from gptjax.sampling import Sampling


def flat(params: Any) -> dict[str, np.ndarray]:
    """`{"h/attn/c_attn/kernel": array}`."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {"/".join(key.key for key in path): np.asarray(leaf) for path, leaf in leaves}


def training(
    config: Config, vocab_size: int, tokens: np.ndarray, start: Path | None = None, check: int = 3
) -> Callable[..., Any]:
    """A side that trains as `gptjax.training` does.

    Args:
        config: the run's config.
        vocab_size: rows of the embedding table.
        tokens: (N,) to train on.
        start: .npz file to write the initial weights and the first batches to, for other sides.
        check: number of first steps whose losses are kept and whose batches are written.

    Returns:
        `ask("work", seconds)`: a Visit; `ask("peak")`: FLOP/s of a large matmul; `ask("facts")`:
        losses of the first steps, seconds of the first call (with compilation), bytes of peak
        memory, and, for gptjax only, parameters and FLOPs per step.
    """
    setup = assemble(config, vocab_size)
    state, on_device = setup.start(), sharding.put(setup.mesh, tokens)
    key, n = setup.seed_key(), config.steps_per_dispatch
    if start is not None:
        source = Windows(on_device, key, config.batch_size, config.model.block_size)
        batches = [source.batch(step) for step in range(check)]
        rows = [np.concatenate([b.inputs, b.targets[:, -1:]], axis=1) for b in batches]
        arrays = flat(state.params) | {"batches": np.stack(rows)}
        np.savez(start, **arrays)  # pyright: ignore[reportArgumentType]
    params = count_params(state.params)
    flops = flops_per_token(config.model, state.params)
    flops *= config.batch_size * config.model.block_size

    began, losses = time.perf_counter(), []
    while len(losses) < check:
        count = min(n, check - len(losses))
        state, out = setup.steps(state, on_device, key, len(losses), count)
        losses += [float(loss) for loss in out["loss"][:count]]
        if len(losses) == count:
            compile_seconds = time.perf_counter() - began
    pending: Any = None
    step = len(losses)

    def dispatch() -> int:
        """One call; as in `train`, the previous call's metrics are read while the device works."""
        nonlocal state, pending, step
        before = pending
        state, pending = setup.steps(state, on_device, key, step, n)
        jax.device_get(before)
        step += n
        return n

    def ask(what: str, seconds: float = 0.0) -> Any:
        if what == "work":
            return measure.work(dispatch, seconds, lambda: jax.block_until_ready(state))
        if what == "peak":
            return matmul_peak(config.model.dtype) * setup.mesh.size
        return {
            "params": params,
            "flops": flops,
            "first_losses": losses,
            "compile_seconds": compile_seconds,
            "peak_memory": peak_memory(),
        }

    return ask


def peak_memory() -> int:
    """Peak bytes of the first device, or of this process where the device is a CPU."""
    stats = jax.local_devices()[0].memory_stats()
    return measure.peak_memory() if stats is None else stats["peak_bytes_in_use"]


def sampling(config: Config, vocab_size: int, weights: Path) -> Callable[..., Any]:
    """A side that samples as `sample.py` does; it initialises the weights and writes them as .npz.

    Returns:
        `ask("warm", batch, length)`: compiles; `ask("work", batch, length, seconds)`: a Visit that
        counts tokens, for samples of `length` tokens after a prompt of one; `ask("greedy",
        length)`: greedy tokens after token 0; `ask("floor", batch, length)`: a Floor.
    """
    setup = assemble(config, vocab_size)
    model, params, key = setup.applied, setup.start().params, setup.seed_key()
    np.savez(weights, **flat(params))  # pyright: ignore[reportArgumentType]
    prompt = np.zeros(1, np.int32)

    peak = functools.cache(lambda: matmul_peak(config.model.dtype))

    def tokens(batch: int, length: int, temperature: float = 1.0) -> np.ndarray:
        how = Sampling(temperature, vocab_size=vocab_size)
        chunks = generate(model, params, prompt, key, length, how, batch)
        return np.concatenate(list(chunks), axis=1)

    def ask(what: str, *args: Any) -> Any:
        if what == "warm":
            return tokens(*args).size
        if what == "work":
            *task, seconds = args
            return measure.work(lambda: tokens(*task).size, seconds)
        if what == "greedy":
            return tokens(1, args[0], 0.0)[0].tolist()
        return floor(config, params, *args, peak=peak())

    return ask


class Floor(NamedTuple):
    """Roofline of decoding in this precision: an upper bound on tokens/s, and its terms."""

    tokens_per_second: float
    bytes_per_step: int
    """Weights, read once for all streams, and every stream's KV cache."""
    bandwidth: float
    """Measured bytes/s of reading an array of that size, from the CPU cache if it fits."""
    memory_bandwidth: float
    """Measured bytes/s of reading an array larger than the caches."""
    flops_per_step: int
    peak: float


def floor(config: Config, params: Any, batch: int, length: int, peak: float) -> Floor:
    """Roofline of one decoding step for `batch` streams of up to `length` tokens."""
    m = config.model
    # flops_per_token is 6 per matmul parameter plus attention.
    width = m.n_embd * (m.n_kv_head or m.n_head) // m.n_head
    attention = 12 * m.n_layer * m.n_embd * m.block_size
    multiplied = (flops_per_token(m, params) - attention) // 6
    context = min(length, m.block_size) // 2  # the mean over a window that fills
    read = jnp.dtype(m.dtype).itemsize * (multiplied + batch * 2 * m.n_layer * context * width)
    flops = batch * (2 * multiplied + 4 * m.n_layer * m.n_embd * context)
    bandwidth, memory = read_bandwidth(read), read_bandwidth(2**28)
    seconds = max(read / bandwidth, flops / peak)
    return Floor(batch / seconds, read, bandwidth, memory, flops, peak)


@functools.cache
def read_bandwidth(size: int) -> float:
    """Bytes/s of repeatedly reading `size` bytes, by the fastest of several methods."""
    on_cpu = jax.default_backend() == "cpu"
    rows, calls = max(1, size // 4096), 1 if on_cpu else 20
    host = np.random.default_rng(0).random((rows, 1024), np.float32)
    array, vector = jnp.asarray(host), jnp.ones(1024)
    add, multiply = jax.jit(jnp.sum), jax.jit(jnp.matmul)
    ways: list[Callable[[], Any]] = [
        lambda: jax.block_until_ready([add(array) for _ in range(calls)]),
        lambda: jax.block_until_ready([multiply(array, vector) for _ in range(calls)]),
    ]
    if on_cpu:
        numbers = np.ones(1024, np.float32)
        ways.append(lambda: host @ numbers)
    return calls * host.nbytes / min(map(measure.best_seconds, ways))
