"""Convert weights from and to transformers' names and layouts: one table for GPT-2, one for Llama
and the families that share its names, one for Gemma.

Axis letters as in `model.py`; P is block_size. Needs neither torch nor transformers.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from gptjax.config import ModelConfig
from gptjax.errors import UserError
from gptjax.generation.chat import ChatFormat
from gptjax.interop.gemma import GemmaConfig
from gptjax.interop.hf_config import family, kv_heads
from gptjax.layers import rotary_rates
from gptjax.text.tokenizers import Tokenizer


class Leaf(NamedTuple):
    """A leaf of our parameter tree and the corresponding tensors of transformers."""

    path: str  # in our tree; leaves below h have a leading layer axis
    ours: str  # axes of the leaf, without the layer axis
    theirs: str  # axes of the tensor; those in brackets are flattened into one
    names: tuple[str, ...]  # {} is the layer; several tensors are stacked along the axis 3 or 2
    more: float = 0.0  # by which ours is larger


# GPT-2's Conv1D stores a matrix as (in, out), as we do.
_H = "transformer.h.{}"
GPT2 = (
    Leaf("wte/embedding", "V C", "V C", ("transformer.wte.weight",)),
    Leaf("wpe", "P C", "P C", ("transformer.wpe.weight",)),
    Leaf("h/ln_1/scale", "C", "C", (f"{_H}.ln_1.weight",)),
    Leaf("h/ln_1/bias", "C", "C", (f"{_H}.ln_1.bias",)),
    Leaf("h/attn/c_attn/kernel", "C 3 H D", "C (3 H D)", (f"{_H}.attn.c_attn.weight",)),
    Leaf("h/attn/c_attn/bias", "3 H D", "(3 H D)", (f"{_H}.attn.c_attn.bias",)),
    Leaf("h/attn/c_proj/kernel", "H D C", "(H D) C", (f"{_H}.attn.c_proj.weight",)),
    Leaf("h/attn/c_proj/bias", "C", "C", (f"{_H}.attn.c_proj.bias",)),
    Leaf("h/ln_2/scale", "C", "C", (f"{_H}.ln_2.weight",)),
    Leaf("h/ln_2/bias", "C", "C", (f"{_H}.ln_2.bias",)),
    Leaf("h/mlp/c_fc/kernel", "C F", "C F", (f"{_H}.mlp.c_fc.weight",)),
    Leaf("h/mlp/c_fc/bias", "F", "F", (f"{_H}.mlp.c_fc.bias",)),
    Leaf("h/mlp/c_proj/kernel", "F C", "F C", (f"{_H}.mlp.c_proj.weight",)),
    Leaf("h/mlp/c_proj/bias", "C", "C", (f"{_H}.mlp.c_proj.bias",)),
    Leaf("ln_f/scale", "C", "C", ("transformer.ln_f.weight",)),
    Leaf("ln_f/bias", "C", "C", ("transformer.ln_f.bias",)),
    Leaf("lm_head/kernel", "C V", "V C", ("lm_head.weight",)),
)
# nn.Linear stores it as (out, in).
_H = "model.layers.{}"
_Q, _K, _V = (f"{_H}.self_attn.{letter}_proj.weight" for letter in "qkv")
_BQ, _BK, _BV = (f"{_H}.self_attn.{letter}_proj.bias" for letter in "qkv")
_GATE, _UP = f"{_H}.mlp.gate_proj.weight", f"{_H}.mlp.up_proj.weight"
LLAMA = (
    Leaf("wte/embedding", "V C", "V C", ("model.embed_tokens.weight",)),
    Leaf("h/ln_1/scale", "C", "C", (f"{_H}.input_layernorm.weight",)),
    Leaf("h/attn/c_attn/kernel", "C 3 H D", "(H D) C", (_Q, _K, _V)),
    Leaf("h/attn/c_q/kernel", "C H D", "(H D) C", (_Q,)),
    Leaf("h/attn/c_kv/kernel", "C 2 G D", "(G D) C", (_K, _V)),
    Leaf("h/attn/c_attn/bias", "3 H D", "(H D)", (_BQ, _BK, _BV)),
    Leaf("h/attn/c_q/bias", "H D", "(H D)", (_BQ,)),
    Leaf("h/attn/c_kv/bias", "2 G D", "(G D)", (_BK, _BV)),
    Leaf("h/attn/q_norm/scale", "D", "D", (f"{_H}.self_attn.q_norm.weight",)),
    Leaf("h/attn/k_norm/scale", "D", "D", (f"{_H}.self_attn.k_norm.weight",)),
    Leaf("h/attn/c_proj/kernel", "H D C", "C (H D)", (f"{_H}.self_attn.o_proj.weight",)),
    Leaf("h/ln_2/scale", "C", "C", (f"{_H}.post_attention_layernorm.weight",)),
    Leaf("h/mlp/c_fc/kernel", "C 2 F", "F C", (_GATE, _UP)),
    Leaf("h/mlp/c_proj/kernel", "F C", "C F", (f"{_H}.mlp.down_proj.weight",)),
    Leaf("ln_f/scale", "C", "C", ("model.norm.weight",)),
    Leaf("lm_head/kernel", "C V", "V C", ("lm_head.weight",)),
)
_NORMS = {
    "h/ln_1": f"{_H}.input_layernorm",
    "h/ln_1_post": f"{_H}.post_attention_layernorm",
    "h/ln_2": f"{_H}.pre_feedforward_layernorm",
    "h/ln_2_post": f"{_H}.post_feedforward_layernorm",
    "h/attn/q_norm": f"{_H}.self_attn.q_norm",
    "h/attn/k_norm": f"{_H}.self_attn.k_norm",
    "ln_f": "model.norm",
}
GEMMA = (  # whose norms multiply by 1 + their weight
    *(leaf for leaf in LLAMA if not leaf.path.endswith("/scale")),
    *(
        Leaf(f"{path}/scale", axis, axis, (f"{name}.weight",), 1.0)
        for path, name in _NORMS.items()
        for axis in ("D" if "attn" in path else "C",)
    ),
)
# Tensors that some files hold beside the weights; a model has them in another form.
CONSTANTS = re.compile(
    r"transformer\.h\.\d+\.attn\.(bias|masked_bias)"
    r"|model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq"
    r"|lm_head\.weight"
)
WEIGHTS_PER_BYTE = 8  # no format takes less than a bit for a weight


class Source(NamedTuple):
    """A model in transformers' names and layout, still unread; see `to_params`.

    Attributes:
        config: our config, with vocab_size.
        shapes: shape of each tensor, by its name in the tables.
        read: reads one tensor, in any dtype.
        size: of the file or files that hold the tensors, in bytes.
        tokenizer: None: the format has none.
        chat: chat template and stop tokens; None: there are none.
        gemma: what it has beside its config, if it is a Gemma.
    """

    config: ModelConfig
    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], np.ndarray]
    size: int
    tokenizer: Tokenizer | None
    chat: ChatFormat | None = None
    gemma: GemmaConfig | None = None


def to_params(source: Source) -> dict[str, Any]:
    """Convert to our parameters, reading each tensor once.

    Returns:
        The parameter tree of `model.py`, float32.

    Raises:
        UserError: names the first tensor that is missing, unexpected, misshapen, not finite, or
            larger than its file can hold.
    """
    config, params = source.config, {}
    _check(source)
    for leaf in _table(config, source.gemma):
        axes, order = _axes(leaf, config)

        def read(name: str, leaf: Leaf = leaf, axes: Any = axes, order: Any = order) -> np.ndarray:
            flat = [size for group in axes for size in group]
            x = np.asarray(source.read(name), np.float32)
            if not np.isfinite(x).all():
                raise UserError(f"the tensor {name} has non-finite values")
            x = x + np.float32(leaf.more) if leaf.more else x
            return x.reshape(flat).transpose(order)

        layers = []
        for names in _names(leaf, config):
            parts = [read(name) for name in names]
            layers.append(parts[0] if len(parts) == 1 else np.stack(parts, _stack_axis(leaf)))
        *above, last = leaf.path.split("/")
        node = params
        for key in above:
            node = node.setdefault(key, {})
        node[last] = np.stack(layers) if _stacked(leaf) else np.ascontiguousarray(layers[0])
    return params


def to_tensors(
    params: Mapping[str, Any], config: ModelConfig, gemma: GemmaConfig | None = None
) -> dict[str, np.ndarray]:
    """Convert our parameters to transformers' tensors, by name: the inverse of `to_params`.

    Args:
        params: the parameter tree of `model.py`; missing biases are exported to GPT-2 as zeros.
        config: the model's, with vocab_size.
        gemma: what it has beside that, if it is a Gemma.

    Returns:
        float32 arrays that share no memory.
    """
    table, tensors = _table(config, gemma, whole=True), {}
    wanted = dict(_wanted(table, config))
    for leaf in table:
        _, order = _axes(leaf, config)
        value: Any = params
        for key in leaf.path.split("/"):
            value = None if value is None else value.get(key)
        for layer, names in enumerate(_names(leaf, config)):
            for place, name in enumerate(names):
                if value is None:
                    tensors[name] = np.zeros(wanted[name], np.float32)
                    continue
                x: Any = np.asarray(value[layer] if _stacked(leaf) else value, np.float32)
                x = x if len(names) == 1 else x.take(place, _stack_axis(leaf))
                x = x - np.float32(leaf.more) if leaf.more else x
                x = x.transpose(np.argsort(order)).reshape(wanted[name])
                tensors[name] = np.array(x, order="C")
    return tensors


def add(tensors: dict[str, Any], name: str, tensor: Any) -> None:
    """Add a file's tensor under its name in the tables.

    Args:
        tensors: what the file held so far.
        name: in the file; the original GPT-2 files omit `transformer.`.
        tensor: of any type.

    Raises:
        UserError: the file has another tensor of this name, so that one would be left unread.
    """
    bare = name.split(".")[0] in ("wte", "wpe", "h", "ln_f")
    name = f"transformer.{name}" if bare else name
    if name in tensors:
        raise UserError(
            f"there are two tensors {name}, and only one can be used; delete one of them"
        )
    tensors[name] = tensor


def _check(source: Source) -> None:
    """Check names, shapes and sizes before anything is read or allocated.

    The config may claim any number of layers: a few tensors more than the file holds are enough
    to find one that is missing, so time and memory are bounded by the file.
    """
    found = source.shapes
    table = _table(source.config, source.gemma)
    wanted = dict(islice(_wanted(table, source.config), len(found) + 64))
    for name in sorted(wanted):
        if name not in found:
            raise UserError(f"the tensor {name} is missing")
        if found[name] != wanted[name]:
            raise UserError(f"the tensor {name} has shape {found[name]}, expected {wanted[name]}")
    claimed = sum(map(math.prod, found.values()))
    if claimed > WEIGHTS_PER_BYTE * source.size:
        raise UserError(
            f"its tensors claim {claimed} values, which {source.size} bytes cannot hold; the file "
            f"is damaged, or made to fill the memory"
        )
    for name in sorted(found.keys() - wanted.keys()):
        if not CONSTANTS.fullmatch(name):
            raise UserError(f"unexpected tensor {name}: the model described by its config has none")
        _check_constant(name, source)


def _check_constant(name: str, source: Source) -> None:
    """Check that a tensor which is not one of the weights says what the model does anyway."""
    x, last = np.asarray(source.read(name)), name.rpartition(".")[2]
    match last:
        case "weight":  # a tied head
            [table] = next(_names(_table(source.config, source.gemma)[0], source.config))
            if not np.array_equal(x, source.read(table)):
                use = "to use it, set tie_word_embeddings to false, or else delete the tensor"
                if family(source.config, source.gemma) == "gpt2":
                    use = "no other GPT-2 is supported, so delete the tensor or tie it"
                raise UserError(
                    f"{name} differs from {table}, and the config says that they are tied; {use}"
                )
            return
        case "bias":  # the causal mask
            same = x.ndim == 4 and np.array_equal(x, np.tri(*x.shape[2:])[None, None])
        case "masked_bias":  # the score of what is masked
            same = x.size == 1 and x.item() <= -1e4
        case _:
            rates = np.asarray(rotary_rates(source.config))
            same = x.shape == rates.shape and np.allclose(x, rates, rtol=1e-2)
    if not same:
        raise UserError(
            f"the tensor {name} is not the constant that the model described by its config has"
        )


def _wanted(table: list[Leaf], config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of each tensor of transformers; the config has a vocab_size."""
    for leaf in table:
        shape = tuple(math.prod(group) for group in _axes(leaf, config)[0])
        for names in _names(leaf, config):
            yield from ((name, shape) for name in names)


def _table(
    config: ModelConfig, gemma: GemmaConfig | None = None, whole: bool = False
) -> list[Leaf]:
    """The rows of its family's table that a model has; `whole`: with all of GPT-2's biases."""
    c = config
    is_gpt2 = family(c, gemma) == "gpt2"
    absent = {"c_q", "c_kv"} if kv_heads(c) == c.n_head else {"c_attn"}
    if c.tie_head:
        absent |= {"lm_head"}
    if not c.qk_norm_scale:
        absent |= {"q_norm", "k_norm"}

    def has(leaf: Leaf) -> bool:
        parts = leaf.path.split("/")
        if parts[-1] == "bias":
            inward = parts[-2] in ("c_attn", "c_q", "c_kv")
            biased = c.attn_bias if inward and c.attn_bias is not None else c.bias
            if not biased and not (whole and is_gpt2):
                return False
        return absent.isdisjoint(parts)

    return list(filter(has, GPT2 if is_gpt2 else LLAMA if gemma is None else GEMMA))


def _axes(leaf: Leaf, config: ModelConfig) -> tuple[list[list[int]], list[int]]:
    """Our axis sizes within each axis of the tensor, and the permutation to our axis order."""
    c = config
    assert c.vocab_size is not None
    sizes = {"V": c.vocab_size, "P": c.block_size, "C": c.n_embd, "F": c.n_inner or 4 * c.n_embd}
    sizes |= {"H": c.n_head, "G": kv_heads(c), "D": c.head_size, "3": 3}
    groups = [(a or b).split() for a, b in re.findall(r"\(([^)]*)\)|(\S+)", leaf.theirs)]
    words = [word for group in groups for word in group]
    order = [words.index(axis) for axis in leaf.ours.split() if axis in words]
    return [[sizes[word] for word in group] for group in groups], order


def _names(leaf: Leaf, config: ModelConfig) -> Iterator[list[str]]:
    """The names of a leaf's tensors, per layer if it has a layer axis."""
    for layer in range(config.n_layer if _stacked(leaf) else 1):
        yield [name.format(layer) for name in leaf.names]


def _stack_axis(leaf: Leaf) -> int:
    """The axis of ours along which several tensors are stacked."""
    return next(i for i, axis in enumerate(leaf.ours.split()) if axis in "23")


def _stacked(leaf: Leaf) -> bool:
    return leaf.path.startswith("h/")
