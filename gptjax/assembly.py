"""From a config to compiled functions on devices: model, state, train steps, evaluation."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from gptjax import optim
from gptjax.attention import Kernel
from gptjax.batches import (
    EVAL,
    Batches,
    OnDisk,
    Prefetched,
    Shuffled,
    Source,
    Windows,
    flat,
    random_key,
    random_starts,
    whole_split_starts,
    windows,
    windows_at,
)
from gptjax.config import Config, ModelConfig
from gptjax.errors import UserError
from gptjax.loss import (
    TINY,
    LossFn,
    MetricsFn,
    evaluate_batch,
    evaluate_windows,
    next_token_loss,
)
from gptjax.model import GPT, Model
from gptjax.optim import make_optimizer, make_schedule
from gptjax.parallel import sharding
from gptjax.parallel.kernels import make_kernel
from gptjax.step import (
    TrainState,
    init_state,
    layer_norms,
    repeat,
    skip_nonfinite,
    train_step,
    with_ema,
    with_learning_rate,
)
from gptjax.text.dataset import Dataset


class Setup(NamedTuple):
    """What a run computes with.

    Attributes:
        config: of the run.
        mesh: its devices.
        model: as it was made.
        applied: the model as it is applied on the mesh.
        layout: shapes, dtypes and shardings of the train state.
        start: `start(params=None)`, the state before the first step.
        steps: see `step.repeat`; jitted, and the state that goes in is gone.
        loss_fn: of the training steps.
        evaluate: `evaluate(params, tokens, starts)`, see `loss.evaluate_windows`; jitted.
        evaluate_batch: `evaluate_batch(params, batch)`, see `loss.evaluate_batch`; jitted.
        seed_key: all randomness of the run follows from it.
    """

    config: Config
    mesh: Mesh
    model: nn.Module
    applied: Any
    layout: TrainState
    start: Callable[..., TrainState]
    steps: Any
    loss_fn: LossFn
    evaluate: Any
    evaluate_batch: Any
    seed_key: Callable[[], jax.Array]


def assemble(
    config: Config,
    vocab_size: int,
    *,
    model: Model | None = None,
    optimizer: optax.GradientTransformation | None = None,
    loss_fn: LossFn | None = None,
    metrics: MetricsFn | None = None,
    batch_at: Callable[..., Any] | None = None,
    devices: Sequence[Any] | None = None,
) -> Setup:
    """Make the functions of a run, on a mesh; nothing is allocated or compiled yet.

    Args:
        config: of the run.
        vocab_size: the tokenizer's.
        model, optimizer, loss_fn, metrics: see `train`.
        batch_at: see `step.repeat`; None: random windows of tokens.
        devices: to compile for, which may be absent; None: this machine's.

    Raises:
        UserError: sizes that the mesh does not divide, or a kernel that its devices do not have.
    """
    o, size, T = config.optim, config.batch_size, config.model.block_size
    mesh = sharding.make_mesh(config.mesh, config.micro_batch_size, devices)
    everywhere = sharding.replicated(mesh)
    made = make_model(config.model, vocab_size, model, make_kernel(config.model, mesh))
    applied: Any = sharding.on_mesh(made, mesh)
    schedule = make_schedule(o, config.steps) if optimizer is None else None
    optimizer = optimizer or make_optimizer(o, config.steps)
    loss_fn = loss_fn or partial(next_token_loss, chunk=config.loss_chunk)
    batch_at = batch_at or partial(windows_at, batch_size=size, block_size=T)
    rows = sharding.batch_sharding(mesh)

    def pin(batch: Any) -> Any:
        return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, rows), batch)

    # The state
    split = lambda params, key: optim.split(params, o, key)
    init = partial(
        init_state,
        made,
        optimizer,
        split=split if o.freeze or o.lora_rank else None,
        ema=o.ema is not None,
    )
    init = jax.jit(init, inline=True)  # traced once, for its shapes and the start
    layout = sharding.layout(mesh, jax.eval_shape(init, jax.random.key(config.seed)))
    placed = jax.tree.map(lambda x: x.sharding, layout)
    make_key = jax.jit(jax.random.key, static_argnums=0, out_shardings=everywhere)

    def start(params: Any = None) -> TrainState:
        if params is not None:
            params = jax.device_put(params, sharding.shardings(mesh, params))
            _check_shapes(params, layout, config)
        return jax.jit(init, out_shardings=placed)(make_key(config.seed), params=params)

    # The step
    observe = partial(layer_norms, every=config.norms_every) if config.norms_every else None
    step = partial(train_step, model=applied, optimizer=optimizer, loss_fn=loss_fn)
    step = partial(step, accumulate=o.accumulate, observe=observe)
    step = with_learning_rate(step, schedule)
    if o.ema is not None:
        step = with_ema(step, o.ema)
    batch_on_mesh = lambda data, key, step: pin(batch_at(data, key, step))
    steps = repeat(skip_nonfinite(step), batch_on_mesh, config.steps_per_dispatch)

    # The evaluation
    options = {"chunk": config.loss_chunk, "metrics": metrics}
    evaluate = partial(evaluate_windows, applied, block_size=T, pin=pin, **options)
    return Setup(
        config,
        mesh,
        made,
        applied,
        layout,
        start,
        jax.jit(steps, donate_argnums=0, out_shardings=(placed, everywhere)),
        loss_fn,
        jax.jit(evaluate),
        jax.jit(partial(evaluate_batch, applied, **options)),
        lambda: make_key(config.seed),
    )


def make_model(
    config: ModelConfig,
    vocab_size: int,
    model: Model | None = None,
    kernel: Kernel | None = None,
) -> nn.Module:
    """The module of a run.

    Args:
        config: the network.
        vocab_size: the tokenizer's; `config.vocab_size` may be larger (padding).
        model: your own module, or a function (such as a module's class) that makes one of a
            ModelConfig and a vocabulary size; None: `GPT`.
        kernel: of attention, for a `GPT`.

    Raises:
        UserError: the table has fewer rows than the tokenizer has tokens, or a module was made of
            another config.
    """
    rows = config.vocab_size or vocab_size
    if rows < vocab_size:
        raise UserError(
            f"model.vocab_size={rows} is less than the tokenizer's {vocab_size} tokens; "
            f"leave it out, or give {vocab_size} or more"
        )
    if model is None:
        return GPT(config, rows, kernel=kernel)
    made = model if isinstance(model, nn.Module) else model(config, rows)
    if isinstance(made, GPT) and made.config != config:
        raise UserError(
            "the model was made of another ModelConfig than the run's config.model; make it of "
            "that one"
        )
    return made.clone(kernel=kernel) if isinstance(made, GPT) and made.kernel is None else made


def _check_shapes(params: Any, layout: TrainState, config: Config) -> None:
    shapes = lambda tree: jax.tree.map(lambda leaf: leaf.shape, tree)
    if shapes(params) != shapes(optim.without_lora(optim.unite(layout.params, layout.frozen))):
        raise UserError(
            f"the weights of init={config.init} have other shapes than this model; leave model= "
            f"out, or start from weights of its kind"
        )


def trace(setup: Setup, n_tokens: int) -> jax.stages.Traced:
    """`setup.steps` on shapes alone, to be lowered and compiled: nothing is allocated.

    Args:
        setup: with random windows of tokens.
        n_tokens: length of the training split.
    """
    rest = jax.eval_shape(
        lambda: (jnp.zeros(n_tokens, jnp.uint16), jax.random.key(0), jnp.int32(0), jnp.int32(0))
    )
    return setup.steps.trace(setup.layout, *sharding.layout(setup.mesh, rest))


def make_source(config: Config, dataset: Dataset, mesh: Mesh, seed_key: jax.Array) -> Source:
    """Batches of a dataset: from tokens on the device if they fit there, else streamed."""
    size, T = config.batch_size, config.model.block_size
    if not streams(config, dataset):
        return Windows(sharding.put(mesh, dataset.train), seed_key, size, T)
    if config.data.order == "shuffled":
        return prefetched(config, Shuffled(dataset.parts, config.seed, size, T), mesh)
    return prefetched(config, OnDisk(dataset.train, config.seed, size, T), mesh)


def prefetched(config: Config, batches: Batches, mesh: Mesh) -> Source:
    """Batches made on the host, for the devices of a mesh."""
    rows = P(None, *sharding.BATCH)
    return Prefetched(batches, config.steps_per_dispatch, partial(sharding.put, mesh, spec=rows))


def streams(config: Config, dataset: Dataset) -> bool:
    """Whether batches of a dataset are made on the host."""
    return config.data.order == "shuffled" or dataset.n_train > config.data.resident_tokens


# ---------------------------------------------------------------------------------------------
# Evaluation


def resident(setup: Setup, tokens: np.ndarray) -> Any:
    """Tokens to evaluate on: on the devices, if they are not too many."""
    fits = len(tokens) <= setup.config.data.resident_tokens
    return sharding.put(setup.mesh, tokens) if fits else tokens


def evaluate_split(setup: Setup, params: Any, tokens: Any) -> dict[str, float]:
    """Means over a whole split of (N,) tokens; on the host, a part of it at a time."""
    config = setup.config
    B, T = config.batch_size, config.model.block_size
    if isinstance(tokens, jax.Array):
        return evaluate_starts(setup, params, tokens, whole_split_starts(len(tokens), B, T))
    size = B * T * max(1, config.data.resident_tokens // (B * T))
    slabs = [tokens[i : i + size + 1] for i in range(0, len(tokens) - 1, size)]
    found = [evaluate_split(setup, params, sharding.put(setup.mesh, slab)) for slab in slabs]
    weights = [len(slab) - 1 for slab in slabs]
    return {
        name: float(np.average([means[name] for means in found], weights=weights))
        for name in found[0]
    }


def evaluate_random(setup: Setup, params: Any, tokens: Any, step: int, n: int) -> dict[str, float]:
    """Means over n batches of random windows of (N,) tokens, drawn from the seed and the step."""
    config = setup.config
    B, T = config.batch_size, config.model.block_size
    key = random_key(setup.seed_key(), EVAL, step)
    starts = random_starts(key, len(tokens), (n, B), T)
    if not isinstance(tokens, jax.Array):
        tokens, starts = flat(windows(tokens, np.asarray(starts), T))
    return evaluate_starts(setup, params, tokens, starts)


def evaluate_starts(setup: Setup, params: Any, tokens: Any, starts: Any) -> dict[str, float]:
    """Means over the windows of (N,) tokens that begin at the (n, B) starts."""
    starts = starts.reshape(-1, setup.config.micro_batch_size)
    tokens, starts = sharding.put(setup.mesh, (tokens, starts))
    return jax.tree.map(float, jax.device_get(setup.evaluate(params, tokens, starts)))


def evaluate_batches(setup: Setup, params: Any, batches: Sequence[Any]) -> dict[str, float]:
    """Means over batches made on the host, weighted by their targets."""
    sums: dict[str, float] = {}
    total = 0.0
    for batch in batches:
        placed = sharding.put(setup.mesh, batch, sharding.BATCH)
        found, weight = jax.device_get(setup.evaluate_batch(params, placed))
        total += float(weight)
        sums = {name: sums.get(name, 0.0) + float(x) for name, x in found.items()}
    return {name: x / max(total, TINY) for name, x in sums.items()}


def evaluation(
    setup: Setup, dataset: Dataset, source: Source
) -> Callable[[Any, int, bool], dict[str, float]]:
    """The function that evaluates parameters on a dataset after a step, by the names in the log."""
    config = setup.config
    n = config.eval_batches
    val = resident(setup, dataset.val)
    train = dataset.train if config.data.order == "random" else None
    if not streams(config, dataset):
        train = source.data(0)  # the same tokens, on the devices already

    def evaluate(params: Any, step: int, last: bool) -> dict[str, float]:
        found: dict[str, float] = {}
        if n is not None:
            if train is None:
                coming = [source.batch(step + i) for i in range(n)]
                sampled = evaluate_batches(setup, params, coming)
            else:
                sampled = evaluate_random(setup, params, train, step, n)
            found |= {f"train_sampled_{name}": x for name, x in sampled.items()}
            sampled = evaluate_random(setup, params, val, step, n)
            found |= {f"val_sampled_{name}": x for name, x in sampled.items()}
        if n is None or last:
            whole = evaluate_split(setup, params, val)
            found |= {f"val_{name}": x for name, x in whole.items()}
            found["val_bits_per_byte"] = dataset.bits_per_byte(whole["loss"])
        return found

    return evaluate


def own_evaluation(setup: Setup, batches: Batches) -> Callable[[Any, int, bool], dict[str, float]]:
    """As `evaluation`, on the validation batches that the caller's source has, if any."""
    validation = getattr(batches, "validation", ())

    def evaluate(params: Any, step: int, last: bool) -> dict[str, float]:
        found = evaluate_batches(setup, params, validation)
        return {f"val_{name}": x for name, x in found.items()}

    return evaluate
