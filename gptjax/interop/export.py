"""A run's weights for other tools: the library of `gptjax export`.

transformers loads the folder, tokenizer included, and so does `gptjax train --init FOLDER`.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from gptjax.errors import UserError
from gptjax.generation.chat import ChatFormat
from gptjax.interop import hf_chat, hf_tokenizer
from gptjax.interop.gemma import Gemma
from gptjax.interop.hf import to_tensors
from gptjax.interop.hf_config import write_config
from gptjax.model import GPT, Model
from gptjax.runs import parts
from gptjax.runs.checkpoint import Checkpoints
from gptjax.runs.files import write_atomically
from gptjax.runs.run import Run
from gptjax.text import special_tokens


def export(
    directory: Path, folder: Path, checkpoint: str = "best", *, model: Model | None = None
) -> str:
    """Write a run's weights and tokenizer as a folder.

    Args:
        directory: of the run.
        folder: to write; new or empty.
        checkpoint: "best" by validation loss, "last", or a step.
        model: your own, if the run was trained with one, of the config's parameter tree; None: the
            config's.

    Returns:
        The class of transformers that loads the model.

    Raises:
        UserError: no such checkpoint, a model that transformers has no class for, a tokenizer that
            it has no format for, or a folder that cannot be written or is not empty.
    """
    run = Run(directory)
    rows = run.config.model.vocab_size or run.tokenizer.vocab_size
    config = replace(run.config.model, vocab_size=rows)
    made = parts.run_model(run, model)
    gemma = made.gemma if isinstance(made, Gemma) else None
    about = write_config(config, run.tokenizer.end_of_text, gemma)
    if bos := special_tokens.of(run.tokenizer)[0].tolist():
        about["bos_token_id"] = bos[-1]
    files = hf_tokenizer.write(run.tokenizer, config.block_size)
    if run.chat is not None:
        form = ChatFormat.from_json(run.chat)
        files = hf_chat.write(form, files)
        about["eos_token_id"] = list(form.stop_tokens) or about["eos_token_id"]
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} holds something already; give a folder that is new or empty")
    if gemma is None and _shapes(made) != _shapes(GPT(config, rows)):
        raise UserError(
            f"{directory} was trained with the model {type(made).__name__}, whose parameters are "
            f"not those of gptjax's GPT; only these can be exported"
        )
    checkpoints = Checkpoints(run.checkpoints_path)
    choose = lambda steps: run.choose(checkpoint, steps)
    params = checkpoints.read(choose, lambda step: checkpoints.load_params(step, made))
    params = jax.tree.map(np.asarray, params)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (folder / name).write_bytes(content)
        # The metadata tell transformers how the tensors are laid out.
        tensors = to_tensors(params, config, gemma)
        safetensors.numpy.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        write_atomically(folder / "config.json", json.dumps(about, indent=2) + "\n")
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"cannot write {folder}: {error}") from None
    return about["architectures"][0]


def _shapes(model: nn.Module) -> Any:
    """The shape of each parameter."""
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
    return jax.tree.map(lambda leaf: leaf.shape, params)
