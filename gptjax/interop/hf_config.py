"""Convert transformers' `config.json` to our config, and back.

GPT2LMHeadModel   learned positions, LayerNorm
LlamaForCausalLM  rotary positions, RMSNorm, SwiGLU, grouped-query attention
"""

from collections.abc import Mapping
from typing import Any, Literal

from gptjax.config import ModelConfig
from gptjax.errors import UserError

Family = Literal["gpt2", "llama"]

ACTIVATIONS = {  # transformers' names to ours
    "gelu_pytorch_tanh": "gelu",
    "gelu_new": "gelu",
    "gelu": "gelu_erf",
    "relu": "relu",
    "relu2": "relu2",
}
# Settings that we have no option for: the only supported values, which are also the defaults.
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
    """The model family that can represent our model.

    Raises:
        UserError: neither can; names the option that is in the way.
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
        if c.bias and not c.tie_head:  # an untied head would have a bias, which GPT-2's lacks
            wanted["tie_head"] = True
    for name, value in wanted.items():
        if getattr(c, name) != value:
            theirs = "LlamaForCausalLM" if c.position == "rotary" else "GPT2LMHeadModel"
            raise UserError(
                f"model.{name}={getattr(c, name)} is not supported by transformers' {theirs}; it "
                f"needs model.{name}={value}"
            )
    return "llama" if c.position == "rotary" else "gpt2"


def read_config(values: Mapping[str, Any]) -> ModelConfig:
    """Convert the values of a `config.json` to our config.

    Raises:
        UserError: a model_type, setting or value that is not supported.
    """
    kind = values.get("model_type")
    if kind not in ("gpt2", "llama"):
        raise UserError(f"model_type={kind!r} is not supported; expected 'gpt2' or 'llama'")
    for key, value in (GPT2_ONLY if kind == "gpt2" else LLAMA_ONLY).items():
        if (found := values.get(key, value)) != value:
            raise UserError(f"{key}={found!r} is not supported; expected {value!r}")
    if kind == "gpt2":
        activation = values.get("activation_function", "gelu_new")
        if activation not in ACTIVATIONS:
            names = ", ".join(map(repr, ACTIVATIONS))
            raise UserError(
                f"activation_function={activation!r} is not supported; expected one of {names}"
            )
        return ModelConfig(
            n_layer=_positive_int(values, "n_layer"),
            n_head=_positive_int(values, "n_head"),
            n_embd=_positive_int(values, "n_embd"),
            n_inner=_positive_int(values, "n_inner", None),
            block_size=_positive_int(values, "n_positions"),
            vocab_size=_positive_int(values, "vocab_size"),
            norm_eps=_number(values, "layer_norm_epsilon", 1e-5),
            activation=ACTIVATIONS[activation],  # pyright: ignore[reportArgumentType]
        )
    rope = values.get("rope_parameters") or {}  # since transformers 5; at the top level before
    if (rope_type := rope.get("rope_type", "default")) != "default":
        raise UserError(f"rope_type={rope_type!r} is not supported; expected 'default'")
    config = ModelConfig(
        n_layer=_positive_int(values, "num_hidden_layers"),
        n_head=_positive_int(values, "num_attention_heads"),
        n_kv_head=_positive_int(values, "num_key_value_heads", None),
        n_embd=_positive_int(values, "hidden_size"),
        n_inner=_positive_int(values, "intermediate_size"),
        block_size=_positive_int(values, "max_position_embeddings"),
        vocab_size=_positive_int(values, "vocab_size"),
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
            f"head_dim={size} is not supported; expected hidden_size / num_attention_heads = "
            f"{config.head_size}"
        )
    return config


def write_config(config: ModelConfig, end_of_text: int | None) -> dict[str, Any]:
    """Convert our config to the values of a `config.json`.

    Args:
        config: the model's, with vocab_size.
        end_of_text: the tokenizer's id of it; None: it has none.

    Raises:
        UserError: neither family can represent the model.
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
    """Number of key/value heads."""
    return config.n_kv_head or config.n_head


def _positive_int(values: Mapping[str, Any], key: str, *default: None) -> Any:
    value = values.get(key)
    if value is None and default:
        return None
    if type(value) is not int or not 0 < value < 2**31:
        raise UserError(f"{key}={value!r} is not a positive integer")
    return value


def _number(values: Mapping[str, Any], key: str, default: float) -> float:
    value = values.get(key, default)
    if type(value) not in (int, float):
        raise UserError(f"{key}={value!r} is not a number")
    return float(value)
