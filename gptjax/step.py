"""The train step: one update as a pure function, and small combinators around it.

    step = partial(train_step, model=model, optimizer=optimizer)     # (state, batch, key) -> ...
    step = skip_nonfinite(with_ema(step, 0.999))
    steps = jax.jit(repeat(step, batch_at, limit=8), donate_argnums=0)

Randomness has no state: a key is `fold_in(fold_in(key(seed), purpose), step)`, so a step's batch
and dropout masks follow from (seed, step) alone, whatever was evaluated, logged or resumed.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import optax.contrib

from gptjax import optim
from gptjax.batches import DROPOUT, INIT, LORA, Batch, random_key
from gptjax.errors import UserError
from gptjax.loss import TINY, LossFn, Metrics, next_token_loss, scalars


class TrainState(NamedTuple):
    """What training changes, and the frozen parameters.

    Attributes:
        step: () int32, updates tried; a skipped one counts.
        params: what is trained.
        opt_state: of the optimizer.
        ema: exponential moving average of params, if asked for.
        frozen: the parameters that are not trained (see `optim.split`), if any.
    """

    step: jax.Array
    params: Any
    opt_state: optax.OptState
    ema: Any = None
    frozen: Any = None

    @property
    def weights(self) -> Any:
        """The parameters to evaluate, save and sample with."""
        params = self.params if self.ema is None else self.ema
        if self.ema is None and (averaging := schedule_free_state(self.opt_state)) is not None:
            params = optax.contrib.schedule_free_eval_params(averaging, params)
        return optim.join(params, self.frozen)

    @property
    def separate_weights(self) -> bool:
        """Whether `weights` are other numbers than the trained and frozen parameters."""
        averaged = self.ema is not None or schedule_free_state(self.opt_state) is not None
        return averaged or optim.has_lora(self.params)


Step = Callable[[TrainState, Any, jax.Array], tuple[TrainState, Metrics]]
Observe = Callable[[TrainState, Any, Any], Metrics]
NORMS = "param_norms/", "grad_norms/", "update_norms/"  # begin the names of `layer_norms`


def init_state(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    seed_key: jax.Array,
    *,
    params: Any = None,
    split: Callable[[Any, jax.Array], tuple[Any, Any]] | None = None,
    ema: bool = False,
) -> TrainState:
    """The state before the first step.

    Args:
        model: of the contract in `model.py`.
        optimizer: an optax transformation.
        seed_key: of the run.
        params: to start from; None: drawn from the seed.
        split: `split(params, key)`, what is trained and what is frozen; None: all is trained.
        ema: whether to keep a moving average of the parameters, for `with_ema`.
    """
    if params is None:
        tokens = jnp.zeros((1, 1), jnp.int32)
        params = model.init(random_key(seed_key, INIT), tokens)["params"]
    frozen = None
    if split is not None:
        params, frozen = split(params, random_key(seed_key, LORA))
    average = jax.tree.map(jnp.copy, params) if ema else None  # two buffers, to be donated
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), average, frozen)


def train_step(
    state: TrainState,
    batch: Any,
    key: jax.Array,
    *,
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    loss_fn: LossFn = next_token_loss,
    accumulate: int = 1,
    observe: Observe | None = None,
) -> tuple[TrainState, Metrics]:
    """One update.

    Args:
        state: before it.
        batch: a `Batch`, or what `loss_fn` takes.
        key: of the dropout masks.
        model: of the contract in `model.py`.
        optimizer: an optax transformation; one that wants them gets `value`, `grad`, `value_fn`.
        loss_fn: `loss_fn(model, params, batch, key)` gives the loss and a dict of more metrics.
        accumulate: micro-batches that the rows are cut into, one after the other, to fit memory.
        observe: `observe(state, grads, updates)`, of the state before the update, gives a dict of
            more metrics, such as `layer_norms`.

    Returns:
        The state after it, and its metrics: "loss", "grad_norm", those of `loss_fn` and `observe`.

    Raises:
        UserError: `loss_fn` returns something else.
    """

    def loss(params: Any, batch: Any, key: jax.Array) -> tuple[jax.Array, Metrics]:
        found: Any = loss_fn(model, optim.join(params, state.frozen), batch, key)
        if not isinstance(found, tuple) or len(found) != 2 or jnp.shape(found[0]) != ():
            raise UserError("loss_fn must return (loss, metrics): a scalar, and a dict of scalars")
        return found[0], scalars(found[1], "loss_fn")

    gradient = accumulated(jax.value_and_grad(loss, has_aux=True), accumulate)
    (value, metrics), grads = gradient(state.params, batch, key)
    updates, opt_state = optax.with_extra_args_support(optimizer).update(
        grads,
        state.opt_state,
        state.params,
        value=value,
        grad=grads,
        value_fn=lambda params: loss(params, batch, key)[0],
    )
    if observe is not None:
        metrics = {**metrics, **observe(state, grads, updates)}
    params = optax.apply_updates(state.params, updates)
    state = state._replace(step=state.step + 1, params=params, opt_state=opt_state)
    return state, {"loss": value, "grad_norm": optax.tree.norm(grads), **metrics}


def layer_norms(state: TrainState, grads: Any, updates: Any, *, every: int) -> Metrics:
    """Norms of each layer's parameters, gradients and updates, for `observe`.

    Args:
        state: before the update.
        grads, updates: trees of the shapes of `state.params`.
        every: steps between norms; nothing is computed in the steps between, whose norms are 0.

    Returns:
        () float32 Euclidean norms: "param_norms/h/0" of block 0 before the update, and alike
        "grad_norms/wte", "update_norms/ln_f", ...; the gradients are those before clipping.
    """
    trees = dict(zip(NORMS, (state.params, grads, updates), strict=True))

    def norms() -> Metrics:
        return {start + layer: x for start in NORMS for layer, x in _norms(trees[start]).items()}

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(norms))
    return jax.lax.cond((state.step + 1) % every == 0, norms, lambda: zeros)


def _norms(tree: Any) -> Metrics:
    """The norm of each top-level module; of blocks stacked on a leading axis, of each block."""
    found: Metrics = {}
    for name, module in tree.items():
        leaves = jax.tree.leaves(module)
        stacked = name == "h" and len({x.shape[:1] for x in leaves} - {()}) == 1
        squares = [
            jnp.square(x.astype(jnp.float32)).sum(tuple(range(stacked, x.ndim))) for x in leaves
        ]
        if squares:
            norm = jnp.sqrt(sum(squares[1:], squares[0]))
            layers = {f"{name}/{i}": norm[i] for i in range(norm.size)} if stacked else {name: norm}
            found |= layers
    return found


def accumulated(gradient: Callable[..., Any], n: int) -> Callable[..., Any]:
    """`gradient(params, batch, key)` as the mean over n micro-batches, one after the other.

    A masked batch's micro-batches are weighted by their masks, so the mean is the whole batch's.
    """
    if n == 1:
        return gradient

    gradient = jax.jit(gradient, inline=True)  # traced once, for its shapes and the loop

    def mean(params: Any, batch: Any, key: jax.Array) -> Any:
        # Row r goes to micro-batch r % n, so that each device keeps its rows.
        cut = lambda x: x.reshape(-1, n, *x.shape[1:]).swapaxes(0, 1)
        micro_batches = jax.tree.map(cut, batch)

        def add(total: Any, micro: tuple[Any, jax.Array]) -> tuple[Any, None]:
            part = gradient(params, micro[0], jax.random.fold_in(key, micro[1]))
            if isinstance(batch, Batch) and batch.mask is not None:
                weight = n * micro[0].mask.sum() / jnp.maximum(batch.mask.sum(), TINY)
                part = jax.tree.map(lambda x: weight * x, part)
            return jax.tree.map(jnp.add, total, part), None

        one = jax.tree.map(lambda x: x[0], micro_batches)
        shapes = jax.eval_shape(gradient, params, one, key)
        zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        total, _ = jax.lax.scan(add, zero, (micro_batches, jnp.arange(n)))
        return jax.tree.map(lambda x: x / n, total)

    return mean


def with_ema(step: Step, decay: float) -> Step:
    """A step that also updates `state.ema`, the exponential moving average of the parameters. The
    decay is warmed up from 0.1, so that the initial parameters do not linger in it."""

    def averaged(state: TrainState, batch: Any, key: jax.Array) -> tuple[TrainState, Metrics]:
        rate = 1 - jnp.minimum(decay, (1 + state.step) / (10 + state.step))
        ema = state.ema
        state, metrics = step(state, batch, key)
        return state._replace(ema=optax.incremental_update(state.params, ema, rate)), metrics

    return averaged


def with_learning_rate(step: Step, schedule: optax.Schedule | None) -> Step:
    """A step that logs the learning rate it used as "lr": the schedule's, or that of
    `optax.inject_hyperparams`; nothing for an optimizer that does not expose it."""

    def logged(state: TrainState, batch: Any, key: jax.Array) -> tuple[TrainState, Metrics]:
        new, metrics = step(state, batch, key)
        rate = None
        if schedule is not None:
            rate = schedule(_find(state.opt_state, optax.ScaleByScheduleState).count)
        else:
            injected = _find(new.opt_state, optax.InjectStatefulHyperparamsState)
            rate = None if injected is None else injected.hyperparams.get("learning_rate")
        return new, metrics if rate is None else {**metrics, "lr": jnp.float32(rate)}

    return logged


def skip_nonfinite(step: Step) -> Step:
    """A step that is a no-op, step count included, if the loss or the gradient is not finite;
    "finite" in its metrics says whether they were."""

    def guarded(state: TrainState, batch: Any, key: jax.Array) -> tuple[TrainState, Metrics]:
        new, metrics = step(state, batch, key)
        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])
        state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, state)
        return state, {**metrics, "finite": finite}

    return guarded


def repeat(
    step: Step, batch_at: Callable[[Any, jax.Array, jax.Array], Any], limit: int
) -> Callable[..., tuple[TrainState, Metrics]]:
    """Many steps in one dispatch: to be jitted once, with its state donated.

    Args:
        step: from `skip_nonfinite`.
        batch_at: `batch_at(data, seed_key, step)`, the batch of a step.
        limit: most steps of a dispatch.

    Returns:
        `steps(state, data, seed_key, first, n)`: makes n <= limit steps from step `first` on; gives
        the new state and the metrics, each (limit,), of which the first n are filled. n is traced,
        so that one compilation serves a whole run. It ends early after a step that is not finite:
        the state is the one before it, and the last metrics filled are its. A state that is at
        another step than `first`, because an earlier call ended early, makes the call a no-op.
    """

    def steps(
        state: TrainState,
        data: Any,
        seed_key: jax.Array,
        first: jax.Array | int,
        n: jax.Array | int,
    ) -> tuple[TrainState, Metrics]:
        @partial(jax.jit, inline=True)  # so that it is traced once, for its shapes and the loop
        def once(state: TrainState, data: Any, seed_key: jax.Array) -> tuple[TrainState, Metrics]:
            key = random_key(seed_key, DROPOUT, state.step)
            return step(state, batch_at(data, seed_key, state.step), key)

        def body(carry: tuple[TrainState, Metrics, jax.Array, jax.Array]) -> Any:
            state, log, i, _ = carry
            state, metrics = once(state, data, seed_key)
            finite = metrics.pop("finite")
            log = jax.tree.map(lambda xs, x: xs.at[i].set(x), log, metrics)
            return state, log, i + 1, finite

        shapes = jax.eval_shape(once, state, data, seed_key)[1]
        del shapes["finite"]
        log = jax.tree.map(lambda x: jnp.zeros((limit, *x.shape), x.dtype), shapes)
        # The loop keeps its temporaries from step to step: 54 -> 37 ms a step on 2 CPU cores.
        start = state, log, jnp.zeros((), jnp.int32), state.step == first
        end = jax.lax.while_loop(lambda carry: (carry[2] < n) & carry[3], body, start)
        return end[0], end[1]

    return steps


def schedule_free_state(opt_state: Any) -> Any:
    """The state of `optax.contrib.schedule_free` in an optimizer's, or None: its evaluation
    parameters are others than the trained ones."""
    return _find(opt_state, optax.contrib.ScheduleFreeState)


def _find(tree: Any, cls: type) -> Any:
    is_cls = lambda x: isinstance(x, cls)
    return next(filter(is_cls, jax.tree.leaves(tree, is_leaf=is_cls)), None)
