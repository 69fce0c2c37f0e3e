"""What a model costs and what the machine can give: parameters, FLOPs, matmul peak."""

import os
import platform
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from gptjax.config import ModelConfig


def count_params(params: Any) -> int:
    """Number of parameters in a pytree of arrays or shapes."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def flops_per_token(config: ModelConfig, params: Any) -> int:
    """Floating-point operations of forward and backward, per token of a full window.

    6 for each parameter that is multiplied with, and 12 L C T for attention's two products, the
    masked half counted too (12 L C window, where there is one). Lookups (wpe, an untied wte) cost
    nothing; a model other than GPT is not counted (0).

    Source: Chowdhery et al. 2022 (PaLM), appendix B.
    """
    if "h" not in params:
        return 0
    kernels = count_params({"h": params["h"], "head": params.get("lm_head", {})})
    tied = params["wte"]["embedding"].size if config.tie_head else 0
    seen = min(config.window or config.block_size, config.block_size)
    attention = 12 * config.n_layer * config.n_embd * seen
    return 6 * (kernels + tied) + attention


def will_memorise(n_tokens: int, n_params: int, passes: float) -> bool:
    """Whether a model is likely to learn its text by heart: a rule of thumb.

    Args:
        n_tokens: that train.
        n_params: of the model.
        passes: how often it reads them.

    Source: Muennighoff et al. 2023: up to 4 passes a repeated text is worth nearly as much as a
    new one, past about 16 next to nothing. That the model can hold it, with a parameter or more
    for each token, is our part of the rule.
    """
    return passes > 16 and n_params > n_tokens


def processor() -> str:
    """Name and core count of this machine's CPU."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = (line.partition(":") for line in cpuinfo.read_text().splitlines())
        name = next((v.strip() for k, _, v in lines if k.strip() == "model name"), name)
    return f"{name}, {os.cpu_count()} cores"


def matmul_peak(dtype: str) -> float:
    """FLOP/s of a large square matmul on one device, the best of a few: about 0.2 s on a CPU."""
    n = 1024 if jax.default_backend() == "cpu" else 8192
    a = jnp.ones((n, n), dtype)
    return 2 * n**3 / _best_seconds(jax.jit(jnp.matmul), a, a)


def memory_rate() -> float:
    """Bytes/s that one device reads and writes, the best of a few, adding 1 to 256 MB."""
    x = jnp.ones(2**26, jnp.float32)
    return 2 * x.nbytes / _best_seconds(jax.jit(lambda x: x + 1), x)


def _best_seconds(function: Any, *arguments: jax.Array) -> float:
    """Of eight calls, after one that compiles."""
    function(*arguments).block_until_ready()
    seconds = []
    for _ in range(8):
        start = time.perf_counter()
        function(*arguments).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return min(seconds)
