"""`config.json` of Hugging Face's transformers to our config, and back.

GPT2LMHeadModel   learned positions, layer norm: the classic model
LlamaForCausalLM  rotary positions, RMS norm, SwiGLU, grouped queries
"""

from collections.abc import Mapping
from typing import Any, Literal

from gptjax.config import ModelConfig
from gptjax.errors import UserError

Family = Literal["gpt2", "llama"]

ACTIVATIONS = {  # theirs to ours
    "gelu_pytorch_tanh": "gelu",
    "gelu_new": "gelu",
    "gelu": "gelu_erf",
    "relu": "relu",
    "relu2": "relu2",
}
# What a config of theirs has to say where ours has no option for anything else, as it does if it
# says nothing.
GPT2_ONLY = {
    "add_cross_attention": False,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "tie_word_embeddings": True,
}
LLAMA_ONLY = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "rope_scaling": None,
    "sliding_window": None,
    "quantization_config": None,
}


def family(config: ModelConfig) -> Family:
    """Which of their classes our model is.

    Raises:
        UserError: neither; names the option that has no place there.
    """
    c = config
    wanted: dict[str, Any] = {
        "window": None,
        "qk_norm": False,
        "softcap": None,
    }
    if c.position == "rotary":
        wanted |= {"norm": "rms", "activation": "swiglu", "bias": False}
    else:
        wanted |= {"position": "learned", "norm": "layer"}
        if kv_heads(c) != c.n_head:
            wanted["n_kv_head"] = None
        if c.activation == "swiglu":
            wanted["activation"] = "gelu"
        if c.bias and not c.tie_head:  # a head of its own would have a bias
            wanted["tie_head"] = True
    for name, value in wanted.items():
        if getattr(c, name) != value:
            theirs = "LlamaForCausalLM" if c.position == "rotary" else "GPT2LMHeadModel"
            raise UserError(
                f"model.{name}={getattr(c, name)} has no place in transformers' {theirs}, which "
                f"is this model with model.{name}={value}"
            )
    return "llama" if c.position == "rotary" else "gpt2"


def read_config(values: Mapping[str, Any]) -> ModelConfig:
    """Our config for a `config.json` of theirs.

    Raises:
        UserError: a model_type, a setting or a value that we have no option for.
    """
    kind = values.get("model_type")
    if kind not in ("gpt2", "llama"):
        raise UserError(f"model_type={kind!r} is not supported; it can be 'gpt2' or 'llama'")
    for key, value in (GPT2_ONLY if kind == "gpt2" else LLAMA_ONLY).items():
        if (found := values.get(key, value)) != value:
            raise UserError(f"{key}={found!r} is not supported; it can be {value!r}")
    if kind == "gpt2":
        activation = values.get("activation_function", "gelu_new")
        if activation not in ACTIVATIONS:
            names = ", ".join(map(repr, ACTIVATIONS))
            raise UserError(
                f"activation_function={activation!r} is not supported; it can be {names}"
            )
        return ModelConfig(
            n_layer=_whole(values, "n_layer"),
            n_head=_whole(values, "n_head"),
            n_embd=_whole(values, "n_embd"),
            n_inner=_whole(values, "n_inner", None),
            block_size=_whole(values, "n_positions"),
            vocab_size=_whole(values, "vocab_size"),
            norm_eps=_number(values, "layer_norm_epsilon", 1e-5),
            activation=ACTIVATIONS[activation],  # pyright: ignore[reportArgumentType]
        )
    rope = values.get("rope_parameters") or {}  # since transformers 5; before, beside the others
    if (turns := rope.get("rope_type", "default")) != "default":
        raise UserError(f"rope_type={turns!r} is not supported; it can be 'default'")
    config = ModelConfig(
        n_layer=_whole(values, "num_hidden_layers"),
        n_head=_whole(values, "num_attention_heads"),
        n_kv_head=_whole(values, "num_key_value_heads", None),
        n_embd=_whole(values, "hidden_size"),
        n_inner=_whole(values, "intermediate_size"),
        block_size=_whole(values, "max_position_embeddings"),
        vocab_size=_whole(values, "vocab_size"),
        bias=False,
        norm="rms",
        norm_eps=_number(values, "rms_norm_eps", 1e-6),
        position="rotary",
        rope_base=_number({**values, **rope}, "rope_theta", 10_000.0),
        activation="swiglu",
        tie_head=bool(values.get("tie_word_embeddings", False)),
    )
    if (size := values.get("head_dim")) not in (None, config.head_size):
        raise UserError(
            f"head_dim={size} is not supported; it can be hidden_size / num_attention_heads = "
            f"{config.head_size}"
        )
    return config


def write_config(config: ModelConfig, end_of_text: int | None) -> dict[str, Any]:
    """Their `config.json` for our model.

    Args:
        config: the model's, with its vocab_size.
        end_of_text: the tokenizer's id of it; None: it has none.

    Raises:
        UserError: the model is of neither family.
    """
    c = config
    shared = {
        "vocab_size": c.vocab_size,
        "tie_word_embeddings": c.tie_head,
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
        "dtype": "float32",
    }
    if family(c) == "gpt2":
        names = {ours: theirs for theirs, ours in ACTIVATIONS.items()}
        return {
            "architectures": ["GPT2LMHeadModel"],
            "model_type": "gpt2",
            "n_layer": c.n_layer,
            "n_head": c.n_head,
            "n_embd": c.n_embd,
            "n_inner": c.n_inner,
            "n_positions": c.block_size,
            "layer_norm_epsilon": c.norm_eps,
            "activation_function": names[c.activation],
            "attn_pdrop": c.dropped_attention,
            "embd_pdrop": 0.0,
            "resid_pdrop": c.dropout,
            **shared,
        }
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": c.n_layer,
        "num_attention_heads": c.n_head,
        "num_key_value_heads": kv_heads(c),
        "hidden_size": c.n_embd,
        "intermediate_size": c.n_inner or 4 * c.n_embd,
        "max_position_embeddings": c.block_size,
        "rms_norm_eps": c.norm_eps,
        "rope_theta": c.rope_base,
        "hidden_act": "silu",
        **shared,
    }


def kv_heads(config: ModelConfig) -> int:
    """Heads of keys and values."""
    return config.n_kv_head or config.n_head


def _whole(values: Mapping[str, Any], key: str, *default: None) -> Any:
    value = values.get(key)
    if value is None and default:
        return None
    if type(value) is not int or not 0 < value < 2**31:
        raise UserError(f"{key}={value!r} is not a whole number above 0")
    return value


def _number(values: Mapping[str, Any], key: str, default: float) -> float:
    value = values.get(key, default)
    if type(value) not in (int, float):
        raise UserError(f"{key}={value!r} is not a number")
    return float(value)
