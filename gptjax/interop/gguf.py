"""Read a model of Llama's kind and its tokenizer from a GGUF file, dequantised by the `gguf`
package."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from gptjax.config import ModelConfig
from gptjax.errors import UserError, optional_import
from gptjax.interop import gguf_tokenizer, hf_config
from gptjax.interop.hf import Source, add
from gptjax.layers import rotary_rates

# Architectures, by transformers' names too: whether llama.cpp turns neighbouring axes of queries
# and keys (i and i + 1); transformers and gptjax turn i and i + D/2.
INTERLEAVED = {"llama": True, "smollm3": True, "qwen2": False, "qwen3": False}
STRETCH = "rope_freqs.weight"  # (D / 2,) factors of the rotary wavelengths
NAMES = {  # llama.cpp's tensor names to transformers'
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
KEYS = {  # metadata keys to config.json's; any other key of the architecture is refused
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "context_length": "max_position_embeddings",
    "vocab_size": "vocab_size",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
    "attention.key_length": "head_dim",
    "attention.value_length": "head_dim",
    "rope.scaling.type": "rope_type",
    "rope.scaling.factor": "factor",
    "rope.scale_linear": "factor",
}
# Keys with values that change nothing.
NEUTRAL = {"attention.causal": True, "expert_count": 0, "expert_used_count": 0}
PREFIXES = ("GGUF.", "general.", "tokenizer.", "split.", "quantize.")  # not about the model
MOST_READS = 2**21  # of the header; a vocabulary of 260,000 tokens takes a million


def read(path: Path) -> Source:
    """Open a GGUF file.

    Raises:
        UserError: no gguf package, no such file, a corrupt file, or an unsupported architecture,
            setting, quantisation or tokenizer.
    """
    gguf = optional_import("gguf", "hf")
    try:
        file = _open(gguf, path)
        values = {key: field.contents() for key, field in file.fields.items()}
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except Exception as error:  # the package raises no specific type
        raise UserError(f"{path} is not a valid GGUF file: {error}") from None
    tensors: dict[str, Any] = {}
    try:
        for tensor in file.tensors:
            add(tensors, _name(tensor.name), tensor)
        settings = _settings(values)
        settings.setdefault("vocab_size", len(values.get("tokenizer.ggml.tokens", ())))
        settings["tie_word_embeddings"] = "lm_head.weight" not in tensors
        rotated = settings.pop("rope.dimension_count", None)
        config, _ = hf_config.read_config(settings)
        if STRETCH in tensors:
            config = _stretched(config, np.array(tensors.pop(STRETCH).data, np.float64))
        if rotated not in (None, config.head_size):
            raise UserError(
                f"rope.dimension_count={rotated!r} is not supported; expected the head size "
                f"{config.head_size}"
            )
        tokenizer, chat = gguf_tokenizer.read(values), gguf_tokenizer.read_chat(values)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None

    def read_one(name: str) -> np.ndarray:
        tensor = tensors[name]
        try:
            x = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        except NotImplementedError:
            raise UserError(
                f"{path}: {tensor.name} has the type {tensor.tensor_type.name}, which the gguf "
                f"package cannot dequantise; use a file with another quantisation"
            ) from None
        if INTERLEAVED[settings["model_type"]] and name.endswith(
            ("q_proj.weight", "k_proj.weight")
        ):
            D = config.head_size
            x = x.reshape(-1, D // 2, 2, x.shape[-1]).swapaxes(1, 2).reshape(x.shape)
        return x

    shapes = {name: tuple(map(int, x.shape[::-1])) for name, x in tensors.items()}
    return Source(config, shapes, read_one, path.stat().st_size, tokenizer, chat)


def _open(gguf: Any, path: Path) -> Any:
    """A `GGUFReader` that ends where the file does, and after `MOST_READS`.

    The package believes every count in a header: an array of 2**60 values in a file of 49 bytes
    would keep it busy for ever.
    """

    class Reader(gguf.GGUFReader):
        reads = 0

        def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
            self.reads += 1
            if int(offset) + np.dtype(dtype).itemsize * int(count) > len(self.data):
                raise ValueError("it ends before what its header announces")
            if self.reads > MOST_READS:
                raise ValueError(f"its header has more than {MOST_READS} values")
            return super()._get(offset, dtype, count, override_order)

    return Reader(path)


def _settings(values: dict[str, Any]) -> dict[str, Any]:
    """Convert the model's metadata to the values of a transformers config.json, and
    `rope.dimension_count`."""
    if (kind := values.get("general.architecture")) not in INTERLEAVED:
        names = ", ".join(map(repr, INTERLEAVED))
        raise UserError(f"general.architecture={kind!r} is not supported; expected one of {names}")
    if (contents := values.get("general.type", "model")) != "model":
        raise UserError(f"general.type={contents!r} is not supported; expected 'model'")
    # llama.cpp's defaults, which are not transformers' for every family.
    settings: dict[str, Any] = {"model_type": kind}
    defaults = {"num_key_value_heads": None, "head_dim": None, "rope_theta": 10_000.0}
    for key, value in values.items():
        if key.startswith(PREFIXES):
            continue
        # 1e-5 was stored as the nearest float32; its shortest decimal gives 1e-5 back.
        value = float(str(np.float32(value))) if type(value) is float else value
        short = key.removeprefix(f"{kind}.")
        name = short if short == "rope.dimension_count" else KEYS.get(short)
        if short in NEUTRAL and value == NEUTRAL[short]:
            continue
        if name is None or short == key:
            raise UserError(f"{key}={value!r} is not supported; expected a model without it")
        if settings.setdefault(name, value) != value:
            raise UserError(f"{key}={value!r} contradicts another key, with {settings[name]!r}")
    scaling = {"rope_type": settings.pop("rope_type", "linear"), "factor": 1.0}
    factor = settings.pop("factor", None)
    if scaling["rope_type"] == "none":  # llama.cpp ignores the factor then, and takes 0 for 1
        scaling["rope_type"] = "default"
    elif factor:
        scaling["factor"] = factor
    return defaults | settings | {"rope_scaling": scaling}


def _stretched(config: ModelConfig, factors: np.ndarray) -> ModelConfig:
    """The config with the `rope_scaling` that gives a file's (D / 2,) factors.

    A file holds neither Llama 3's LOW and HIGH, which have been 1 and 4 in every release, nor
    ORIGINAL, which follows from a factor between 1 and the largest.

    Raises:
        UserError: no such scaling gives these factors.
    """
    plain = np.asarray(rotary_rates(replace(config, rope_scaling=None)), np.float64)
    if factors.shape == plain.shape and np.isfinite(factors).all() and factors.min() >= 1:
        low, high, largest, original = 1.0, 4.0, float(factors.max()), 8192.0
        if (between := (factors > 1.001) & (factors < 0.999 * largest)).any():
            kept = (1 / factors[between] - 1 / largest) / (1 - 1 / largest)
            original = float(
                np.round(np.median(2 * np.pi / plain[between] * (low + kept * (high - low))))
            )
        scaling = None if largest == 1 else (largest, low, high, original)
        found = replace(config, rope_scaling=scaling)
        if config.rope_scaling is None and np.allclose(
            np.asarray(rotary_rates(found)), plain / factors, rtol=1e-4
        ):
            return found
    raise UserError(
        f"the factors in {STRETCH} are not those of Llama 3's scaled rotary positions, the only "
        f"ones that are supported"
    )


def _name(name: str) -> str:
    """Convert a tensor's name to transformers'; an unknown one is returned unchanged."""
    match name.split("."):
        case [part, "weight"] if part in NAMES:
            return f"{NAMES[part]}.weight"
        case ["blk", layer, part, ("weight" | "bias") as kind] if part in LAYER_NAMES:
            return f"model.layers.{layer}.{LAYER_NAMES[part]}.{kind}"
    return name
