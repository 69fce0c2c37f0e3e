"""How the next token is drawn from logits: temperature, cuts of the tail, penalties and biases.

`gptjax/generation/` calls it for every token of every stream.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.errors import UserError

ALL = 2**31 - 1  # a top_k that cuts nothing


@functools.partial(
    jax.tree_util.register_dataclass,
    # Traced: another value compiles nothing. None is another program, without that part.
    data_fields=["temperature", "top_k", "top_p", "min_p", "repetition_penalty", "logit_bias"],
    meta_fields=["vocab_size"],
)
@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn, of one stream or, with (B,) arrays as made by `stacked`, of B.

    Args:
        temperature: 0 is greedy.
        top_k: only the k most likely tokens; of equal ones those with the lower ids.
        top_p: of those only the most likely ones that together have this probability (nucleus,
            Holtzman et al. 2020).
        min_p: only tokens at least this fraction as likely as the most likely one (Nguyen et al.
            2024).
        repetition_penalty: divides the positive logits of tokens that the prompt or the new text
            has, and multiplies the negative ones (Keskar et al. 2019).
        logit_bias: added to the logits of these ids; for B streams a (B, V) array.
        vocab_size: ids from here on are padding rows of the embedding table, never drawn.
    """

    temperature: float | jax.Array | np.ndarray = 1.0
    top_k: int | jax.Array | np.ndarray | None = None
    top_p: float | jax.Array | np.ndarray | None = None
    min_p: float | jax.Array | np.ndarray | None = None
    repetition_penalty: float | jax.Array | np.ndarray | None = None
    logit_bias: Mapping[int, float] | jax.Array | np.ndarray | None = None
    vocab_size: int | None = None


# What each setting is where it changes nothing. Those of a group are used together or not at all,
# so that there are few programs to compile.
GROUPS = {"top_k": ALL, "top_p": 1.0, "min_p": 0.0}, {"repetition_penalty": 1.0, "logit_bias": None}


def stacked(rows: Sequence[Sampling], table_size: int) -> Sampling:
    """The settings of B streams as one, with (B,) arrays of those that any of them uses.

    Args:
        rows: of each stream; `vocab_size` is of all.
        table_size: V, rows of the embedding table.
    """
    columns: dict[str, Any] = {
        "temperature": np.array([row.temperature for row in rows], np.float32),
        "vocab_size": rows[0].vocab_size,
    }
    for group in GROUPS:
        given = {name: [getattr(row, name) for row in rows] for name in group}
        if not any(value is not None for values in given.values() for value in values):
            continue
        for name, values in given.items():
            if name == "logit_bias":
                columns[name] = _biases(values, table_size)
            else:
                filled = [group[name] if value is None else value for value in values]
                columns[name] = np.array(filled, np.int32 if name == "top_k" else np.float32)
    return Sampling(**columns)


def _biases(rows: Sequence[Any], table_size: int) -> np.ndarray:
    """(B, V) float32 of the biases of B streams."""
    biases = np.zeros((len(rows), table_size), np.float32)
    for out, values in zip(biases, rows, strict=True):
        if values:
            out[list(values)] = list(values.values())
    return biases


def draw(
    logits: jax.Array, keys: jax.Array, sampling: Sampling, seen: jax.Array | None = None
) -> jax.Array:
    """One token for each row.

    Args:
        logits: (B, V) float32.
        keys: (B,) random keys; rows do not share randomness, so a batch changes no sample.
        sampling: how.
        seen: (B, V) bool, the tokens that the repetition penalty is for.

    Returns:
        (B,) int32.
    """
    column = lambda x: jnp.reshape(jnp.asarray(x), (-1, 1))
    if (bias := sampling.logit_bias) is not None:
        if isinstance(bias, Mapping):
            ids, values = np.array(list(bias), int), np.array(list(bias.values()), np.float32)
            bias = jnp.zeros((1, logits.shape[1])).at[0, ids].set(values)
        logits = logits + bias
    if sampling.repetition_penalty is not None and seen is not None:
        penalty = column(sampling.repetition_penalty)
        penalized = jnp.where(logits > 0, logits / penalty, logits * penalty)
        logits = jnp.where(seen, penalized, logits)
    logits = logits[:, : sampling.vocab_size]
    greedy = logits.argmax(axis=-1).astype(jnp.int32)
    # With 0 as the largest logit no temperature, however small, overflows it.
    logits = logits - logits.max(axis=-1, keepdims=True)
    logits = logits / jnp.maximum(column(sampling.temperature), 1e-30)
    if sampling.top_k is not None or sampling.top_p is not None:
        top_k = column(ALL if sampling.top_k is None else sampling.top_k)
        top_p = column(1.0 if sampling.top_p is None else sampling.top_p)
        logits = jnp.where(most_likely(logits, top_k, top_p), logits, -jnp.inf)
    if sampling.min_p is not None:  # the largest logit is 0, so that its likelihood counts as 1
        logits = jnp.where(jnp.exp(logits) >= column(sampling.min_p), logits, -jnp.inf)
    drawn = jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)
    return jnp.where(jnp.ravel(jnp.asarray(sampling.temperature)) == 0, greedy, drawn)


def most_likely(logits: jax.Array, top_k: jax.Array, top_p: jax.Array) -> jax.Array:
    """(B, V) mask of the tokens that both cuts keep, by rank: of equal logits the first count."""
    ordered = jnp.sort(logits, axis=-1, descending=True)
    inside = jnp.arange(logits.shape[-1])[None] < top_k
    probs = jax.nn.softmax(jnp.where(inside, ordered, -jnp.inf), axis=-1)
    before = jnp.cumsum(probs, axis=-1) - probs  # of more likely tokens
    # At 1 nothing is cut; sums of rounded probabilities may reach it too early.
    inside &= (before < top_p) | (top_p >= 1)
    n = inside.sum(axis=-1, keepdims=True)
    nth = jnp.take_along_axis(ordered, n - 1, axis=-1)
    above, equal = logits > nth, logits == nth
    missing = n - above.sum(axis=-1, keepdims=True)
    return above | (equal & (jnp.cumsum(equal, axis=-1) <= missing))


def check(sampling: Sampling) -> None:
    """Refuse settings of one stream that draw nothing sensible.

    Raises:
        UserError: a value out of its range.
    """
    ranges = {
        "temperature": (lambda x: 0 <= x < float("inf"), "0 or more"),
        "top_k": (lambda x: x >= 1, "1 or more"),
        "top_p": (lambda x: 0 < x <= 1, "more than 0 and at most 1"),
        "min_p": (lambda x: 0 <= x <= 1, "0 to 1"),
        "repetition_penalty": (lambda x: 0 < x < float("inf"), "more than 0, such as 1.1"),
    }
    for field in fields(sampling):
        value = getattr(sampling, field.name)
        if field.name in ranges and value is not None:
            holds, expected = ranges[field.name]
            if not holds(value):
                raise UserError(f"{field.name} {value} is out of range; give {expected}")
    bias = sampling.logit_bias
    for value in bias.values() if isinstance(bias, Mapping) else ():
        if not abs(value) < float("inf"):
            raise UserError(f"logit_bias {value} is out of range; give a number, -100 for never")
