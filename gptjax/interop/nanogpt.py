"""Read nanoGPT's `ckpt.pt` with torch's weights-only loader, which executes nothing in it."""

from pathlib import Path
from typing import Any

import numpy as np

from gptjax.config import ModelConfig
from gptjax.errors import UserError
from gptjax.interop.hf import Source, add

TRANSPOSED = ("c_attn.weight", "c_fc.weight", "c_proj.weight")  # nn.Linear, not GPT-2's Conv1D
SIZES = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")
DTYPES = ("float64", "float32", "float16", "bfloat16")  # of weights; a causal mask may have others


def read(path: Path) -> Source:
    """Open a checkpoint; it contains no tokenizer.

    Raises:
        UserError: no torch, no such file, not a nanoGPT checkpoint, or one with pickled objects.

    Source: github.com/karpathy/nanoGPT, model.py; its GELU is the exact one (erf) since May 2023.
    """
    try:
        import torch  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UserError(
            f"reading {path} needs torch, for its weights-only loader; install torch, or convert "
            f"the model to safetensors"
        ) from None
    try:
        values = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except Exception as error:  # torch raises no specific type for what it refuses
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise UserError(
            f"{path} is not a checkpoint of plain tensors, and pickled objects are never loaded: "
            f"{reason}"
        ) from None
    args, state = (
        values.get(k) if isinstance(values, dict) else None for k in ("model_args", "model")
    )
    if not isinstance(args, dict) or not isinstance(state, dict):
        raise UserError(f"{path} is not a nanoGPT checkpoint: it lacks model_args or model")
    for name in SIZES:
        if type(args.get(name)) is not int:
            raise UserError(f"{path}: model_args {name}={args.get(name)!r} is not an integer")
    bias = args.get("bias", True)
    if type(bias) is not bool:
        raise UserError(f"{path}: model_args bias={bias!r} is not true or false")
    for name in args.keys() - {*SIZES, "bias", "dropout"}:
        raise UserError(f"{path}: model_args {name}={args[name]!r} is not a setting of nanoGPT")
    tensors: dict[str, Any] = {}
    try:
        config = ModelConfig(
            bias=bias, activation="gelu_erf", **{name: args[name] for name in SIZES}
        )
        for name, tensor in state.items():
            _check_tensor(torch, name, tensor)
            name = name.removeprefix("_orig_mod.")
            add(tensors, name, tensor.T if name.endswith(TRANSPOSED) else tensor)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None

    def read_one(name: str) -> np.ndarray:
        return tensors[name].float().numpy(force=True)

    shapes = {name: tuple(x.shape) for name, x in tensors.items()}
    return Source(config, shapes, read_one, path.stat().st_size, None)


def _check_tensor(torch: Any, name: Any, tensor: Any) -> None:
    """Check that a tensor is plain numbers, all of them in the file.

    Raises:
        UserError: it is sparse, quantised or nested, has no data (meta), or is not of floats.
    """
    if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
        raise UserError(f"{name} is not a tensor")
    kind = str(tensor.dtype).removeprefix("torch.")
    odd = tensor.is_sparse or tensor.is_nested or tensor.is_quantized or tensor.is_meta
    if odd or tensor.layout is not torch.strided or tensor.device.type != "cpu":
        raise UserError(
            f"the tensor {name} has layout {tensor.layout}, dtype {kind} and device "
            f"{tensor.device}; expected plain (strided, dense) numbers in the file"
        )
    weight = not name.endswith(".attn.bias")
    if (weight and kind not in DTYPES) or tensor.is_complex():
        raise UserError(f"the tensor {name} has dtype {kind}, expected one of {', '.join(DTYPES)}")
    if weight and name.endswith(TRANSPOSED) and tensor.ndim != 2:
        raise UserError(f"the tensor {name} has {tensor.ndim} axes, expected 2")
