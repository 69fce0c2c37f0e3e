"""Attention by the accelerators' own kernels, which never hold a (T, T) matrix: cuDNN's on NVIDIA
GPUs, Pallas' splash attention on TPUs. Elsewhere XLA compiles the plain one of `model.py`.

Neither can drop attention weights, and neither serves decoding with a cache, which asks about one
position at a time: that stays with the plain one. Letters as in `model.py`.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from gptjax.attention import Kernel, causal_attention
from gptjax.config import ModelConfig
from gptjax.errors import UserError

BLOCKS = 512, 256, 128  # positions that a kernel takes at once; 128 are a TPU's lanes
CUDNN_HEAD_SIZES = 128, 8  # the largest on every GPU, and what it must be a multiple of


def make_kernel(config: ModelConfig, mesh: Mesh) -> Kernel | None:
    """The kernel that `config.attention` asks for, on the devices of a mesh.

    Args:
        config: of the network.
        mesh: of `sharding.make_mesh`; each device attends for its rows and its heads.

    Returns:
        A function of q (B, T, H, D), k and v (B, T, G, D) that gives (B, T, H, D) and attends
        causally; None: the plain one, which "auto" also means where no kernel fits.

    Raises:
        UserError: a kernel was asked for by name that these devices or this network cannot use.
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
    # XLA cannot cut a kernel up by itself; heads of keys and values may be too few to share out.
    heads = P(("data", "fsdp"), None, "tensor", None)
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    shared = (config.n_kv_head or config.n_head) % mesh.shape["tensor"] == 0

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        B, T, H = q.shape[:3]
        if T % BLOCKS[-1] or B % ways:  # such as the one token that parameters are drawn with
            return causal_attention(q, k, v)
        if not shared:
            k, v = (jnp.repeat(x, H // x.shape[2], axis=2) for x in (k, v))
        if mesh.size == 1:
            return kernel(q, k, v)
        specs = {"in_specs": (heads, heads, heads), "out_specs": heads}
        return jax.shard_map(kernel, mesh=mesh, check_vma=False, **specs)(q, k, v)

    return Kernel(attend)


def _unfit(name: str, config: ModelConfig, device: Any) -> str | None:
    """Why a kernel cannot do the config's attention on a device; None: it can."""
    if share := config.dropped_attention:
        return f"cannot drop attention weights, and the share to drop is {share}"
    if config.window is not None:
        return f"sees all positions, and model.window is {config.window}"
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
            f"needs heads of a multiple of {multiple} up to {largest}, and a head's size n_embd / "
            f"n_head is {config.head_size}"
        )
    return None


def cudnn(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Causal attention by cuDNN's flash attention; bfloat16 only.

    Source: Dao 2023 (FlashAttention-2), as `jax.nn.dot_product_attention` calls it.
    """
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")


def splash(q: jax.Array, k: jax.Array, v: jax.Array, interpret: bool = False) -> jax.Array:
    """Causal attention by Pallas' splash attention, which skips the blocks that the mask hides;
    `interpret` runs it step by step on any machine, for tests.

    Source: `jax.experimental.pallas.ops.tpu.splash_attention`; it takes scaled queries.
    """
    # Takes half a second to import, and only TPUs have a use for it.
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
