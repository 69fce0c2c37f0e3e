"""Devices: one mesh, one table of rules. The model knows neither.

XLA's GSPMD partitions the jitted step from where its inputs lie, so parameters, optimizer state
and batches are placed here and nothing else changes between one device and many.
"""

import math
import re
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gptjax.config import Config
from gptjax.errors import UserError

AXES = ("data", "fsdp", "tensor")
BATCH = P(("data", "fsdp"))  # rows of a batch are spread over both

# Path of a leaf, from its end, to the mesh axis of each of its axes. AdamW's moments have the
# parameters' names, so one table covers the whole train state. Scalars need no rule.
RULES: tuple[tuple[str, P], ...] = (
    (r"((wte|wse)/embedding|wpe)", P(None, "fsdp")),  # (V, C), (block_size, C)
    (r"h/attn/(c_attn|c_kv)/kernel", P(None, "fsdp", None, "tensor", None)),  # (L, C, 3, H, D)
    (r"h/attn/(c_attn|c_kv)/bias", P(None, None, "tensor", None)),  # (L, 3, H, D)
    (r"h/attn/c_q/kernel", P(None, "fsdp", "tensor", None)),  # (L, C, H, D)
    (r"h/attn/c_q/bias", P(None, "tensor", None)),  # (L, H, D)
    (r"h/attn/c_proj/kernel", P(None, "tensor", None, "fsdp")),  # (L, H, D, C)
    (r"h/mlp/c_fc/kernel", P(None, "fsdp", None, "tensor")),  # (L, C, 2, F), SwiGLU
    (r"h/mlp/c_fc/kernel", P(None, "fsdp", "tensor")),  # (L, C, F)
    (r"h/mlp/c_fc/bias", P(None, None, "tensor")),  # (L, 2, F), SwiGLU
    (r"h/mlp/c_fc/bias", P(None, "tensor")),  # (L, F)
    (r"h/mlp/c_proj/kernel", P(None, "tensor", "fsdp")),  # (L, F, C)
    (r"h/(attn|mlp)/c_proj/bias", P()),  # (L, C)
    (r"(ln_1|ln_2|ln_f)/(scale|bias)", P()),  # (L, C), (C,)
    (r"lm_head/kernel", P("fsdp", None)),  # (C, V)
    (r"lm_head/bias", P()),  # (V,)
)


def make_mesh(config: Config) -> Mesh:
    """The (data, fsdp, tensor) mesh over this machine's devices.

    `mesh.data=None` takes as many of the remaining devices as divide the batch.

    Raises:
        UserError: more devices asked for than there are, or a batch that does not divide.
    """
    m, available = config.mesh, jax.device_count()
    rows = config.batch_size // config.optim.accumulate
    data = m.data
    if data is None:
        room = max(1, available // (m.fsdp * m.tensor))
        data = max(n for n in range(1, room + 1) if n == 1 or rows % (n * m.fsdp) == 0)
    shape = (data, m.fsdp, m.tensor)
    if math.prod(shape) > available:
        raise UserError(
            f"the mesh data={data} x fsdp={m.fsdp} x tensor={m.tensor} needs {math.prod(shape)} "
            f"devices and there are {available}; lower mesh.data, mesh.fsdp or mesh.tensor"
        )
    if rows % (data * m.fsdp):
        raise UserError(
            f"a micro-batch of {rows} rows is not divisible by mesh.data * mesh.fsdp = "
            f"{data * m.fsdp}; sizes that divide it: {_divisors(rows)}"
        )
    devices = jax.devices()[: math.prod(shape)]
    # Auto: XLA infers every sharding. The default, Explicit, would ask the model to name them.
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def shardings(mesh: Mesh, tree: Any) -> Any:
    """The sharding of each leaf of parameters, or of a whole train state, by `RULES`.

    Args:
        mesh: from `make_mesh`.
        tree: pytree of arrays or shapes; names as in `model.py`.

    Raises:
        UserError: an axis of a leaf is not divisible by its mesh axis.
    """

    def place(path: Any, leaf: Any) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        spec = _spec(name, leaf.ndim)
        for size, axis in zip(leaf.shape, spec, strict=False):
            if axis is not None and size % mesh.shape[axis]:
                raise UserError(
                    f"{name} has an axis of {size}, not divisible by mesh.{axis}="
                    f"{mesh.shape[axis]}; sizes that divide it: {_divisors(size)}"
                )
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(place, tree)


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of what every device holds whole."""
    return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of an array whose first axis is the rows of a batch."""
    return NamedSharding(mesh, BATCH)


def _spec(name: str, ndim: int) -> P:
    """The spec of the leaf called `name`; what no rule fits (of your own module) is replicated."""
    for pattern, spec in RULES:
        if re.search(rf"(^|/){pattern}$", name) and len(spec) in (0, ndim):
            return spec
    return P()


def _divisors(n: int) -> str:
    return ", ".join(str(d) for d in range(1, n + 1) if n % d == 0)
