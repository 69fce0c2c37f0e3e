"""Weights to start from, wherever they lie: on the hub, in a folder, a file, a run of ours.

Numbers are read and nothing is executed: no pickle, no code of a model.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_dtypes  # noqa: F401  with it numpy knows bfloat16, by the name that safetensors uses
import numpy as np
import safetensors

from gptjax.config import OF_A_LOADED_MODEL, Config, ModelConfig
from gptjax.errors import UserError, optional_import
from gptjax.interop import gguf, hf_tokenizer, nanogpt
from gptjax.interop.hf import Source, full_name, to_params
from gptjax.interop.hf_config import read_config
from gptjax.runs import folders, parts
from gptjax.runs.checkpoint import Checkpoints
from gptjax.runs.files import read_file
from gptjax.runs.run import Run
from gptjax.text import choose
from gptjax.text.tokenizers import Tokenizer

GPT2 = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
GPT2_ROWS = (50257, 50304)  # of GPT-2's table; nanoGPT fills it up to a multiple of 64
HUB = "hf:"  # before OWNER/NAME
WANTED = ("config.json", "model*.safetensors*", "tokenizer.json", "tokenizer.model")
DTYPES = ("F64", "F32", "F16", "BF16")  # of tensors, as safetensors calls them
PICKLES = (".bin", ".pkl", ".pickle", ".pth", ".ckpt")


class Pretrained(NamedTuple):
    """A model that was trained before.

    Attributes:
        name: what `load` was given.
        config: of the model, with its vocab_size.
        params: the tree of `model.py`, numpy, float32.
        tokenizer: None: it comes without one (nanoGPT's).
    """

    name: str
    config: ModelConfig
    params: Any
    tokenizer: Tokenizer | None


def load(name: str) -> Pretrained:
    """The model that `--init` names.

    Args:
        name: see `Config.init`; GPT-2's names mean the hub, whatever runs there are.

    Raises:
        UserError: nothing is there, no connection, a pickle, damage, a model that is no GPT-2 or
            Llama, or one with a setting that is not supported.
    """
    path = Path(name)
    if name in GPT2 or name.startswith(HUB):
        repository = f"openai-community/{name}" if name in GPT2 else name.removeprefix(HUB)
        source = read_folder(download(repository))
    elif path.suffix in PICKLES:
        raise _pickle(path)
    elif path.suffix == ".gguf":
        source = gguf.read(path)
    elif path.suffix == ".pt":
        source = nanogpt.read(path)
    elif path.is_dir() and not _is_run(path):
        source = read_folder(path)
    else:
        return _load_run(name)
    tokenizer = source.tokenizer
    if tokenizer is None and source.config.vocab_size in GPT2_ROWS:
        tokenizer = choose.gpt2()
    rows = source.config.vocab_size or 0
    with _naming(name):
        if tokenizer is not None and tokenizer.vocab_size > rows:
            raise UserError(
                f"its tokenizer has {tokenizer.vocab_size} tokens, more than the {rows} of the "
                f"model"
            )
        return Pretrained(name, source.config, to_params(source), tokenizer)


def fit(config: Config, pretrained: Pretrained) -> tuple[Config, Any]:
    """The config of a run that starts from a model, and the parameters it starts with.

    Of the config's model, block_size (at most the model's own), dropouts, dtype and remat are
    kept. Learned positions are cropped to block_size.
    """
    asked, own = config.model, pretrained.config
    block = min(asked.block_size, own.block_size)
    free = {name: getattr(asked, name) for name in OF_A_LOADED_MODEL}
    model = replace(own, **free | {"block_size": block})
    params = pretrained.params
    if "wpe" in params:
        params = {**params, "wpe": params["wpe"][:block]}
    return replace(config, model=model), params


def origin(config: Config, pretrained: Pretrained) -> str:
    """Where the weights of a run come from, and what becomes of their context."""
    asked, own = config.model.block_size, pretrained.config.block_size
    if asked < own:
        return f"starting from {config.init}; of its context of {own} tokens, {asked} are used"
    more = f"; its context is {own} tokens, not {asked}" if asked > own else ""
    return f"starting from {config.init}{more}"


def initial(config: Config) -> Any:
    """The parameters that a run started with, read again; None: they were drawn from the seed."""
    return None if config.init is None else fit(config, load(config.init))[1]


def check_tokenizer(pretrained: Pretrained, tokenizer: Tokenizer) -> None:
    """See that the tokenizer for a model that came without one can be its own.

    Raises:
        UserError: it has another number of tokens.
    """
    rows = pretrained.config.vocab_size
    if pretrained.tokenizer is None and tokenizer.vocab_size != rows:
        raise UserError(
            f"{pretrained.name} comes without a tokenizer and knows {rows} tokens, and those of "
            f"this text are {tokenizer.vocab_size}; give the text that it was trained on"
        )


def read_folder(folder: Path) -> Source:
    """A model that transformers has saved: config.json, model.safetensors (or its parts and their
    index) and, if it is there, tokenizer.json or tokenizer.model.

    Raises:
        UserError: a file is missing or damaged, a pickle, or a model that is not supported.
    """
    values = _json(folder / "config.json")
    with _naming(folder / "config.json"):
        config = read_config(values)
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").exists():
        names = ["model.safetensors"]
    elif index.exists():
        parts = _json(index).get("weight_map")
        if not isinstance(parts, dict) or not all(isinstance(x, str) for x in parts.values()):
            raise UserError(f"{index} has no weight_map of names")
        names = sorted(set(parts.values()))
        if any(Path(name).name != name for name in names):
            raise UserError(f"{index} names files outside of its folder")
    elif pickles := sorted(folder.glob("pytorch_model*.bin")):
        raise _pickle(pickles[0])
    else:
        raise UserError(f"{folder} has no model.safetensors")
    shapes: dict[str, tuple[int, ...]] = {}
    where: dict[str, tuple[Any, str]] = {}
    for name in names:
        path = folder / name
        if not path.exists():
            raise UserError(f"{path} is missing")
        try:
            file = safetensors.safe_open(path, framework="numpy")
        except OSError as error:
            raise UserError(f"cannot read {path}: {error}") from None
        except safetensors.SafetensorError as error:
            raise UserError(f"{path} is not a sound safetensors file: {error}") from None
        for theirs in file.keys():
            about = file.get_slice(theirs)
            if about.get_dtype() not in DTYPES:
                raise UserError(
                    f"{path}: the tensor {theirs} is {about.get_dtype()}, expected one of "
                    f"{', '.join(DTYPES)}"
                )
            if full := full_name(theirs, config.tie_head):
                shapes[full] = tuple(about.get_shape())
                where[full] = file, theirs
    read = lambda name: where[name][0].get_tensor(where[name][1])
    return Source(config, shapes, read, hf_tokenizer.read(folder))


def download(repository: str) -> Path:
    """The folder where Hugging Face's library keeps a model of the hub.

    Raises:
        UserError: no library, no connection, or no such model.
    """
    hub = optional_import("huggingface_hub", "hf")
    try:
        return Path(hub.snapshot_download(repository, allow_patterns=list(WANTED)))
    except Exception as error:  # of the library, of its HTTP client, of the system
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise UserError(
            f"{repository} cannot be had from the Hugging Face hub ({reason}); where there is no "
            f"network, give the folder of a copy"
        ) from None


def _load_run(name: str) -> Pretrained:
    """The best checkpoint of a run of ours."""
    try:
        run = Run(folders.find(name))
    except UserError as error:
        raise UserError(
            f"{name} is no model to start from: {error}; others are {', '.join(GPT2)}, "
            f"hf:OWNER/NAME, a folder with model.safetensors, a .gguf file, nanoGPT's ckpt.pt"
        ) from None
    checkpoints = Checkpoints(run.checkpoints_path)
    params = checkpoints.load_params(run.choose("best", checkpoints.steps()), parts.run_model(run))
    params = jax.tree.map(np.asarray, params)
    rows = run.config.model.vocab_size or run.tokenizer.vocab_size
    return Pretrained(name, replace(run.config.model, vocab_size=rows), params, run.tokenizer)


def _is_run(folder: Path) -> bool:
    return "format" in _json(folder / "config.json")


def _json(path: Path) -> dict[str, Any]:
    """An object in a small file."""
    values = read_file(path, json.loads)
    if not isinstance(values, dict):
        raise UserError(f"{path} is damaged: expected a JSON object")
    return values


@contextmanager
def _naming(where: Any) -> Iterator[None]:
    """Say where it was."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _pickle(path: Path) -> UserError:
    return UserError(
        f"{path} is a pickle, which can run any code when it is read, and is not; save the model "
        f"as safetensors (save_pretrained of transformers does)"
    )
