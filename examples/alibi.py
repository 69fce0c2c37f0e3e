"""An attention of your own: ALiBi, a penalty on distance in place of position embeddings.

    python train.py --config examples/alibi.py

Validation loss on Tiny Shakespeare after 300 steps: 2.120, and 2.232 with learned positions
(`position="learned"` and the model left out). Training, evaluation and cached decoding all use it.

Source: Press et al. 2022.
"""

from functools import partial

import jax
import jax.numpy as jnp

import gptjax


class ALiBi(gptjax.CausalSelfAttention):
    """Scores fall linearly with the distance, at a rate of its own in each head."""

    def attend(self, q: jax.Array, k: jax.Array, v: jax.Array, start: jax.Array | int) -> jax.Array:
        T, S, H = q.shape[1], k.shape[1], q.shape[2]
        slopes = 2.0 ** (-8.0 * jnp.arange(1, H + 1) / H)
        distance = start + (jnp.arange(T)[:, None] - jnp.arange(S)[None])[None, None]
        bias = -slopes[None, :, None, None] * distance  # (1 or B, H, T, S)
        return self.weigh(q, k, v, start, bias)


config = gptjax.Config(
    steps=300,
    batch_size=16,
    eval_every=300,
    save_every=300,
    model=gptjax.ModelConfig(position="none"),
    optim=gptjax.OptimConfig(learning_rate=6e-3, warmup_steps=30),
)
model = partial(gptjax.GPT, attention=ALiBi)
