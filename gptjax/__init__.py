"""GPT in JAX and Flax: the public API.

    import gptjax

    gptjax.train(gptjax.PRESETS["small"], "runs/small")
    run = gptjax.load("small")
    run.logits("the king")                       # (T, V)
    print("".join(run.generate("KING")))

Names are imported when they are first used, so `import gptjax` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

if TYPE_CHECKING:
    from gptjax.attention import attention_weights as attention_weights
    from gptjax.attention import causal_mask as causal_mask
    from gptjax.batches import Batch as Batch
    from gptjax.batches import Batches as Batches
    from gptjax.config import Config as Config
    from gptjax.config import DataConfig as DataConfig
    from gptjax.config import MeshConfig as MeshConfig
    from gptjax.config import ModelConfig as ModelConfig
    from gptjax.config import OptimConfig as OptimConfig
    from gptjax.errors import UserError as UserError
    from gptjax.generation.slots import generate as generate
    from gptjax.loss import cross_entropy as cross_entropy
    from gptjax.loss import next_token_loss as next_token_loss
    from gptjax.model import GPT as GPT
    from gptjax.model import MLP as MLP
    from gptjax.model import Block as Block
    from gptjax.model import CausalSelfAttention as CausalSelfAttention
    from gptjax.optim import make_optimizer as make_optimizer
    from gptjax.presets import PRESETS as PRESETS
    from gptjax.runs.loaded import LoadedRun as LoadedRun
    from gptjax.runs.loaded import load as load
    from gptjax.sampling import Sampling as Sampling
    from gptjax.step import TrainState as TrainState
    from gptjax.step import init_state as init_state
    from gptjax.step import repeat as repeat
    from gptjax.step import skip_nonfinite as skip_nonfinite
    from gptjax.step import train_step as train_step
    from gptjax.step import with_ema as with_ema
    from gptjax.text.tokenizers import ByteTokenizer as ByteTokenizer
    from gptjax.text.tokenizers import CharTokenizer as CharTokenizer
    from gptjax.text.tokenizers import Tokenizer as Tokenizer
    from gptjax.training import train as train

# Where each name is defined, in the order of a first look.
_PUBLIC = {
    "gptjax.config": ("Config", "ModelConfig", "DataConfig", "OptimConfig", "MeshConfig"),
    "gptjax.presets": ("PRESETS",),
    "gptjax.training": ("train",),
    "gptjax.runs.loaded": ("load", "LoadedRun"),
    "gptjax.generation.slots": ("generate",),
    "gptjax.sampling": ("Sampling",),
    "gptjax.model": ("GPT", "Block", "CausalSelfAttention", "MLP"),
    "gptjax.attention": ("attention_weights", "causal_mask"),
    "gptjax.step": (
        "TrainState",
        "init_state",
        "train_step",
        "skip_nonfinite",
        "with_ema",
        "repeat",
    ),
    "gptjax.loss": ("next_token_loss", "cross_entropy"),
    "gptjax.optim": ("make_optimizer",),
    "gptjax.batches": ("Batch", "Batches"),
    "gptjax.text.tokenizers": ("Tokenizer", "CharTokenizer", "ByteTokenizer"),
    "gptjax.errors": ("UserError",),
}
_MODULES = {name: module for module, names in _PUBLIC.items() for name in names}

__all__ = [*_MODULES, "__version__"]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'gptjax' has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
