"""What of a model is trained: all of it, all but frozen leaves, or low-rank updates alone (LoRA).

`split` takes parameters apart into what the optimizer moves and the rest; `join` puts them together
into what a model is applied to. With LoRA a matrix has two more leaves beside it:

    h/attn/c_attn/{kernel, bias, lora_a, lora_b}      kernel + lora_a @ lora_b

Source: Hu et al. 2021 (LoRA). Its factor alpha / r is left out: under Adam, tuning it is roughly
tuning the learning rate (section 4.1).
"""

import math
import re
from typing import Any

import jax
import jax.numpy as jnp

from gptjax.config import OptimConfig
from gptjax.errors import UserError
from gptjax.optim import MATRICES

LORA = ("lora_a", "lora_b")  # names of leaves


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
        UserError: `freeze` or `lora_targets` matches no parameter, or nothing is left to train.
    """
    if config.lora_rank is None and config.freeze is None:
        return params, None
    if config.lora_rank is not None:
        params = add_lora(params, config.lora_rank, config.lora_targets, key)
    names = _names(params)
    moved = {name for name in names if name.endswith(LORA)}
    if config.freeze is not None:
        moved = set(names) - _matching(names, config.freeze, "optim.freeze")
        if not moved:
            raise UserError(
                f"optim.freeze={config.freeze!r} leaves nothing to train; give a narrower one, or "
                f"start a new run from this one with --init"
            )
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


def separate(params: Any, trained: Any, frozen: Any) -> tuple[Any, Any]:
    """Split the tree that `unite` makes as these two trees are split."""
    if frozen is None:
        return params, None
    names = set(_names(trained))
    return select(params, names), select(params, set(_names(frozen)))


def add_lora(params: Any, rank: int, targets: str, key: jax.Array) -> Any:
    """The tree with a normal `lora_a` and a zero `lora_b` beside each matrix that `targets` matches.

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
