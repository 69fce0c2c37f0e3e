"""Read a Llama model and its tokenizer from a GGUF file, dequantised by the `gguf` package."""

from pathlib import Path
from typing import Any

import numpy as np

from gptjax.errors import UserError, optional_import
from gptjax.interop import gguf_tokenizer, hf_config
from gptjax.interop.hf import Source

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
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
KEYS = {  # metadata keys to config.json's; any other llama.* key is refused
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "context_length": "max_position_embeddings",
    "vocab_size": "vocab_size",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
    "rope.dimension_count": "head_dim",
    "attention.key_length": "head_dim",
    "attention.value_length": "head_dim",
}


def read(path: Path) -> Source:
    """Open a GGUF file.

    Raises:
        UserError: no gguf package, no such file, a corrupt file, or an unsupported architecture,
            setting, quantisation or tokenizer.
    """
    gguf = optional_import("gguf", "hf")
    try:
        file = gguf.GGUFReader(path)
        values = {key: field.contents() for key, field in file.fields.items()}
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except Exception as error:  # the package raises no specific type
        raise UserError(f"{path} is not a valid GGUF file: {error}") from None
    try:
        tensors = {_name(tensor.name): tensor for tensor in file.tensors}
        settings = _settings(values)
        settings.setdefault("vocab_size", len(values.get("tokenizer.ggml.tokens", ())))
        settings["tie_word_embeddings"] = "lm_head.weight" not in tensors
        config = hf_config.read_config(settings)
        tokenizer = gguf_tokenizer.read(values)
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
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            # llama.cpp interleaves rotary pairs; transformers and gptjax pair i with i + D/2.
            D = config.head_size
            x = x.reshape(-1, D // 2, 2, x.shape[-1]).swapaxes(1, 2).reshape(x.shape)
        return x

    shapes = {name: tuple(map(int, x.shape[::-1])) for name, x in tensors.items()}
    return Source(config, shapes, read_one, tokenizer)


def _settings(values: dict[str, Any]) -> dict[str, Any]:
    """Convert the model's metadata to the values of a transformers config.json."""
    if (kind := values.get("general.architecture")) != "llama":
        raise UserError(f"general.architecture={kind!r} is not supported; expected 'llama'")
    settings: dict[str, Any] = {"model_type": "llama"}
    for key, value in values.items():
        if key.startswith("llama."):
            name = KEYS.get(key.removeprefix("llama."))
            if name is None:
                raise UserError(f"{key}={value!r} is not supported; expected a model without it")
            # 1e-5 was stored as the nearest float32; its shortest decimal gives 1e-5 back.
            settings[name] = float(str(np.float32(value))) if type(value) is float else value
    return settings


def _name(name: str) -> str:
    """Convert a tensor's name to transformers'; an unknown one is returned unchanged."""
    match name.split("."):
        case [part, "weight"] if part in NAMES:
            return f"{NAMES[part]}.weight"
        case ["blk", layer, part, "weight"] if part in LAYER_NAMES:
            return f"model.layers.{layer}.{LAYER_NAMES[part]}.weight"
    return name
