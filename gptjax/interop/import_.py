"""A run made of a pretrained model: the library of `gptjax import`.

The run is one that was stopped before its first step, with all parameters frozen, so that sampling,
verification, export and `--init` treat it like any other.
"""

from dataclasses import replace
from pathlib import Path

from gptjax.assembly import assemble
from gptjax.errors import UserError
from gptjax.interop import pretrained
from gptjax.presets import PRESETS
from gptjax.runs import folders, parts
from gptjax.runs.checkpoint import Checkpoints
from gptjax.runs.run import Run
from gptjax.text.sources import read_text
from gptjax.text.tokenizers import CharTokenizer

FIRST = {"step": 0, "seconds": 0.0}  # the only record


def import_model(
    source: str, name: str | None = None, *, block_size: int = 1024, text: str | None = None
) -> Path:
    """Write a run's folder from a pretrained model.

    Args:
        source: `gpt2`, `gpt2-medium`, `gpt2-large`, `gpt2-xl` or `hf:OWNER/NAME` from the Hugging
            Face hub; a folder with model.safetensors; a .gguf file; nanoGPT's ckpt.pt.
        name: of the run, in runs/; None: the model's.
        block_size: longest context in tokens, if the model's own is longer.
        text: what a character-level model without a tokenizer (nanoGPT's) was trained on.

    Returns:
        The folder.

    Raises:
        UserError: a model that cannot be loaded, no tokenizer for it, or a run that exists.
    """
    if name is None:
        on_hub = pretrained.on_hub(source)
        name = Path(on_hub[0]).name if on_hub else Path(source).stem
    directory = folders.new_directory(name, name)
    model = pretrained.load(source)
    tokenizer = model.tokenizer
    if tokenizer is None:
        if text is None:
            lacks, add = "comes without a tokenizer", ""
            if Path(source).is_dir():
                lacks = "has neither a tokenizer.json nor a tokenizer.model"
                add = "add the model's own, or if its tokens are characters "
            raise UserError(
                f"{source} {lacks}; {add}give the text that it was trained on as --text, for its "
                f"characters"
            )
        tokenizer = CharTokenizer.fit(read_text(text))
        pretrained.check_tokenizer(model, tokenizer)
    asked = PRESETS["finetune"]
    asked = replace(
        asked,
        init=source,
        model=replace(asked.model, block_size=block_size),
        optim=replace(asked.optim, freeze=".*"),
    )
    config, params = pretrained.fit(asked, model)
    setup = assemble(config, tokenizer.vocab_size, model=model.model)
    state, own = setup.start(params), parts.describe(model=setup.model)
    with folders.locked(directory):
        run = Run.create(directory, config, tokenizer, own, model.chat)
        checkpoints = Checkpoints(run.checkpoints_path)
        checkpoints.save(0, state, FIRST, run.texts)
        checkpoints.finish_save()
        run.log([FIRST])
    return directory
