"""gptjax: a small, honest GPT in JAX and Flax. Import the rooms you need, e.g. `gptjax.model`."""

__version__ = "0.1.0"
