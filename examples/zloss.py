"""A loss of your own, with metrics: cross-entropy plus a z-loss, which keeps log Z near 0.

    python train.py --config examples/zloss.py

After 300 steps on Tiny Shakespeare, the mean |log Z| on the validation split is 0.63, with a
validation loss of 2.248; without the z-loss (`COEFFICIENT = 0.0`) they are 6.16 and 2.232.

Source: Chowdhery et al. 2022 (PaLM), section 5, where the coefficient is 1e-4; a short
run takes a larger one.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

import gptjax

COEFFICIENT = 1e-2


def loss_fn(
    model: nn.Module, params: Any, batch: gptjax.Batch, key: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The loss to minimise, and what to log of every step beside it."""
    logits: Any = model.apply({"params": params}, batch.inputs, train=True, rngs={"dropout": key})[
        0
    ]
    cross_entropy = gptjax.cross_entropy(logits, batch.targets).mean()
    z_loss = jnp.square(jax.nn.logsumexp(logits, axis=-1)).mean()
    return cross_entropy + COEFFICIENT * z_loss, {"ce": cross_entropy, "z_loss": z_loss}


def metrics(model: nn.Module, params: Any, batch: gptjax.Batch) -> dict[str, jax.Array]:
    """What to log of every evaluation, as "val_log_z"."""
    logits: Any = model.apply({"params": params}, batch.inputs)[0]
    return {"log_z": jnp.abs(jax.nn.logsumexp(logits, axis=-1)).mean()}


config = gptjax.Config(
    steps=300,
    batch_size=16,
    eval_every=300,
    save_every=300,
    optim=gptjax.OptimConfig(learning_rate=6e-3, warmup_steps=30),
)
