"""nanoGPT's `ckpt.pt`, read by torch's weights-only loader: nothing in it is run."""

from pathlib import Path
from typing import Any

import numpy as np

from gptjax.config import ModelConfig
from gptjax.errors import UserError
from gptjax.interop.hf import Source, full_name

TURNED = ("c_attn.weight", "c_fc.weight", "c_proj.weight")  # nn.Linear there, Conv1D in GPT-2's
SIZES = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")


def read(path: Path) -> Source:
    """The model of a checkpoint, without a tokenizer: nanoGPT keeps that elsewhere.

    Raises:
        UserError: no torch, no such file, not such a checkpoint, or one that is no plain data.

    Source: github.com/karpathy/nanoGPT, model.py; its GELU is the exact one since May 2023.
    """
    try:
        import torch  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UserError(
            f"reading {path} needs torch, for its weights-only loader; install torch, or give the "
            f"model as safetensors"
        ) from None
    try:
        values = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except Exception as error:  # torch has no kind of its own for what it refuses
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise UserError(
            f"{path} is not a checkpoint of plain data, and no other is read: {reason}"
        ) from None
    args, state = (
        values.get(k) if isinstance(values, dict) else None for k in ("model_args", "model")
    )
    if not isinstance(args, dict) or not isinstance(state, dict):
        raise UserError(f"{path} is not nanoGPT's: it has no model_args and model")
    for name in SIZES:
        if type(args.get(name)) is not int:
            raise UserError(f"{path}: model_args {name}={args.get(name)!r} is not a whole number")
    bias = args.get("bias", True)
    if type(bias) is not bool:
        raise UserError(f"{path}: model_args bias={bias!r} is not true or false")
    config = ModelConfig(bias=bias, activation="gelu_erf", **{name: args[name] for name in SIZES})
    tensors: dict[str, Any] = {}
    for name, tensor in state.items():
        if not isinstance(tensor, torch.Tensor):
            raise UserError(f"{path}: {name} is no tensor")
        if ours := full_name(str(name).removeprefix("_orig_mod."), tied=True):
            tensors[ours] = tensor.T if ours.endswith(TURNED) and tensor.ndim == 2 else tensor

    def read_one(name: str) -> np.ndarray:
        return tensors[name].float().numpy()

    return Source(config, {name: tuple(x.shape) for name, x in tensors.items()}, read_one, None)
