"""Convert transformers' `config.json` to our config, and back.

GPT2LMHeadModel   learned positions, LayerNorm
LlamaForCausalLM  rotary positions, RMSNorm, SwiGLU, grouped-query attention

A `config.json` is read key by key: each key is understood, or known to leave the logits as they
are (`NEUTRAL`), or refused. So a setting that we have not heard of is never ignored.
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
SHARED_ONLY = {
    "is_encoder_decoder": False,
    "tie_encoder_decoder": False,
    "add_cross_attention": False,
    "pruned_heads": {},
}
GPT2_ONLY = {
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "tie_word_embeddings": True,
}
LLAMA_ONLY = {
    "attention_bias": False,
    "mlp_bias": False,
    "rope_interleaved": False,
    "sliding_window": None,
}
# Settings that do not change the logits: training, generation, labels, storage, provenance.
NEUTRAL = frozenset(
    """
    _name_or_path architectures dtype finetuning_task gradient_checkpointing id2label
    initializer_range is_decoder is_llama_config label2id model_type n_ctx num_labels
    output_attentions output_hidden_states pretraining_tp problem_type reorder_and_upcast_attn
    return_dict task_specific_params tf_legacy_loss tokenizer_class torch_dtype torchscript
    transformers.js_config transformers_version unsloth_fixed unsloth_version use_bfloat16 use_cache
    attention_dropout attn_pdrop embd_pdrop resid_pdrop summary_activation summary_first_dropout
    summary_proj_to_labels summary_type summary_use_proj chunk_size_feed_forward
    bos_token_id decoder_start_token_id eos_token_id pad_token_id sep_token_id
    bad_words_ids begin_suppress_tokens diversity_penalty do_sample early_stopping
    encoder_no_repeat_ngram_size exponential_decay_length_penalty forced_bos_token_id
    forced_eos_token_id length_penalty max_length min_length no_repeat_ngram_size num_beam_groups
    num_beams num_return_sequences output_scores prefix remove_invalid_values repetition_penalty
    return_dict_in_generate suppress_tokens temperature top_k top_p typical_p
    """.split()
)


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
        UserError: a model_type, setting or value that is not supported, or not known at all.
    """
    values = dict(values)  # each key is taken out as it is understood
    kind = values.pop("model_type", None)
    if kind not in ("gpt2", "llama"):
        raise UserError(f"model_type={kind!r} is not supported; expected 'gpt2' or 'llama'")
    for key, value in (SHARED_ONLY | (GPT2_ONLY if kind == "gpt2" else LLAMA_ONLY)).items():
        _only(values, key, value)
    config = (_read_gpt2 if kind == "gpt2" else _read_llama)(values)
    for key, value in values.items():
        if key not in NEUTRAL and value is not None:
            raise UserError(
                f"{key}={value!r} is not a setting of a {kind} that is understood; delete it from "
                f"the file if it does not change the model"
            )
    return config


def _read_gpt2(values: dict[str, Any]) -> ModelConfig:
    activation = values.pop("activation_function", "gelu_new")
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
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


def _read_llama(values: dict[str, Any]) -> ModelConfig:
    if (activation := values.pop("hidden_act", "silu")) not in ("silu", "swish"):
        raise UserError(f"hidden_act={activation!r} is not supported; expected 'silu'")
    block_size = _positive_int(values, "max_position_embeddings")
    rope_base = _read_rope(values)
    config = ModelConfig(
        n_layer=_positive_int(values, "num_hidden_layers"),
        n_head=_positive_int(values, "num_attention_heads"),
        n_kv_head=_positive_int(values, "num_key_value_heads", None),
        n_embd=_positive_int(values, "hidden_size"),
        n_inner=_positive_int(values, "intermediate_size"),
        block_size=block_size,
        vocab_size=_positive_int(values, "vocab_size"),
        bias=False,
        norm="rms",
        norm_eps=_number(values, "rms_norm_eps", 1e-6),
        position="rotary",
        rope_base=rope_base,
        activation="swiglu",
        tie_head=_flag(values, "tie_word_embeddings", False),
    )
    if (size := values.pop("head_dim", None)) not in (None, config.head_size):
        raise UserError(
            f"head_dim={size!r} is not supported; expected hidden_size / num_attention_heads = "
            f"{config.head_size}"
        )
    return config


def _read_rope(values: dict[str, Any]) -> float:
    """The base of the rotary frequencies.

    transformers 5 has everything in `rope_parameters`; before, there was `rope_scaling`, which
    calls its type `type` or `rope_type`, and the base stood beside it. A file may have several of
    these if they agree.
    """
    given = {}
    for key in ("rope_parameters", "rope_scaling"):
        value = values.pop(key, None)
        if not isinstance(value, dict | None):
            raise UserError(f"{key}={value!r} is not an object; expected e.g. rope_type and factor")
        for name, x in (value or {}).items():
            name = {"type": "rope_type"}.get(name, name)
            if x is not None and given.setdefault(name, x) != x:
                raise UserError(f"{key}: {name}={x!r} contradicts {name}={given[name]!r}")
    for name in ("rope_theta", "partial_rotary_factor"):
        x = values.pop(name, None)
        if x is not None and given.setdefault(name, x) != x:
            raise UserError(
                f"{name}={x!r} contradicts {name}={given[name]!r} of the rotary settings"
            )
    base = _number(given, "rope_theta", 10_000.0)
    _only(given, "partial_rotary_factor", 1.0)
    kind = given.pop("rope_type", "default")
    if kind not in ("default", "linear"):
        raise UserError(f"rope_type={kind!r} is not supported; expected 'default'")
    _only(given, "factor", 1.0)
    for name, value in given.items():
        raise UserError(f"the rotary setting {name}={value!r} is not understood for {kind!r}")
    return base


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


def _only(values: dict[str, Any], key: str, supported: Any) -> None:
    """Take out a setting that has one supported value, also its default."""
    found = values.pop(key, None)
    if found is not None and found != supported:
        raise UserError(f"{key}={found!r} is not supported; expected {supported!r}")


def _positive_int(values: dict[str, Any], key: str, *default: None) -> Any:
    value = values.pop(key, None)
    if value is None and default:
        return None
    if type(value) is not int or not 0 < value < 2**31:
        raise UserError(f"{key}={value!r} is not a positive integer")
    return value


def _number(values: dict[str, Any], key: str, default: float) -> float:
    value = values.pop(key, default)
    if type(value) not in (int, float) or not abs(value) < 2**1023:
        raise UserError(f"{key}={value!r} is not a finite number")
    return float(value)


def _flag(values: dict[str, Any], key: str, default: bool) -> bool:
    value = values.pop(key, default)
    if type(value) is not bool:
        raise UserError(f"{key}={value!r} is not true or false")
    return value
