"""Make a pretrained model a run: `python -m gptjax.interop.import_ gpt2`, then `python sample.py`.

The run is one that was stopped before its first step, all of it frozen: sample.py, verify, export
and `train.py --init` take it like any other.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import tyro

from gptjax import cli
from gptjax.assembly import assemble
from gptjax.errors import UserError, one_line_errors
from gptjax.interop import pretrained
from gptjax.presets import PRESETS
from gptjax.runs import folders
from gptjax.runs.checkpoint import Checkpoints
from gptjax.runs.folders import run_name
from gptjax.runs.run import Run
from gptjax.text.sources import read_text
from gptjax.text.tokenizers import CharTokenizer

FIRST = {"step": 0, "seconds": 0.0}  # the only record


@dataclass(frozen=True)
class AdoptCommand:
    """Make a pretrained model a run of ours."""

    model: Annotated[str, tyro.conf.Positional]
    """gpt2, gpt2-medium, gpt2-large, gpt2-xl or hf:OWNER/NAME from the Hugging Face hub; a folder
    with model.safetensors; a .gguf file; nanoGPT's ckpt.pt."""
    run: str | None = None
    """Name of the run's folder in runs/ (None: the model's)."""
    block_size: int = 1024
    """Longest context, if the model's own is longer: sampling keeps room for so many tokens."""
    text: str | None = None
    """For a model of characters that comes without a tokenizer (nanoGPT's): the text that it was
    trained on."""


def adopt(command: AdoptCommand) -> Path:
    """Write the run's folder.

    Returns:
        The folder.

    Raises:
        UserError: a model that cannot be loaded, no tokenizer for it, or a run that is there.
    """
    name = command.run or Path(command.model.removeprefix(pretrained.HUB)).stem
    directory = folders.new_directory(name, name)
    model = pretrained.load(command.model)
    tokenizer = model.tokenizer
    if tokenizer is None:
        if command.text is None:
            raise UserError(
                f"{command.model} comes without a tokenizer; give the text that it was trained "
                f"on as --text, for its characters"
            )
        tokenizer = CharTokenizer.fit(read_text(command.text))
        pretrained.check_tokenizer(model, tokenizer)
    asked = PRESETS["finetune"]
    asked = replace(
        asked,
        init=command.model,
        model=replace(asked.model, block_size=command.block_size),
        optim=replace(asked.optim, freeze=".*"),
    )
    config, params = pretrained.fit(asked, model)
    state = assemble(config, tokenizer.vocab_size).start(params)
    with folders.locked(directory):
        run = Run.create(directory, config, tokenizer)
        checkpoints = Checkpoints(run.checkpoints_path)
        checkpoints.save(0, state, FIRST, run.texts)
        checkpoints.finish_save()
        run.log([FIRST])
    return directory


def main(argv: list[str]) -> None:
    """Adopt, and say what to do next."""
    command = cli.parse(AdoptCommand, AdoptCommand(""), argv, "gptjax.interop.import_", "")
    directory = adopt(command)
    name = run_name(directory)
    print(f"kept in {directory}; next: python sample.py --run {name}, or train.py --init {name}")


if __name__ == "__main__":
    with one_line_errors("gptjax.interop.import_"):
        main(sys.argv[1:])
