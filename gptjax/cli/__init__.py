"""The commands: `gptjax NAME`, of which `train.py` and `sample.py` are fronts.

One module for each command. None imports jax before it has understood its arguments.
"""

from gptjax.cli.flags import parse as parse
