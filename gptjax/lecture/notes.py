"""The lecture's six notes on attention, each demonstrated with numbers: `gptjax notes`.

The functions measure the attention of `lecture/models.py` and return numbers; the command prints
them. Letters as there; x is (B, T, C), drawn from a unit normal.
"""

from collections.abc import Callable, Mapping
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from gptjax.attention import attention, causal_mask
from gptjax.config import ModelConfig
from gptjax.lecture.models import MultiHead

SIZE = ModelConfig(n_head=4, n_embd=32, block_size=8)
B, T, C = 2, SIZE.block_size, SIZE.n_embd
HEAD_SIZE = 16  # as in the lecture's note on scaling

Numbers = Mapping[str, float | np.ndarray]


def communication(seed: int = 1337) -> Numbers:
    """Note 1. Attention weights of one head over 4 positions: rows are queries, columns keys."""
    keys = jax.random.split(jax.random.key(seed))
    q, k = (jax.random.normal(key, (1, 4, 1, HEAD_SIZE)) for key in keys)
    one_hot = jnp.eye(4)[None, :, None, :]  # as values, so that the output is the weights
    weights = np.asarray(attention(q, k, one_hot, causal_mask(4, 4))[0, :, 0])
    return {
        "weights": weights,
        "edges": int(np.count_nonzero(weights)),
        "sum of each row": weights.sum(axis=1),
    }


def sets(seed: int = 1337) -> Numbers:
    """Note 2. Largest difference between attention of a permuted x and permuted attention of x."""
    x, positions = _normal(seed, B, T, C), _normal(seed + 1, 1, T, C)
    order = np.random.default_rng(seed).permutation(T)
    attend = _bind(MultiHead(SIZE, causal=False), seed, x)
    place = lambda x: x + jnp.broadcast_to(positions, x.shape)
    return {
        "without positions": _distance(attend(x[:, order]), attend(x)[:, order]),
        "with positions": _distance(attend(place(x[:, order])), attend(place(x))[:, order]),
    }


def batch(seed: int = 1337) -> Numbers:
    """Note 3. Change of each example's output when the second example changes."""
    x = _normal(seed, B, T, C)
    attend = _bind(MultiHead(SIZE), seed, x)
    before, after = attend(x), attend(x.at[1].add(1.0))
    return {
        "first example": _distance(after[0], before[0]),
        "second example": _distance(after[1], before[1]),
    }


def masks(seed: int = 1337) -> Numbers:
    """Note 4. Change of the first position's output when the last input changes."""
    x = _normal(seed, B, T, C)
    changes = {}
    for name, causal in (("decoder, masked", True), ("encoder, unmasked", False)):
        attend = _bind(MultiHead(SIZE, causal=causal), seed, x)
        changes[name] = _distance(attend(x.at[:, -1].add(1.0))[:, 0], attend(x)[:, 0])
    return changes


def cross(seed: int = 1337) -> Numbers:
    """Note 5. Queries from x, keys and values from a context of another length."""
    x, context = _normal(seed, B, 3, C), _normal(seed + 1, B, 5, C)
    module = MultiHead(SIZE, causal=False)
    params = module.init(jax.random.key(seed), x)
    itself: Any = module.apply(params, x)

    def attend(x: jax.Array, context: jax.Array) -> jax.Array:
        return cast(jax.Array, module.apply(params, x, context))

    before = attend(x, context)
    return {
        "with x as its own context, difference from self-attention": _distance(
            attend(x, x), itself
        ),
        "shape of the queries' source": np.array(x.shape),
        "shape of the keys' and values' source": np.array(context.shape),
        "shape of the output": np.array(before.shape),
        "change when the context changes": _distance(attend(x, 2 * context), before),
    }


def variances(seed: int = 1337) -> Numbers:
    """Note 6. Variance of unit-normal queries and keys of size 16, and of their products."""
    q, k = (_normal(seed + i, 64, T, HEAD_SIZE) for i in range(2))
    scores = jnp.einsum("BTD,BSD->BTS", q, k)
    return {
        "q": float(q.var()),
        "k": float(k.var()),
        "q @ k": float(scores.var()),
        "q @ k / sqrt(16)": float((scores / HEAD_SIZE**0.5).var()),
    }


def saturation() -> Numbers:
    """Note 6. Softmax of the lecture's five scores, and of eight times the scores."""
    scores = jnp.array([0.1, -0.2, 0.3, -0.2, 0.5])
    return {
        "softmax(x)": np.asarray(jax.nn.softmax(scores)),
        "softmax(8 x)": np.asarray(jax.nn.softmax(8 * scores)),
    }


NOTES: tuple[tuple[str, tuple[Callable[..., Numbers], ...]], ...] = (
    (
        "Attention is communication in a directed graph: each node aggregates the nodes that point "
        "to it, with data-dependent weights.",
        (communication,),
    ),
    (
        "Attention has no notion of space, because it acts on a set: permuting the inputs permutes "
        "the outputs, unless position embeddings are added.",
        (sets,),
    ),
    ("The examples of a batch never talk to each other.", (batch,)),
    (
        "The triangular mask makes a decoder; without it, as in an encoder, every position also "
        "attends to the future.",
        (masks,),
    ),
    (
        "In self-attention keys and values come from the same source as the queries, in "
        "cross-attention from another one.",
        (cross,),
    ),
    (
        "Dividing by sqrt(head size) keeps scores at unit variance, which keeps softmax diffuse at "
        "initialisation.",
        (variances, saturation),
    ),
)


def _normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def _bind(module: nn.Module, seed: int, x: jax.Array) -> Callable[[jax.Array], jax.Array]:
    """The module with parameters from the seed, as a function of its input."""
    params = module.init(jax.random.key(seed), x)
    return lambda x: cast(jax.Array, module.apply(params, x))


def _distance(a: jax.Array, b: jax.Array) -> float:
    return float(jnp.abs(a - b).max())


def show(seed: int = 1337) -> None:
    """Print each note and the numbers that demonstrate it."""
    console = Console(highlight=False, soft_wrap=True)
    for number, (line, demonstrations) in enumerate(NOTES, 1):
        console.print(f"[bold]{number}. {line}[/bold]")
        for demonstrate in demonstrations:
            numbers = demonstrate() if demonstrate is saturation else demonstrate(seed)
            for name, value in numbers.items():
                with np.printoptions(formatter={"float_kind": "{:.4f}".format}):
                    text = str(value) if isinstance(value, np.ndarray) else f"{value:.4g}"
                console.print(f"   {name}: " + text.replace("\n", "\n      "), markup=False)
