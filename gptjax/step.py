"""The train step and the evaluation, as pure functions.

Randomness has no state: a key is `fold_in(fold_in(key(seed), purpose), step)`, so a step's batch
and dropout masks follow from (seed, step) alone, whatever was evaluated, logged or resumed.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Sharding

from gptjax import trainable
from gptjax.config import Config, OptimConfig
from gptjax.errors import UserError
from gptjax.optim import make_schedule
from gptjax.text.dataset import cut, random_starts, sample_batch, whole_split_starts

INIT, BATCH, DROPOUT, EVAL, LORA = range(5)  # purposes of a key


class TrainState(NamedTuple):
    """Everything that training changes; `step` counts the updates made."""

    step: jax.Array
    params: Any
    opt_state: optax.OptState
    average: Any = None  # running mean of params, if the config asks for one

    @property
    def weights(self) -> Any:
        """The parameters to evaluate, save and sample with."""
        return trainable.merged(self.params if self.average is None else self.average)


class StepMetrics(NamedTuple):
    """Of one update, or (n,) of n of them: float32."""

    loss: jax.Array
    grad_norm: jax.Array
    lr: jax.Array


class Batches(NamedTuple):
    """Batches made beforehand, for a state that has had `first` updates and for no other."""

    first: jax.Array | int
    rows: jax.Array  # (M, B, T + 1)


class Loop(NamedTuple):
    """What goes round in `train_steps`."""

    state: TrainState
    log: StepMetrics
    made: jax.Array  # updates tried
    finite: jax.Array  # so far


def random_key(seed_key: jax.Array, purpose: int, step: jax.Array | int = 0) -> jax.Array:
    """The key for one purpose at one step."""
    return jax.random.fold_in(jax.random.fold_in(seed_key, purpose), step)


def init_state(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    seed_key: jax.Array,
    config: OptimConfig | None = None,
    params: Any = None,
) -> TrainState:
    """The state at step 0, with an empty optimizer state.

    Args:
        model: any module of the contract in `model.py`.
        optimizer: an optax transformation.
        seed_key: of the run.
        config: of the optimizer: whether there is a running mean, and what is trained.
        params: to start from; None: drawn from the seed.
    """
    config = config or OptimConfig()
    if params is None:
        tokens = jnp.zeros((1, 1), jnp.int32)
        params = model.init(random_key(seed_key, INIT), tokens)["params"]
    params = trainable.add_lora(params, config, random_key(seed_key, LORA))
    average = None
    if config.ema is not None:
        average = jax.tree.map(jnp.copy, params)  # two buffers, to be donated
    opt_state = optimizer.init(trainable.trained(params, config))
    return TrainState(jnp.zeros((), jnp.int32), params, opt_state, average)


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Next-token loss of each position.

    Args:
        logits: (B, T, V), any float dtype; computed in float32.
        targets: (B, T) int32 ids in [0, V).

    Returns:
        (B, T) float32, nats per token; ln(V) for a model that knows nothing.
    """
    logits = logits.astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets)


def chunked_cross_entropy(
    head: Callable[[jax.Array], jax.Array], x: jax.Array, targets: jax.Array, chunk: int
) -> jax.Array:
    """`cross_entropy(head(x), targets)` without all logits at once: those of `chunk` positions of
    each window, again and again, and once more in the backward pass.

    Args:
        head: (B, chunk, C) features to (B, chunk, V) logits.
        x: (B, T, C) features; chunk divides T.
        targets: (B, T) int32 ids in [0, V).

    Returns:
        (B, T) float32, nats per token.
    """
    B, T = targets.shape
    parts = lambda x: x.reshape(B, T // chunk, chunk, *x.shape[2:]).swapaxes(0, 1)
    part_losses = jax.checkpoint(lambda part: cross_entropy(head(part[0]), part[1]))
    losses = jax.lax.map(part_losses, (parts(x), parts(targets)))
    return losses.swapaxes(0, 1).reshape(B, T)


def token_losses(
    model: nn.Module, params: Any, windows: jax.Array, chunk: int | None, **options: Any
) -> jax.Array:
    """(B, T) float32 loss of each token but the first of (B, T + 1) windows.

    Args:
        model: of the contract in `model.py`; with a chunk, one that has `features` and `head`.
        params: its parameters.
        windows: int32 ids.
        chunk: see `chunked_cross_entropy`; None: all positions at once.
        options: of `model.apply`.

    Raises:
        UserError: a chunk for a model of your own that has no `features`.
    """
    x, y = windows[:, :-1], windows[:, 1:]
    if chunk is None:
        logits, _ = model.apply({"params": params}, x, **options)
        return cross_entropy(logits, y)
    if not hasattr(model, "features"):
        raise UserError(
            f"loss_chunk={chunk} needs a model with the methods features and head, as GPT has; "
            f"leave loss_chunk out"
        )
    x, _ = model.apply({"params": params}, x, method="features", **options)
    head: Any = lambda x: model.apply({"params": params}, x, method="head")
    return chunked_cross_entropy(head, x, y, chunk)


def batch_at(
    config: Config, tokens: jax.Array, seed_key: jax.Array, step: jax.Array | int
) -> jax.Array:
    """(B, T + 1) int32 windows of the (N,) training tokens for the update after `step`."""
    key = random_key(seed_key, BATCH, step)
    return sample_batch(tokens, key, config.batch_size, config.model.block_size)


def make_gradient(
    model: nn.Module, config: Config
) -> Callable[[Any, jax.Array, jax.Array, jax.Array | int], tuple[jax.Array, Any]]:
    """The function that differentiates.

    Returns:
        `gradient(params, batch, seed_key, step)`: mean loss of the (B, T + 1) windows and its
        gradient by what is trained, with the dropout masks of the update after `step`; G =
        accumulate micro-batches one after the other.
    """
    G, T = config.optim.accumulate, config.model.block_size

    def loss_fn(moved: Any, params: Any, batch: jax.Array, key: jax.Array) -> jax.Array:
        whole = trainable.merged(trainable.put_back(moved, params))
        options = {"train": True, "rngs": {"dropout": key}}
        return token_losses(model, whole, batch, config.loss_chunk, **options).mean()

    def gradient(
        params: Any, batch: jax.Array, seed_key: jax.Array, step: jax.Array | int
    ) -> tuple[jax.Array, Any]:
        key = random_key(seed_key, DROPOUT, step)
        value_and_grad = jax.value_and_grad(loss_fn)
        moved = trainable.trained(params, config.optim)
        if G == 1:
            return value_and_grad(moved, params, batch, key)

        def add(total: Any, micro: tuple[jax.Array, jax.Array]) -> tuple[Any, None]:
            part = value_and_grad(moved, params, micro[0], jax.random.fold_in(key, micro[1]))
            return jax.tree.map(jnp.add, total, part), None

        # Row r goes to micro-batch r % G, so that each device keeps its rows.
        micro_batches = batch.reshape(-1, G, T + 1).swapaxes(0, 1)
        zero = jax.tree.map(jnp.zeros_like, (jnp.zeros(()), moved))
        total, _ = jax.lax.scan(add, zero, (micro_batches, jnp.arange(G)))
        return jax.tree.map(lambda x: x / G, total)

    return gradient


def make_train_steps(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    config: Config,
    batch_sharding: Sharding | None = None,
) -> Callable[
    [TrainState, jax.Array | Batches, jax.Array, jax.Array | int], tuple[TrainState, StepMetrics]
]:
    """The function that trains: to be jitted once, with its state donated.

    Args:
        model: any module of the contract in `model.py`.
        optimizer: an optax transformation.
        config: of the run.
        batch_sharding: where the rows of a batch go; None: one device.

    Returns:
        `train_steps(state, tokens, seed_key, n)`: makes n updates, at most steps_per_dispatch, on
        windows of the (N,) training tokens, or on the first n `Batches`; gives the new state and
        the metrics, of which the first n are filled. n is traced, so that one compilation serves
        a whole run. It ends early before an update whose loss or gradient is not finite: the state
        is the one before it, and the last metrics filled are those that were bad. A call that
        comes after such a one, for the state that was hoped for, changes nothing.
    """
    schedule, gradient = make_schedule(config), make_gradient(model, config)

    def decay(step: jax.Array) -> jax.Array:
        """Of the average: slower and slower, so that the first parameters are soon forgotten."""
        return jnp.minimum(config.optim.ema or 0.0, (1 + step) / (10 + step))

    def train_steps(
        state: TrainState, tokens: jax.Array | Batches, seed_key: jax.Array, n: jax.Array | int
    ) -> tuple[TrainState, StepMetrics]:
        def update(carry: Loop) -> Loop:
            state = carry.state
            if isinstance(tokens, Batches):
                batch = tokens.rows[carry.made].astype(jnp.int32)
            else:
                batch = batch_at(config, tokens, seed_key, state.step)
            if batch_sharding is not None:
                batch = jax.lax.with_sharding_constraint(batch, batch_sharding)
            loss, grads = gradient(state.params, batch, seed_key, state.step)
            norm = optax.tree.norm(grads)
            finite = jnp.isfinite(loss) & jnp.isfinite(norm)

            def move(state: TrainState) -> TrainState:
                moved = trainable.trained(state.params, config.optim)
                updates, opt_state = optimizer.update(grads, state.opt_state, moved)
                moved = optax.apply_updates(moved, updates)
                average = state.average
                if average is not None:
                    mean = trainable.trained(average, config.optim)
                    mean = optax.incremental_update(moved, mean, 1 - decay(state.step))
                    average = trainable.put_back(mean, average)
                params = trainable.put_back(moved, state.params)
                return TrainState(state.step + 1, params, opt_state, average)

            metrics = StepMetrics(loss, norm, jnp.float32(schedule(state.step)))
            log = jax.tree.map(lambda xs, x: xs.at[carry.made].set(x), carry.log, metrics)
            state = jax.lax.cond(finite, move, lambda state: state, state)
            return Loop(state, log, carry.made + 1, finite)

        empty = StepMetrics(*[jnp.zeros((config.steps_per_dispatch,))] * 3)
        ready = state.step == (tokens.first if isinstance(tokens, Batches) else state.step)
        # The loop keeps its temporaries from step to step: 54 -> 37 ms a step on 2 CPU cores.
        end = jax.lax.while_loop(
            lambda carry: (carry.made < n) & carry.finite,
            update,
            Loop(state, empty, jnp.zeros((), jnp.int32), ready),
        )
        return end.state, end.log

    return train_steps


def make_evaluate(
    model: nn.Module, config: Config, batch_sharding: Sharding | None = None
) -> Callable[[Any, jax.Array, jax.Array], jax.Array]:
    """The function that measures: no dropout, no gradient, no random draw of its own.

    Returns:
        `evaluate(params, tokens, starts)`: mean loss, float32, of the windows of the (N,) tokens
        that begin at the (n, B) starts; targets past the end of the tokens do not count.
    """
    T = config.model.block_size
    rows = config.batch_size // config.optim.accumulate  # at once, as when training

    def evaluate(params: Any, tokens: jax.Array, starts: jax.Array) -> jax.Array:
        n_tokens = tokens.shape[0]
        padded = jnp.pad(tokens, (0, T + 1))  # so that a window may run over the end

        def batch_loss(row: jax.Array) -> tuple[jax.Array, jax.Array]:
            windows = cut(padded, row, T + 1)
            if batch_sharding is not None:
                windows = jax.lax.with_sharding_constraint(windows, batch_sharding)
            inside = row[:, None] + jnp.arange(T)[None, :] < n_tokens - 1
            losses = token_losses(model, params, windows, config.loss_chunk)
            return jnp.where(inside, losses, 0.0).sum(), inside.sum()

        losses, counts = jax.lax.map(batch_loss, starts.reshape(-1, rows))
        return losses.sum() / counts.sum()

    return evaluate


def eval_starts(
    config: Config, n_tokens: int, seed_key: jax.Array, step: int, whole: bool
) -> np.ndarray | jax.Array:
    """(n, B) starts: the whole split's, or eval_batches random draws that follow from the step."""
    B, T = config.batch_size, config.model.block_size
    if whole or config.eval_batches is None:
        return whole_split_starts(n_tokens, B, T)
    key = random_key(seed_key, EVAL, step)
    return random_starts(key, n_tokens, (config.eval_batches, B), T)
