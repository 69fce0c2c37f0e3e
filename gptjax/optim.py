"""The optimizer: schedule, decay mask, AdamW."""

from typing import Any

import jax
import optax

from gptjax.config import Config

DECAYED = ("kernel", "embedding", "wpe")  # leaf names; biases and norm scales are left alone


def make_schedule(config: Config) -> optax.Schedule:
    """Learning rate of update number `step` (0, 1, ...): linear warm-up, then cosine or constant.

    The warm-up's first update already moves: its rate is peak / (warmup_steps + 1).
    """
    o = config.optim
    after = optax.constant_schedule(o.learning_rate)
    if o.schedule == "cosine":
        decay_steps = max(1, config.steps - o.warmup_steps)
        after = optax.cosine_decay_schedule(o.learning_rate, decay_steps, o.final_lr_ratio)
    if not o.warmup_steps:
        return after
    first = o.learning_rate / (o.warmup_steps + 1)
    warmup = optax.linear_schedule(first, o.learning_rate, o.warmup_steps)
    return optax.join_schedules([warmup, after], [o.warmup_steps])


def decay_mask(params: Any) -> Any:
    """True for the leaves that decay: by name, for the stacked norm scales have two axes too."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in DECAYED, params)


def make_optimizer(config: Config) -> optax.GradientTransformation:
    """Clipping by global norm, then AdamW.

    Source: Loshchilov and Hutter 2019 (decay is decoupled, and multiplied by the learning rate).
    """
    o = config.optim
    adamw = optax.adamw(
        make_schedule(config),
        b1=o.beta1,
        b2=o.beta2,
        weight_decay=o.weight_decay,
        mask=decay_mask,
    )
    if o.grad_clip is None:
        return adamw
    return optax.chain(optax.clip_by_global_norm(o.grad_clip), adamw)
