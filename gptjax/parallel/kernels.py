"""Fused attention kernels, which never materialise the (T, T) scores: cuDNN flash attention on
NVIDIA GPUs, Pallas splash attention on TPUs. Elsewhere XLA compiles plain attention.

Neither kernel supports attention dropout or cached decoding (one query at a time); both use plain
attention. Letters as in `model.py`.
"""

import functools
import logging
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from gptjax.attention import Kernel, causal_attention
from gptjax.config import ModelConfig
from gptjax.errors import UserError

log = logging.getLogger(__name__)
BLOCKS = 512, 256, 128  # block sizes in positions; 128 is the number of a TPU's lanes
CUDNN_HEAD_SIZES = 128, 8  # largest head size supported on every GPU, and its required divisor


def make_kernel(config: ModelConfig, mesh: Mesh) -> Kernel | None:
    """The kernel that `config.attention` asks for, on the devices of a mesh.

    Args:
        config: the model's.
        mesh: from `sharding.make_mesh`; each device computes its own rows and heads.

    Returns:
        Causal attention: q (B, T, H, D), k and v (B, T, G, D) -> (B, T, H, D). None: plain
        attention, which "auto" also selects where no kernel fits.

    Raises:
        UserError: a kernel requested by name that these devices or this model cannot use.
    """
    device = mesh.devices.flat[0]
    by_kind = {"tpu": "splash", "gpu": "cudnn"}
    name = by_kind.get(device.platform) if config.attention == "auto" else config.attention
    if name is None or name == "plain":
        return None
    if reason := _unfit(name, config, device):
        if config.attention == "auto":
            return None
        raise UserError(f"model.attention={name} {reason}; give plain or auto")
    kernel = {"splash": splash, "cudnn": cudnn}[name]
    if device in jax.devices() and (reason := failure(kernel, config)):
        if config.attention == "auto":
            log.warning(
                "%s attention does not work here, so plain attention is used: %s", name, reason
            )
            return None
        raise UserError(
            f"model.attention={name} does not work on this {device.device_kind}: {reason}; give "
            f"plain or auto"
        )
    # XLA cannot partition a kernel. Key and value heads may be too few for the tensor axis.
    heads = P(("data", "fsdp"), None, "tensor", None)
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    shared = (config.n_kv_head or config.n_head) % mesh.shape["tensor"] == 0

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        B, T, H = q.shape[:3]
        if T % BLOCKS[-1] or B % ways:  # such as the single token used for init
            return causal_attention(q, k, v)
        if not shared:
            k, v = (jnp.repeat(x, H // x.shape[2], axis=2) for x in (k, v))
        if mesh.size == 1:
            return kernel(q, k, v)
        specs = {"in_specs": (heads, heads, heads), "out_specs": heads}
        return jax.shard_map(kernel, mesh=mesh, check_vma=False, **specs)(q, k, v)

    return Kernel(attend)


def _unfit(name: str, config: ModelConfig, device: Any) -> str | None:
    """Reason why a kernel cannot compute this attention on a device; None: it can."""
    if share := config.dropped_attention:
        return f"does not support attention dropout, and it is {share}"
    if config.window is not None:
        return f"has no sliding window, and model.window is {config.window}"
    if config.block_size % BLOCKS[-1]:
        return (
            f"needs a model.block_size that is a multiple of {BLOCKS[-1]}, and it is "
            f"{config.block_size}"
        )
    if name == "splash":
        if device.platform != "tpu":
            return f"runs on TPUs, and this is a {device.device_kind}"
        return None
    if device.platform != "gpu" or "NVIDIA" not in device.device_kind:
        return f"runs on NVIDIA GPUs, and this is a {device.device_kind}"
    if config.dtype != "bfloat16":
        return f"needs model.dtype=bfloat16, and it is {config.dtype}"
    largest, multiple = CUDNN_HEAD_SIZES
    if config.head_size > largest or config.head_size % multiple:
        return (
            f"needs a head size n_embd / n_head that is a multiple of {multiple} up to {largest}, "
            f"and it is {config.head_size}"
        )
    return None


@functools.cache
def failure(kernel: Callable[..., jax.Array], config: ModelConfig) -> str | None:
    """What a kernel answers when its forward and backward pass are tried on this machine's devices,
    such as versions of CUDA and cuDNN that do not go together; None: it works."""
    shape = (1, config.block_size, 1, config.head_size)
    inputs = [jnp.ones(shape, config.dtype)] * 3
    try:
        total = lambda *inputs: kernel(*inputs).astype(jnp.float32).sum()
        jax.block_until_ready(jax.jit(jax.grad(total, argnums=(0, 1, 2)))(*inputs))
    except Exception as error:
        return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    return None


def cudnn(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Causal cuDNN flash attention; bfloat16 only.

    Source: Dao 2023 (FlashAttention-2), through `jax.nn.dot_product_attention`.
    """
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")


def splash(q: jax.Array, k: jax.Array, v: jax.Array, interpret: bool = False) -> jax.Array:
    """Causal Pallas splash attention, which skips masked blocks.

    `interpret` runs the kernel in Pallas' interpreter on any machine, for tests.

    Source: `jax.experimental.pallas.ops.tpu.splash_attention`, which expects scaled queries.
    """
    # Imported here because it takes half a second and only TPUs use it.
    from jax.experimental.pallas.ops.tpu import splash_attention as pallas

    T, H, D = q.shape[1:]
    block = next(b for b in BLOCKS if T % b == 0)
    sizes = pallas.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    mask = pallas.MultiHeadMask([pallas.CausalMask((T, T))] * H)
    kernel: Any = pallas.make_splash_mha_single_device(
        mask=mask, block_sizes=sizes, interpret=interpret
    )
    q = (q.astype(jnp.float32) / math.sqrt(D)).astype(q.dtype)
    heads_first = [x.swapaxes(1, 2) for x in (q, k, v)]  # (B, H, T, D)
    return jax.vmap(kernel)(*heads_first).swapaxes(1, 2)
