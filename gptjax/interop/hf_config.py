"""Convert transformers' `config.json` to our config, and back.

gpt2     learned positions, LayerNorm
llama    rotary positions, RMSNorm, SwiGLU, grouped-query attention; Llama 3's stretched wavelengths
mistral  a llama with a sliding window, or with heads of another size
qwen2    a llama with biases for queries, keys and values
qwen3    a llama with heads of another size and scaled QK-norm
smollm3  a llama with layers without rotary positions
gemma2, gemma3_text  see gemma.py and hf_gemma.py

A `config.json` is read key by key: each key is understood, or known to leave the logits as they
are (`NEUTRAL`), or refused. So a setting that we have not heard of is never ignored.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal, NamedTuple

from gptjax.config import ModelConfig
from gptjax.errors import UserError
from gptjax.interop import hf_gemma
from gptjax.interop import hf_settings as settings
from gptjax.interop.gemma import GemmaConfig
from gptjax.interop.hf_settings import WINDOWED

Family = Literal["gpt2", "llama", "mistral", "qwen2", "qwen3", "smollm3", "gemma2", "gemma3_text"]
CLASSES: dict[str, str] = {  # of transformers
    "gpt2": "GPT2LMHeadModel",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
    **hf_gemma.CLASSES,
}
# What holds where a file says nothing, if not the same as in a llama.
DEFAULTS: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "llama": {},
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"num_key_value_heads": 32},
    "qwen3": {"num_key_value_heads": 32, "head_dim": 128},
    "smollm3": {"num_key_value_heads": 4, "tie_word_embeddings": True},
    **hf_gemma.DEFAULTS,
}
ROPE_BASES = {"smollm3": 2e6, "gemma3_text": 1e6}  # others than 1e4

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
    return_dict_in_generate suppress_tokens temperature top_k top_p typical_p cache_implementation
    """.split()
)


class Described(NamedTuple):
    """A model: its config, and what a Gemma has beside that; None: it is no Gemma."""

    config: ModelConfig
    gemma: GemmaConfig | None


def family(config: ModelConfig, gemma: GemmaConfig | None = None) -> Family:
    """The model family that can represent our model.

    Args:
        config: the model's.
        gemma: what it has beside that, if it is a Gemma.

    Raises:
        UserError: none can; names the option that is in the way.
    """
    c = config
    kind: Family = "gpt2"
    wanted: dict[str, Any] = {"softcap": None}
    if gemma is not None:
        kind = "gemma3_text" if c.qk_norm else "gemma2"
        wanted = {"position": "rotary", "norm": "rms", "bias": False, "qk_norm_scale": c.qk_norm}
        wanted |= {"window": None, "nope_every": None}
        if c.attn_bias or c.activation == "swiglu":
            wanted |= {"attn_bias": None, "activation": "gelu"}
    elif c.position == "rotary":
        if c.nope_every is not None:
            kind = "smollm3"
        elif c.qk_norm:
            kind = "qwen3"
        elif c.attn_bias:
            kind = "qwen2"
        else:  # a llama's heads divide its width
            kind = "mistral" if c.window is not None or c.n_embd % c.n_head else "llama"
        wanted |= {"norm": "rms", "activation": "swiglu", "bias": False}
        wanted |= {"qk_norm": kind == "qwen3", "qk_norm_scale": kind == "qwen3"}
        if kind != "qwen2" and c.attn_bias:
            wanted["attn_bias"] = None
        if kind == "smollm3":
            wanted["window"] = None
    else:
        wanted |= {"position": "learned", "norm": "layer", "qk_norm": False, "window": None}
        if kv_heads(c) != c.n_head:
            wanted["n_kv_head"] = None
        if c.head_size * c.n_head != c.n_embd:
            wanted["head_dim"] = None
        if c.activation == "swiglu":
            wanted["activation"] = "gelu"
        if c.bias and not c.tie_head:  # an untied head would have a bias, which GPT-2's lacks
            wanted["tie_head"] = True
    for name, value in wanted.items():
        if getattr(c, name) != value:
            raise UserError(
                f"model.{name}={getattr(c, name)} is not supported by transformers' "
                f"{CLASSES[kind]}; it needs model.{name}={value}"
            )
    return kind


def read_config(values: Mapping[str, Any]) -> Described:
    """Convert the values of a `config.json` to our config.

    Raises:
        UserError: a model_type, setting or value that is not supported, or not known at all.
    """
    values = dict(values)  # each key is taken out as it is understood
    kind = values.pop("model_type", None)
    if kind == "gemma3":
        raise UserError(
            "model_type='gemma3' is a model of texts and images, which is not supported; save its "
            "text part alone, a 'gemma3_text', with transformers, as docs/weights.md shows"
        )
    if not isinstance(kind, str) or kind not in CLASSES:
        names = ", ".join(map(repr, CLASSES))
        raise UserError(f"model_type={kind!r} is not supported; expected one of {names}")
    for key, value in (SHARED_ONLY | (GPT2_ONLY if kind == "gpt2" else LLAMA_ONLY)).items():
        settings.only(values, key, value)
    values = DEFAULTS[kind] | values
    gemma, own = hf_gemma.take(kind, values) if kind in hf_gemma.CLASSES else (None, {})
    config = _read_gpt2(values) if kind == "gpt2" else _read_llama(kind, values)
    if gemma is not None:
        activation = _activation("hidden_activation", own["activation"])
        config = replace(config, softcap=own["softcap"], activation=activation)
    for key, value in values.items():
        if key not in NEUTRAL and value is not None:
            raise UserError(
                f"{key}={value!r} is not a setting of a {kind} that is understood; delete it from "
                f"the file if it does not change the model"
            )
    return Described(config, gemma)


def _read_gpt2(values: dict[str, Any]) -> ModelConfig:
    return ModelConfig(
        n_layer=settings.positive_int(values, "n_layer"),
        n_head=settings.positive_int(values, "n_head"),
        n_embd=settings.positive_int(values, "n_embd"),
        n_inner=settings.positive_int(values, "n_inner", None),
        block_size=settings.positive_int(values, "n_positions"),
        vocab_size=settings.positive_int(values, "vocab_size"),
        norm_eps=settings.number(values, "layer_norm_epsilon", 1e-5),
        activation=_activation(
            "activation_function", values.pop("activation_function", "gelu_new")
        ),
    )


def _activation(key: str, value: Any) -> Any:
    """Our name of an activation.

    Raises:
        UserError: we have none.
    """
    if not isinstance(value, str) or value not in ACTIVATIONS:
        names = ", ".join(map(repr, ACTIVATIONS))
        raise UserError(f"{key}={value!r} is not supported; expected one of {names}")
    return ACTIVATIONS[value]


def _read_llama(kind: str, values: dict[str, Any]) -> ModelConfig:
    if (activation := values.pop("hidden_act", "silu")) not in ("silu", "swish"):
        raise UserError(f"hidden_act={activation!r} is not supported; expected 'silu'")
    n_layer = settings.positive_int(values, "num_hidden_layers")
    block_size = settings.positive_int(values, "max_position_embeddings")
    nope_every = settings.nope_every(values, n_layer) if kind == "smollm3" else None
    window = settings.window(kind, values, n_layer, block_size)
    base, scaling = settings.rope(values, block_size, ROPE_BASES.get(kind, 1e4))
    n_head = settings.positive_int(values, "num_attention_heads")
    n_embd = settings.positive_int(values, "hidden_size")
    head_dim = settings.positive_int(values, "head_dim", None)
    return ModelConfig(
        n_layer=n_layer,
        n_head=n_head,
        n_kv_head=settings.positive_int(values, "num_key_value_heads", None),
        head_dim=None if head_dim is None or head_dim * n_head == n_embd else head_dim,
        n_embd=n_embd,
        n_inner=settings.positive_int(values, "intermediate_size"),
        block_size=block_size,
        vocab_size=settings.positive_int(values, "vocab_size"),
        bias=False,
        attn_bias=True if kind == "qwen2" else None,
        norm="rms",
        norm_eps=settings.number(values, "rms_norm_eps", 1e-6),
        qk_norm=kind in ("qwen3", "gemma3_text"),
        qk_norm_scale=kind in ("qwen3", "gemma3_text"),
        position="rotary",
        rope_base=base,
        rope_scaling=scaling,
        nope_every=nope_every,
        window=window,
        activation="swiglu",
        tie_head=settings.flag(values, "tie_word_embeddings", False),
    )


def write_config(
    config: ModelConfig, end_of_text: int | None, gemma: GemmaConfig | None = None
) -> dict[str, Any]:
    """Convert our config to the values of a `config.json`.

    Args:
        config: the model's, with vocab_size.
        end_of_text: the tokenizer's id of it; None: it has none.
        gemma: what the model has beside its config, if it is a Gemma.

    Raises:
        UserError: no family can represent the model.
    """
    c = config
    kind = family(c, gemma)
    shared = {
        "architectures": [CLASSES[kind]],
        "model_type": kind,
        "vocab_size": c.vocab_size,
        "tie_word_embeddings": c.tie_head,
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
        "pad_token_id": None,  # a smollm3's default is beyond a small vocabulary
        "dtype": "float32",
    }
    if kind == "gpt2":
        names = {ours: theirs for theirs, ours in ACTIVATIONS.items()}
        return {
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
    values = {
        "num_hidden_layers": c.n_layer,
        "num_attention_heads": c.n_head,
        "num_key_value_heads": kv_heads(c),
        "head_dim": c.head_size,
        "hidden_size": c.n_embd,
        "intermediate_size": c.n_inner or 4 * c.n_embd,
        "max_position_embeddings": c.block_size,
        "rms_norm_eps": c.norm_eps,
        "rope_theta": c.rope_base,
        "hidden_act": "silu",
        **shared,
    }
    if c.rope_scaling is not None:
        numbers = ("factor", "low_freq_factor", "high_freq_factor")
        scaling: dict[str, Any] = dict(zip(numbers, c.rope_scaling, strict=False))
        scaling["rope_type"] = "linear" if len(c.rope_scaling) == 1 else "llama3"
        if len(c.rope_scaling) == 4:  # transformers wants an integer
            scaling["original_max_position_embeddings"] = int(c.rope_scaling[3])
        values["rope_scaling"] = scaling
    if gemma is not None:
        del values["hidden_act"]
        first = next(theirs for theirs, ours in ACTIVATIONS.items() if ours == c.activation)
        values |= {"hidden_activation": first, **hf_gemma.give(kind, c, gemma)}
    if kind == "mistral":
        values["sliding_window"] = c.window
    if kind in WINDOWED:
        values |= {"sliding_window": c.window, "use_sliding_window": c.window is not None}
    if kind in ("qwen2", "qwen3"):
        values["max_window_layers"] = 0
    if c.nope_every is not None:
        values["no_rope_layer_interval"] = c.nope_every
        values["no_rope_layers"] = [int(i % c.nope_every > 0) for i in range(1, c.n_layer + 1)]
    return values


def kv_heads(config: ModelConfig) -> int:
    """Number of key/value heads."""
    return config.n_kv_head or config.n_head
