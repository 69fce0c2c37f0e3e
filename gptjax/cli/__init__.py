"""The commands: `gptjax NAME`, of which `train.py` and `sample.py` are fronts.

One module for each command. None imports jax before it has understood its arguments.
"""

from importlib import import_module
from typing import Any

from gptjax.cli.flags import parse as parse

_MOVED = {
    **{name: "train" for name in ("TrainCommand", "parse_train")},
    **{name: "sample" for name in ("SampleCommand", "parse_sample", "read_prompt")},
}


def __getattr__(name: str) -> Any:
    """`gptjax.cli.SampleCommand` and the like, without the cost of importing them for `--help`."""
    if name in _MOVED:
        return getattr(import_module(f"gptjax.cli.{_MOVED[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
