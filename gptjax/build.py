"""From a config to the module it describes."""

import flax.linen as nn

from gptjax.attention import Attend
from gptjax.config import ModelConfig
from gptjax.errors import UserError
from gptjax.lecture.models import Attention, Averaging, FeedForward
from gptjax.model import GPT, Bigram

MODELS = {
    "gpt": GPT,
    "bigram": Bigram,
    "averaging": Averaging,
    "attention": Attention,
    "feedforward": FeedForward,
}


def build_model(config: ModelConfig, vocab_size: int, attend: Attend | None = None) -> nn.Module:
    """The module that `config` describes.

    Args:
        config: the network.
        vocab_size: the tokenizer's; `config.vocab_size` may be larger (padding).
        attend: a GPT's kernel of attention, from `kernels.py`; None: the plain one.

    Raises:
        UserError: the table has fewer rows than the tokenizer has tokens.
    """
    rows = config.vocab_size or vocab_size
    if rows < vocab_size:
        raise UserError(
            f"model.vocab_size={rows} is less than the tokenizer's {vocab_size} tokens; "
            f"leave it out, or give {vocab_size} or more"
        )
    if config.kind == "gpt":
        return GPT(config, rows, attend)
    return MODELS[config.kind](config, rows)
