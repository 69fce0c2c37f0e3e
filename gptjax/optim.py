"""The optimizer: schedule, decay mask, AdamW and Muon."""

from typing import Any

import jax
import optax
import optax.contrib

from gptjax.config import Config

DECAYED = ("kernel", "embedding", "wpe")  # leaf names; biases and norm scales are left alone

Dims = optax.contrib.MuonDimensionNumbers
# Which axes of a kernel below `h` are its input and its output; the rest are stacked matrices.
# Queries, keys and values count as three, for each does a job of its own.
MATRICES = {
    ("c_attn", 5): Dims(1, (3, 4)),  # (L, C, 3, H, D)
    ("c_q", 4): Dims(1, (2, 3)),  # (L, C, H, D)
    ("c_kv", 5): Dims(1, (3, 4)),  # (L, C, 2, G, D)
    ("c_proj", 4): Dims((1, 2), 3),  # (L, H, D, C)
    ("c_fc", 3): Dims(1, 2),  # (L, C, F)
    ("c_fc", 4): Dims(1, 3),  # (L, C, 2, F)
    ("c_proj", 3): Dims(1, 2),  # (L, F, C)
}


def make_schedule(config: Config, peak: float | None = None) -> optax.Schedule:
    """Learning rate of update number `step` (0, 1, ...): linear warm-up, then as configured.

    The warm-up's first update already moves: its rate is peak / (warmup_steps + 1).

    Args:
        config: of the run.
        peak: None: `optim.learning_rate`.

    Source: cosine, Loshchilov and Hutter 2017; warm-up, stable, decay, Hu et al. 2024 (MiniCPM).
    """
    o = config.optim
    peak = o.learning_rate if peak is None else peak
    after = optax.constant_schedule(peak)
    rest = max(1, config.steps - o.warmup_steps)
    if o.schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, rest, o.final_lr_ratio)
    elif o.schedule == "wsd":
        decay = max(1, min(rest, round(o.decay_share * config.steps)))
        after = optax.linear_schedule(peak, o.final_lr_ratio * peak, decay, rest - decay)
    if not o.warmup_steps:
        return after
    warmup = optax.linear_schedule(peak / (o.warmup_steps + 1), peak, o.warmup_steps)
    return optax.join_schedules([warmup, after], [o.warmup_steps])


def decay_mask(params: Any) -> Any:
    """True for the leaves that decay: by name, for the stacked norm scales have two axes too."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in DECAYED, params)


def matrices(params: Any) -> Any:
    """For each leaf its `Dims`, or None: embeddings, the head, biases and norms are not Muon's."""
    return jax.tree_util.tree_map_with_path(_dims, params)


def _dims(path: Any, leaf: Any) -> Any:
    names = [key.key for key in path]
    if "h" not in names or names[-1] != "kernel":
        return None
    return MATRICES.get((names[-2], leaf.ndim))


def make_optimizer(config: Config) -> optax.GradientTransformation:
    """Clipping by global norm, then AdamW, or Muon beside it.

    Source: Loshchilov and Hutter 2019 (decay is decoupled, and multiplied by the learning rate);
    Jordan et al. 2024 (Muon), five Newton-Schulz steps, scaled by sqrt(max(1, out / in)).
    """
    o = config.optim
    optimizer = optax.adamw(
        make_schedule(config),
        b1=o.beta1,
        b2=o.beta2,
        weight_decay=o.weight_decay,
        mask=decay_mask,
    )
    if o.kind == "muon":
        muon = optax.contrib.muon(
            make_schedule(config, o.muon_learning_rate),
            beta=o.muon_momentum,
            weight_decay=o.muon_weight_decay,
            muon_weight_dimension_numbers=matrices,
        )
        optimizer = optax.partition({"muon": muon, "adamw": optimizer}, _whose)
    if o.grad_clip is None:
        return optimizer
    return optax.chain(optax.clip_by_global_norm(o.grad_clip), optimizer)


def _whose(params: Any) -> Any:
    """Which optimizer each leaf belongs to."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: "adamw" if _dims(path, leaf) is None else "muon", params
    )
