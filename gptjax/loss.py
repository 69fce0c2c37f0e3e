"""What training minimises and what evaluation measures, as pure functions."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from gptjax.batches import Batch, cut
from gptjax.errors import UserError

TINY = 1e-9  # a batch whose mask is 0 everywhere has a loss of 0
Metrics = dict[str, jax.Array]
LossFn = Callable[[nn.Module, Any, Any, jax.Array], tuple[jax.Array, Metrics]]
MetricsFn = Callable[[nn.Module, Any, Any], Metrics]
LOGGED = ("step", "seconds", "skipped", "loss", "grad_norm", "lr", "finite")  # by every run


def next_token_loss(
    model: nn.Module, params: Any, batch: Batch, key: jax.Array, chunk: int | None = None
) -> tuple[jax.Array, Metrics]:
    """The mean cross-entropy of a batch's targets, with dropout.

    Any function of this form is a loss: `train_step(..., loss_fn=...)`.

    Args:
        model: of the contract in `model.py`.
        params: its parameters.
        batch: rows of tokens; a mask weighs the positions.
        key: of the dropout masks.
        chunk: positions whose logits exist at once; None: all.

    Returns:
        () float32, nats per token, and more metrics to log, by name (here none).
    """
    losses = token_losses(model, params, batch, chunk, train=True, rngs={"dropout": key})
    if batch.mask is None:
        return losses.mean(), {}
    return (losses * batch.mask).sum() / jnp.maximum(batch.mask.sum(), TINY), {}


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Next-token loss of each position.

    Args:
        logits: (B, T, V), any float dtype; computed in float32.
        targets: (B, T) int32 ids in [0, V).

    Returns:
        (B, T) float32, nats per token; ln(V) for uniform predictions.
    """
    z = logits.astype(jnp.float32)
    z = z - jax.lax.stop_gradient(z.max(axis=-1, keepdims=True))
    # The target's logit by a sum over the vocabulary, for the gradient of a gather is a scatter:
    # on a GPU that is much memory traffic, and this is fused with the sum of the exponentials.
    is_target = jax.nn.one_hot(targets, z.shape[-1], dtype=bool)
    return jnp.log(jnp.exp(z).sum(axis=-1)) - z.sum(axis=-1, where=is_target)


def chunked_cross_entropy(
    head: Callable[[jax.Array], jax.Array], x: jax.Array, targets: jax.Array, chunk: int
) -> jax.Array:
    """`cross_entropy(head(x), targets)` without all logits at once: the head runs on `chunk`
    positions of each row at a time, and once more in the backward pass.

    Args:
        head: (B, chunk, C) features to (B, chunk, V) logits.
        x: (B, T, C) features; chunk divides T.
        targets: (B, T) int32 ids in [0, V).

    Returns:
        (B, T) float32, nats per token.
    """
    B, T = targets.shape

    def parts(x: jax.Array) -> jax.Array:
        return x.reshape(B, T // chunk, chunk, *x.shape[2:]).swapaxes(0, 1)

    part_losses = jax.checkpoint(lambda part: cross_entropy(head(part[0]), part[1]))
    losses = jax.lax.map(part_losses, (parts(x), parts(targets)))
    return losses.swapaxes(0, 1).reshape(B, T)


def token_losses(
    model: nn.Module, params: Any, batch: Batch, chunk: int | None = None, **options: Any
) -> jax.Array:
    """The loss of each target of a batch.

    Args:
        model: of the contract in `model.py`; with a chunk, one that has `features` and `head`.
        params: its parameters.
        batch: rows of tokens.
        chunk: see `chunked_cross_entropy`; None: all positions at once.
        options: of `model.apply`.

    Returns:
        (B, T) float32, nats per token.

    Raises:
        UserError: a chunk for a model of your own that has no `features`.
    """
    variables = {"params": params}
    if chunk is None:
        logits, _ = model.apply(variables, batch.inputs, **options)
        return cross_entropy(logits, batch.targets)
    if not hasattr(model, "features"):
        raise UserError(
            f"loss_chunk={chunk} needs a model with the methods features and head, as GPT has; "
            f"leave loss_chunk out"
        )
    x, _ = model.apply(variables, batch.inputs, method="features", **options)

    def head(x: jax.Array) -> Any:
        return model.apply(variables, x, method="head")

    return chunked_cross_entropy(head, x, batch.targets, chunk)


def scalars(metrics: Any, source: str) -> Metrics:
    """Metrics of the caller's, float32, if they can be logged beside a run's own.

    Args:
        metrics: what the function returned.
        source: the function's name, for messages.

    Raises:
        UserError: not a dict of scalars, or a name that every run logs itself.
    """
    if not isinstance(metrics, dict):
        raise UserError(
            f"{source} returned a {type(metrics).__name__} of metrics; return a dict of scalars"
        )
    for name, x in metrics.items():
        if name in LOGGED:
            raise UserError(f"{source} returned a metric {name}, which gptjax logs; rename it")
        if jnp.shape(x) != ():
            raise UserError(
                f"{source} returned a metric {name} of shape {jnp.shape(x)}; return a scalar, such "
                f"as its mean"
            )
    return {name: jnp.asarray(x, jnp.float32) for name, x in metrics.items()}


# ---------------------------------------------------------------------------------------------
# Evaluation: no dropout, no gradient, no random draw of its own


def evaluate_batch(
    model: nn.Module,
    params: Any,
    batch: Any,
    chunk: int | None = None,
    metrics: MetricsFn | None = None,
) -> tuple[Metrics, jax.Array]:
    """Sums over a batch, to be added to other batches' and divided by their weight.

    Args:
        model: of the contract in `model.py`.
        params: its parameters.
        batch: a `Batch`, or what `metrics` takes.
        chunk: see `next_token_loss`.
        metrics: `metrics(model, params, batch)`, means over the batch by name; None: none.

    Returns:
        "loss" (of a `Batch`; nats) and the metrics, each times the weight, and the weight: the
        number of targets, or the sum of their mask.
    """
    sums: Metrics = {}
    weight = jnp.float32(1)
    if isinstance(batch, Batch):
        losses = token_losses(model, params, batch, chunk)
        mask = jnp.ones(losses.shape, bool) if batch.mask is None else batch.mask
        weight = mask.sum()
        sums["loss"] = jnp.where(mask > 0, losses * mask, 0.0).sum()
    if metrics is not None:
        means = scalars(metrics(model, params, batch), "metrics")
        # The mean over a batch without a target may be nan, and counts for nothing.
        sums |= {name: jnp.where(weight > 0, x * weight, 0.0) for name, x in means.items()}
    return sums, weight


def evaluate_windows(
    model: nn.Module,
    params: Any,
    tokens: jax.Array,
    starts: jax.Array,
    block_size: int,
    pin: Callable[[Any], Any] = lambda batch: batch,
    **options: Any,
) -> Metrics:
    """Means over windows of a text, batch after batch.

    Args:
        model: of the contract in `model.py`.
        params: its parameters.
        tokens: (N,) ids.
        starts: (n, B) first positions of windows; targets past the end of the tokens do not count.
        block_size: T.
        pin: constrains the sharding of a batch; by default nothing does.
        options: of `evaluate_batch`.

    Returns:
        "loss", nats per token, and the metrics: () float32.
    """
    n_tokens = tokens.shape[0]
    padded = jnp.pad(tokens, (0, block_size + 1))  # so that a window may run over the end

    def one(row: jax.Array) -> tuple[Metrics, jax.Array]:
        inside = row[:, None] + jnp.arange(block_size)[None, :] < n_tokens - 1
        batch = Batch.of_windows(cut(padded, row, block_size + 1))._replace(mask=inside)
        return evaluate_batch(model, params, pin(batch), **options)

    sums, weights = jax.lax.map(one, starts)
    return {name: x.sum() / weights.sum() for name, x in sums.items()}
