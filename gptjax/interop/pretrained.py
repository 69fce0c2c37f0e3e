"""Load pretrained weights: from the Hugging Face hub, a folder, a file, or a gptjax run.

Only tensors and JSON are read, never pickles or model code.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_dtypes  # noqa: F401  registers bfloat16 with numpy, for safetensors
import numpy as np
import safetensors

from gptjax.config import OF_A_LOADED_MODEL, Config, ModelConfig
from gptjax.errors import UserError, optional_import
from gptjax.interop import gguf, hf_chat, hf_tokenizer, nanogpt
from gptjax.interop.gemma import Gemma, GemmaConfig
from gptjax.interop.hf import Source, add, to_params
from gptjax.interop.hf_config import read_config
from gptjax.model import Model
from gptjax.runs import folders, parts
from gptjax.runs.checkpoint import Checkpoints
from gptjax.runs.files import read_file, unique_json
from gptjax.runs.run import Run
from gptjax.text import choose
from gptjax.text.tokenizers import Tokenizer

GPT2 = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
GPT2_VOCAB = (50257, 50304)  # GPT-2's vocabulary size; nanoGPT pads it to a multiple of 64
HUB = "hf:"  # prefix of OWNER/NAME
FILES = (
    *("config.json", "model*.safetensors*"),
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json"),
    *("chat_template.jinja", "generation_config.json", "special_tokens_map.json"),
)
COMMIT = re.compile(r"[0-9a-f]{40}")
DTYPES = ("F64", "F32", "F16", "BF16")  # supported dtypes, in safetensors' spelling
MASKS = ("BOOL", "U8")  # of the causal masks in old GPT-2 files
PICKLES = (".bin", ".pkl", ".pickle", ".pth", ".ckpt")


class Pretrained(NamedTuple):
    """A pretrained model.

    Attributes:
        name: the argument of `load`; a name on the hub with `@` and the commit that it was.
        config: the model's config, with vocab_size.
        params: the parameter tree of `model.py`, numpy float32.
        tokenizer: None: it has none (nanoGPT).
        chat: the text of a run's chat.json; None: there is nothing to say in it.
        gemma: what the model has beside its config, if it is a Gemma.
    """

    name: str
    config: ModelConfig
    params: Any
    tokenizer: Tokenizer | None
    chat: str | None = None
    gemma: GemmaConfig | None = None

    @property
    def model(self) -> Model | None:
        """What makes the model of its config; None: it is the config's."""
        return self.gemma and partial(Gemma, gemma=self.gemma)


def load(name: str) -> Pretrained:
    """Load the model that `--init` names.

    Args:
        name: see `Config.init`; GPT-2's names refer to the hub even if a run has the same name.

    Raises:
        UserError: no such model, no connection, a pickle, a corrupt file, an architecture that
            is not one of `hf_config.CLASSES`, or an unsupported setting.
    """
    path = Path(name)
    try:
        special = path.exists() and not path.is_file() and not path.is_dir()
    except OSError as error:  # such as a name that is too long
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    if special or (path.suffix in (".gguf", ".pt") and path.is_dir()):
        raise UserError(f"{path} is not a regular file; give the file of a model")
    if on_hub(name):
        folder = download(*on_hub(name))
        source = read_folder(folder)
        if COMMIT.fullmatch(folder.name):
            name = f"{name.partition('@')[0]}@{folder.name}"
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
    if tokenizer is None and source.config.vocab_size in GPT2_VOCAB:
        tokenizer = choose.gpt2()
    vocab_size = source.config.vocab_size or 0
    with _naming(name):
        if tokenizer is not None and tokenizer.vocab_size > vocab_size:
            raise UserError(
                f"its tokenizer has {tokenizer.vocab_size} tokens, more than the model's "
                f"vocabulary size {vocab_size}"
            )
        chat = source.chat and source.chat.to_json()
        return Pretrained(name, source.config, to_params(source), tokenizer, chat, source.gemma)


def on_hub(name: str) -> tuple[str, ...]:
    """The repository, and the revision if one is named: of "gpt2", "hf:OWNER/NAME", or of either
    with "@REVISION" (a branch, a tag or a commit); empty: the name is not one on the hub.

    Raises:
        UserError: "@" without a revision.
    """
    model, at, revision = name.partition("@")
    if model not in GPT2 and not model.startswith(HUB):
        return ()
    if at and not revision:
        raise UserError(f"{name} names no revision; give one after the @, or leave the @ out")
    repository = f"openai-community/{model}" if model in GPT2 else model.removeprefix(HUB)
    return (repository, revision) if revision else (repository,)


def pinned(init: str | None, recorded: str | None) -> str | None:
    """`init`, or the recorded name of the same model where only that one has the commit."""
    model, _, commit = (recorded or "").partition("@")
    return recorded if init == model and on_hub(model) and COMMIT.fullmatch(commit) else init


def fit(config: Config, pretrained: Pretrained) -> tuple[Config, Any]:
    """Combine a run's config with a pretrained model.

    The model section becomes the pretrained one, except for `OF_A_LOADED_MODEL` (dropout, dtype,
    remat, ...) and block_size, which is at most the pretrained one; learned positions are cropped
    to it.

    Returns:
        The run's config, whose `init` names the commit of a model on the hub, and its initial
        parameters.
    """
    asked, own = config.model, pretrained.config
    block = min(asked.block_size, own.block_size)
    free = {name: getattr(asked, name) for name in OF_A_LOADED_MODEL}
    model = replace(own, **free | {"block_size": block})
    params = pretrained.params
    if "wpe" in params:
        params = {**params, "wpe": params["wpe"][:block]}
    return replace(config, model=model, init=pretrained.name), params


def origin(config: Config, pretrained: Pretrained) -> str:
    """One line for the console: the source of the weights, and the context length if it changes."""
    asked, own = config.model.block_size, pretrained.config.block_size
    if asked < own:
        return f"starting from {pretrained.name}, context cropped from {own} to {asked} tokens"
    limit = f", whose context is {own} tokens, not {asked}" if asked > own else ""
    return f"starting from {pretrained.name}{limit}"


def initial(config: Config) -> Any:
    """Load a run's initial parameters again; None: they were initialised from the seed."""
    return None if config.init is None else fit(config, load(config.init))[1]


def check_tokenizer(pretrained: Pretrained, tokenizer: Tokenizer) -> None:
    """Check that a tokenizer made for a model without one has the model's vocabulary size.

    Raises:
        UserError: it has not.
    """
    expected = pretrained.config.vocab_size
    if pretrained.tokenizer is None and tokenizer.vocab_size != expected:
        raise UserError(
            f"{pretrained.name} has no tokenizer and a vocabulary of {expected}, but this text's "
            f"tokenizer has {tokenizer.vocab_size} tokens; give the text that it was trained on"
        )


def read_folder(folder: Path) -> Source:
    """Open a folder written by transformers: config.json, model.safetensors (or its shards and
    index), and optionally tokenizer.json or tokenizer.model.

    Raises:
        UserError: a missing or corrupt file, a pickle, or an unsupported model.
    """
    values = _json(folder / "config.json")
    with _naming(folder / "config.json"):
        config, gemma = read_config(values)
    index, parts = folder / "model.safetensors.index.json", {}
    if (folder / "adapter_config.json").exists():
        raise UserError(f"{folder} has an adapter beside the weights; merge it into them first")
    if (folder / "model.safetensors").exists():
        names = ["model.safetensors"]
    elif index.exists():
        parts = _json(index).get("weight_map")
        if not isinstance(parts, dict) or not all(isinstance(x, str) for x in parts.values()):
            raise UserError(f"{index} has no weight_map of file names")
        names = sorted(set(parts.values()))
        if any(Path(name).name != name for name in names):
            raise UserError(f"{index} refers to files outside its folder")
    elif pickles := sorted(folder.glob("pytorch_model*.bin")):
        raise _pickle(pickles[0])
    else:
        raise UserError(f"{folder} has no model.safetensors")
    where: dict[str, tuple[Any, str]] = {}
    for name in names:
        path = folder / name
        if not path.is_file():
            raise UserError(f"{path} is missing")
        file = _safetensors(path)
        with _naming(path):
            for theirs in file.keys():
                kind = file.get_slice(theirs).get_dtype()
                if kind not in DTYPES and not (kind in MASKS and theirs.endswith(".attn.bias")):
                    raise UserError(
                        f"the tensor {theirs} has dtype {kind}, expected one of {', '.join(DTYPES)}"
                    )
                add(where, theirs, (file, theirs))
        for theirs, place in parts.items():
            if place == name and theirs not in file.keys():
                raise UserError(f"{index} says that {theirs} is in {name}, which lacks it")
    shapes = {name: tuple(file.get_slice(x).get_shape()) for name, (file, x) in where.items()}
    read = lambda name: where[name][0].get_tensor(where[name][1])
    size = sum((folder / name).stat().st_size for name in names)
    tokenizer = hf_tokenizer.read(folder)
    chat = hf_chat.read(folder, tokenizer)
    return Source(config, shapes, read, size, tokenizer, chat, gemma)


def _safetensors(path: Path) -> Any:
    """Open a file, whose header must name each tensor once: the library takes the last one."""
    try:
        file = safetensors.safe_open(path, framework="numpy")
        with path.open("rb") as raw:
            length = int.from_bytes(raw.read(8), "little")  # the library has checked it
            unique_json(raw.read(length).decode())
    except OSError as error:
        raise UserError(f"cannot read {path}: {error}") from None
    except (safetensors.SafetensorError, ValueError) as error:
        raise UserError(f"{path} is not a valid safetensors file: {error}") from None
    return file


def download(repository: str, revision: str | None = None) -> Path:
    """Download a model from the hub, unless it is cached.

    Args:
        repository: OWNER/NAME.
        revision: a branch, a tag or a commit; None: the newest of the main branch.

    Returns:
        Its folder, which the hub's library names after the commit.

    Raises:
        UserError: no huggingface_hub, no connection, or no such model.
    """
    hub = optional_import("huggingface_hub", "hf")
    try:
        folder = hub.snapshot_download(repository, revision=revision, allow_patterns=list(FILES))
        return Path(folder)
    except Exception as error:  # from the library, its HTTP client, or the system
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        at = f"@{revision}" if revision else ""
        raise UserError(
            f"{repository}{at} could not be downloaded from the Hugging Face hub ({reason}); "
            f"without a network, give the folder of a copy"
        ) from None


def _load_run(name: str) -> Pretrained:
    """Load the best checkpoint of a gptjax run."""
    try:
        run = Run(folders.find(name))
    except UserError as error:
        raise UserError(
            f"no model {name}: {error}; or give {', '.join(GPT2)}, hf:OWNER/NAME, a folder with "
            f"model.safetensors, a .gguf file, or nanoGPT's ckpt.pt"
        ) from None
    checkpoints = Checkpoints(run.checkpoints_path)
    model, choose = parts.run_model(run), lambda steps: run.choose("best", steps)
    params = checkpoints.read(choose, lambda step: checkpoints.load_params(step, model))
    params = jax.tree.map(np.asarray, params)
    vocab_size = run.config.model.vocab_size or run.tokenizer.vocab_size
    config = replace(run.config.model, vocab_size=vocab_size)
    gemma = model.gemma if isinstance(model, Gemma) else None
    return Pretrained(name, config, params, run.tokenizer, run.chat, gemma)


def _is_run(folder: Path) -> bool:
    return "format" in _json(folder / "config.json")


def _json(path: Path) -> dict[str, Any]:
    """Read a JSON object."""
    values = read_file(path, unique_json)
    if not isinstance(values, dict):
        raise UserError(f"{path} is damaged: expected a JSON object")
    return values


@contextmanager
def _naming(where: Any) -> Iterator[None]:
    """Prefix the message of a `UserError` with `where`."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _pickle(path: Path) -> UserError:
    return UserError(
        f"{path} is a pickle, which can execute code when loaded, so it is not read; save the "
        f"model as safetensors (transformers' save_pretrained does)"
    )
