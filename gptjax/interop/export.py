"""A run's weights for other tools: `python -m gptjax.interop.export RUN FOLDER`.

The folder is one that transformers loads, tokenizer included, and `train.py --init FOLDER` too.
"""

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import jax
import numpy as np
import safetensors.numpy
import tyro

from gptjax import cli
from gptjax.errors import UserError, one_line_errors
from gptjax.interop import hf_tokenizer
from gptjax.interop.hf import to_tensors
from gptjax.interop.hf_config import write_config
from gptjax.runs import folders, parts
from gptjax.runs.checkpoint import Checkpoints
from gptjax.runs.files import write_atomically
from gptjax.runs.run import Run


@dataclass(frozen=True)
class ExportCommand:
    """Write a run's weights and tokenizer as a folder that transformers loads."""

    run: Annotated[str, tyro.conf.Positional]
    """Name in runs/, or path of a run's folder."""
    folder: Annotated[Path, tyro.conf.Positional]
    """To write; new or empty."""
    checkpoint: str = "best"
    """best (by validation loss), last, or a step."""


def export(command: ExportCommand) -> str:
    """Write the folder.

    Returns:
        The class of transformers that the model is there.

    Raises:
        UserError: no such run or checkpoint, a model that transformers has no class for, a
            tokenizer it has no form for, or a folder that cannot be written or holds something.
    """
    run, folder = Run(folders.find(command.run)), command.folder
    rows = run.config.model.vocab_size or run.tokenizer.vocab_size
    config = replace(run.config.model, vocab_size=rows)
    about = write_config(config, run.tokenizer.end_of_text)
    files = hf_tokenizer.write(run.tokenizer, config.block_size)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} holds something already; give a folder that is new or empty")
    checkpoints = Checkpoints(run.checkpoints_path)
    step = run.choose(command.checkpoint, checkpoints.steps())
    params = jax.tree.map(np.asarray, checkpoints.load_params(step, parts.run_model(run)))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (folder / name).write_bytes(content)
        # The metadata tell transformers how the tensors are laid out.
        tensors = to_tensors(params, config)
        safetensors.numpy.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        write_atomically(folder / "config.json", json.dumps(about, indent=2) + "\n")
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"cannot write {folder}: {error}") from None
    return about["architectures"][0]


def main(argv: list[str]) -> None:
    """Export, and say how to load it."""
    command = cli.parse(ExportCommand, ExportCommand("", Path()), argv, "gptjax.interop.export", "")
    kind = export(command)
    print(f"wrote {command.folder}; to load it: transformers.{kind}.from_pretrained(...)")


if __name__ == "__main__":
    with one_line_errors("gptjax.interop.export"):
        main(sys.argv[1:])
