"""The optimizer and what it trains: schedule, weight decay, AdamW, Muon; freezing and LoRA.

`split` takes parameters apart into what is trained and the rest; `join` puts them together into
what a model is applied to. With LoRA a matrix has two more leaves beside it:

    h/attn/c_attn/{kernel, bias, lora_a, lora_b}      kernel + lora_a @ lora_b

Source: Hu et al. 2021 (LoRA). Its factor alpha / r is left out: under Adam, tuning it is roughly
tuning the learning rate (section 4.1).
"""

import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from gptjax.config import OptimConfig
from gptjax.errors import UserError

LORA = ("lora_a", "lora_b")  # leaf names
DECAYED = ("kernel", "embedding", "wpe")  # leaf names; biases and norm scales are left alone

Dims = optax.contrib.MuonDimensionNumbers
# Which axes of a kernel below `h` are its input and its output; the rest are stacked matrices.
# Queries, keys and values are three matrices.
MATRICES = {
    ("c_attn", 5): Dims(1, (3, 4)),  # (L, C, 3, H, D)
    ("c_q", 4): Dims(1, (2, 3)),  # (L, C, H, D)
    ("c_kv", 5): Dims(1, (3, 4)),  # (L, C, 2, G, D)
    ("c_proj", 4): Dims((1, 2), 3),  # (L, H, D, C)
    ("c_fc", 3): Dims(1, 2),  # (L, C, F)
    ("c_fc", 4): Dims(1, 3),  # (L, C, 2, F)
    ("c_proj", 3): Dims(1, 2),  # (L, F, C)
}


def make_schedule(o: OptimConfig, steps: int, peak: float | None = None) -> optax.Schedule:
    """Learning rate of update number 0, 1, ...: linear warm-up, then as configured.

    The first update of the warm-up already moves: its rate is peak / (warmup_steps + 1).

    Args:
        o: the schedule's settings.
        steps: updates in the whole run, which `o.schedule_steps` overrides.
        peak: learning rate after the warm-up; None: `o.learning_rate`.

    Source: cosine, Loshchilov and Hutter 2017; warm-up, stable, decay, Hu et al. 2024 (MiniCPM).
    """
    peak, steps = o.learning_rate if peak is None else peak, o.schedule_steps or steps
    after = optax.constant_schedule(peak)
    rest = max(1, steps - o.warmup_steps)
    if o.schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, rest, o.final_lr_ratio)
    elif o.schedule == "wsd":
        decay = max(1, min(rest, round(o.decay_share * steps)))
        after = optax.linear_schedule(peak, o.final_lr_ratio * peak, decay, rest - decay)
    if not o.warmup_steps:
        return after
    warmup = optax.linear_schedule(peak / (o.warmup_steps + 1), peak, o.warmup_steps)
    return optax.join_schedules([warmup, after], [o.warmup_steps])


def decay_mask(params: Any) -> Any:
    """True for the leaves with weight decay: by name, for stacked norm scales have two axes too."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in DECAYED, params)


def matrices(params: Any) -> Any:
    """`Dims` of each matrix that Muon trains; None for embeddings, the head, biases and norms."""
    return jax.tree_util.tree_map_with_path(_dims, params)


def _dims(path: Any, leaf: Any) -> Any:
    names = [key.key for key in path]
    if "h" not in names or names[-1] != "kernel":
        return None
    return MATRICES.get((names[-2], leaf.ndim))


def make_optimizer(o: OptimConfig, steps: int) -> optax.GradientTransformation:
    """Clipping by global norm, then AdamW, or Muon beside it.

    Args:
        o: the optimizer's settings.
        steps: updates in the whole run.

    Source: Loshchilov and Hutter 2019 (decay is decoupled, and multiplied by the learning rate);
    Jordan et al. 2024 (Muon), five Newton-Schulz steps, scaled by sqrt(max(1, out / in)).
    """
    optimizer = optax.adamw(
        make_schedule(o, steps),
        b1=o.beta1,
        b2=o.beta2,
        weight_decay=o.weight_decay,
        mask=decay_mask,
    )
    if o.kind == "muon":
        muon = optax.contrib.muon(
            make_schedule(o, steps, o.muon_learning_rate),
            beta=o.muon_momentum,
            weight_decay=o.muon_weight_decay,
            muon_weight_dimension_numbers=matrices,
        )
        optimizer = optax.partition({"muon": muon, "adamw": optimizer}, _muon_or_adamw)
    if o.grad_clip is None:
        return optimizer
    return optax.chain(optax.clip_by_global_norm(o.grad_clip), optimizer)


def _muon_or_adamw(params: Any) -> Any:
    """The optimizer of each leaf."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: "adamw" if _dims(path, leaf) is None else "muon", params
    )


# ---------------------------------------------------------------------------------------------
# What is trained: everything, everything but frozen leaves, or low-rank updates (LoRA)


def split(params: Any, config: OptimConfig, key: jax.Array) -> tuple[Any, Any]:
    """What is trained, and the rest.

    Args:
        params: of a model.
        config: `freeze`, `lora_rank` and `lora_targets`.
        key: that low-rank updates are drawn with.

    Returns:
        Two trees of the same structure, each with None in place of the other's leaves; or, if all
        is trained, the parameters and None.

    Raises:
        UserError: `freeze` or `lora_targets` matches no parameter.
    """
    if config.lora_rank is None and config.freeze is None:
        return params, None
    if config.lora_rank is not None:
        params = add_lora(params, config.lora_rank, config.lora_targets, key)
    names = _names(params)
    moved = {name for name in names if name.endswith(LORA)}
    if config.freeze is not None:
        moved = set(names) - _matching(names, config.freeze, "optim.freeze")
    return select(params, moved), select(params, set(names) - moved)


def select(params: Any, names: set[str]) -> Any:
    """The tree with None in place of the leaves whose paths are not among the names."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf if _name(path) in names else None, params
    )


def unite(trained: Any, frozen: Any) -> Any:
    """Undo `split`: one tree with all leaves, low-rank updates beside their matrices."""
    if frozen is None:
        return trained
    return jax.tree.map(
        lambda a, b: b if a is None else a, trained, frozen, is_leaf=lambda x: x is None
    )


def join(trained: Any, frozen: Any) -> Any:
    """What a model is applied to: `unite`, each low-rank update added to its matrix."""
    return trained if frozen is None else merged(unite(trained, frozen))


def has_lora(params: Any) -> bool:
    """Whether there are low-rank updates among the parameters."""
    return any(name.endswith(LORA) for name in _names(params))


def separate(params: Any, trained: Any, frozen: Any) -> tuple[Any, Any]:
    """Split the tree that `unite` makes as these two trees are split."""
    if frozen is None:
        return params, None
    names = set(_names(trained))
    return select(params, names), select(params, set(_names(frozen)))


def add_lora(params: Any, rank: int, targets: str, key: jax.Array) -> Any:
    """The tree with a normal `lora_a` and a zero `lora_b` beside the matrices that match `targets`.

    A kernel (L, C, 3, H, D) gets lora_a (L, C, 3, r) and lora_b (L, 3, r, H, D): queries, keys and
    values are matrices of their own, in each layer.

    Raises:
        UserError: it matches no matrix of a block.
    """
    matching = _matching(_names(params), targets, "optim.lora_targets")
    matrices: list[str] = []

    def add(node: Any, path: tuple[str, ...]) -> Any:
        if not isinstance(node, dict):
            return node
        if path[:1] != ("h",) or "kernel" not in node:
            return {name: add(child, (*path, name)) for name, child in node.items()}
        kernel, name = node["kernel"], "/".join((*path, "kernel"))
        matrices.append(name)
        if name not in matching:
            return node
        whole, a, b = _letters(path[-1], kernel)
        sizes = dict(zip(whole, kernel.shape, strict=True)) | {"r": rank}
        fan_in = math.prod(sizes[axis] for axis in whole if axis not in b)
        key_here = jax.random.fold_in(key, len(matrices))
        normal = jax.random.normal(key_here, [sizes[axis] for axis in a])
        zeros = jnp.zeros([sizes[axis] for axis in b])
        return {**node, "lora_a": normal / math.sqrt(fan_in), "lora_b": zeros}

    added = add(params, ())
    if matching.isdisjoint(matrices):
        raise UserError(
            f"optim.lora_targets={targets!r} matches no matrix of a block; there are "
            f"{', '.join(matrices) or 'none'}"
        )
    return added


def merged(params: Any, name: str = "") -> Any:
    """The tree without LoRA leaves: each low-rank update is added to its matrix."""
    if not isinstance(params, dict):
        return params
    if "lora_a" not in params:
        children = {name: merged(child, name) for name, child in params.items()}
        same = all(children[name] is child for name, child in params.items())
        return params if same else children
    kernel = params["kernel"]
    whole, a, b = _letters(name, kernel)
    update = jnp.einsum(f"{a},{b}->{whole}", params["lora_a"], params["lora_b"])
    return without_lora({**params, "kernel": kernel + update})


def without_lora(params: Any) -> Any:
    """The tree with the matrices as they were before training."""
    if not isinstance(params, dict):
        return params
    return {name: without_lora(child) for name, child in params.items() if name not in LORA}


def _letters(name: str, kernel: Any) -> tuple[str, str, str]:
    """The axes, as einsum's letters, of a layer's kernel, of its lora_a and of its lora_b."""
    dims = MATRICES[name, kernel.ndim]
    as_tuple: Any = lambda axes: axes if isinstance(axes, tuple) else (axes,)
    inner, outer = as_tuple(dims.reduction_axis), as_tuple(dims.output_axis)
    whole = "abcde"[: kernel.ndim]
    out = "".join(whole[i] for i in outer)
    stacked = "".join(whole[i] for i in range(kernel.ndim) if i not in (*inner, *outer))
    return whole, "".join(axis for axis in whole if axis not in out) + "r", f"{stacked}r{out}"


def _matching(names: list[str], pattern: str, field: str) -> set[str]:
    """The paths in which a regular expression of whole names matches."""
    found = {name for name in names if re.search(rf"(^|/)({pattern})(/|$)", name)}
    if not found:
        raise UserError(f"{field}={pattern!r} matches no parameter; there are {', '.join(names)}")
    return found


def _names(params: Any) -> list[str]:
    return [_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
