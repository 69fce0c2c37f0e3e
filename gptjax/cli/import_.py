"""`gptjax import`."""

import shlex
from dataclasses import dataclass, field

from gptjax.cli.flags import POSITIONAL, parse
from gptjax.errors import visible
from gptjax.runs.folders import run_flag, run_name


@dataclass(frozen=True)
class ImportCommand:
    """Make a run of a pretrained model, to sample from, verify, export or fine-tune."""

    model: str = field(metadata=POSITIONAL)
    """gpt2, gpt2-medium, gpt2-large, gpt2-xl or hf:OWNER/NAME from the Hugging Face hub, with
    @REVISION if not the newest; a folder with model.safetensors; a .gguf file; nanoGPT's
    ckpt.pt."""
    run: str | None = None
    """Name of the run's folder in runs/; None: the model's name."""
    block_size: int = 1024
    """Longest context, if the model's own is longer; sampling allocates a KV cache of this size."""
    text: str | None = None
    """The text that a character-level model without a tokenizer (nanoGPT's) was trained on."""


def main(argv: list[str], prog: str) -> None:
    """Import, and say what to do next; jax is imported once the arguments are understood."""
    command = parse(ImportCommand, None, argv, prog)
    from gptjax.interop.import_ import import_model

    directory = import_model(
        command.model, command.run, block_size=command.block_size, text=command.text
    )
    name = shlex.quote(run_name(directory))
    print(
        visible(
            f"written to {directory}; next: gptjax sample {run_flag(directory)}, or "
            f"gptjax train --init {name}"
        )
    )
