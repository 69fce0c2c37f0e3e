"""Device mesh and sharding rules; the model knows neither.

XLA's GSPMD partitions the jitted step by the shardings of its inputs, so parameters, optimizer
state and batches are placed here. `on_mesh` adds two constraints that it would choose badly: a
batch's rows stay on their devices, and tables are gathered before a lookup.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import flax.linen as nn
import jax
import numpy as np
from jax.experimental.mesh_utils import create_device_mesh
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gptjax.config import MeshConfig
from gptjax.errors import UserError

AXES = ("data", "fsdp", "tensor")
ROWS = ("data", "fsdp")  # a batch's rows are sharded over both
BATCH = P(ROWS)
EVERYWHERE = P()
# The tensor axis for sizes that a user does not choose freely (the tokenizer's vocabulary, few
# heads of keys and values): where it does not divide, the leaf is whole along it.
TENSOR = "tensor, if it divides"

TABLES = r"w[a-z]e/embedding"  # (V, C): wte, and tables that a model of your own adds to it

# Suffix of a leaf's path -> mesh axis of each of its axes. AdamW's moments have the parameters'
# names, so one table covers the whole train state. Scalars need no rule.
RULES: tuple[tuple[str, P], ...] = (
    (TABLES, P(TENSOR, "fsdp")),
    (r"wpe", P(None, "fsdp")),  # (block_size, C)
    (r"h/attn/c_attn/kernel", P(None, "fsdp", None, "tensor", None)),  # (L, C, 3, H, D)
    (r"h/attn/c_attn/bias", P(None, None, "tensor", None)),  # (L, 3, H, D)
    (r"h/attn/c_kv/kernel", P(None, "fsdp", None, TENSOR, None)),  # (L, C, 2, G, D)
    (r"h/attn/c_kv/bias", P(None, None, TENSOR, None)),  # (L, 2, G, D)
    (r"h/attn/c_q/kernel", P(None, "fsdp", "tensor", None)),  # (L, C, H, D)
    (r"h/attn/c_q/bias", P(None, "tensor", None)),  # (L, H, D)
    (r"h/attn/c_proj/kernel", P(None, "tensor", None, "fsdp")),  # (L, H, D, C)
    (r"h/mlp/c_fc/kernel", P(None, "fsdp", None, "tensor")),  # (L, C, 2, F), SwiGLU
    (r"h/mlp/c_fc/kernel", P(None, "fsdp", "tensor")),  # (L, C, F)
    (r"h/mlp/c_fc/bias", P(None, None, "tensor")),  # (L, 2, F), SwiGLU
    (r"h/mlp/c_fc/bias", P(None, "tensor")),  # (L, F)
    (r"h/mlp/c_proj/kernel", P(None, "tensor", "fsdp")),  # (L, F, C)
    (r"h/(attn|mlp)/c_proj/bias", P()),  # (L, C)
    (r"h/(attn|mlp)/\w+/lora_(a|b)", P()),  # small: (L, C, 3, r), (L, 3, r, H, D)
    (r"h/attn/(q_norm|k_norm)/scale", P()),  # (L, D)
    (r"(ln_1|ln_2|ln_f)/(scale|bias)", P()),  # (L, C), (C,)
    (r"lm_head/kernel", P("fsdp", TENSOR)),  # (C, V)
    (r"lm_head/bias", P(TENSOR)),  # (V,)
)


def make_mesh(m: MeshConfig, rows: int, devices: Sequence[Any] | None = None) -> Mesh:
    """The (data, fsdp, tensor) mesh that a run trains on.

    Args:
        m: mesh sizes; `data=None` uses as many of the remaining devices as divide `rows`.
        rows: of a micro-batch: `batch_size // accumulate`.
        devices: to use, the first ones first; None: this machine's.

    Raises:
        UserError: more devices requested than available, or rows that `data * fsdp` does not
            divide.
    """
    devices = jax.devices() if devices is None else devices
    data = data_ways(m, rows, len(devices))
    mesh = mesh_of(replace(m, data=data), devices)
    if rows % (data * m.fsdp):
        raise UserError(
            f"a micro-batch of {rows} rows is not divisible by mesh.data * mesh.fsdp = "
            f"{data * m.fsdp}; sizes that divide it: {_divisors(rows)}"
        )
    return mesh


def data_ways(m: MeshConfig, rows: int, available: int) -> int:
    """`mesh.data`; if None, the most of the devices left by fsdp and tensor that divide `rows`."""
    if m.data is not None:
        return m.data
    room = max(1, available // (m.fsdp * m.tensor))
    return max(n for n in range(1, room + 1) if n == 1 or rows % (n * m.fsdp) == 0)


def mesh_of(m: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of these sizes (`data=None`: 1) over the first devices; None: this machine's.

    Raises:
        UserError: more devices requested than available.
    """
    devices = jax.devices() if devices is None else devices
    shape, available = (m.data or 1, m.fsdp, m.tensor), len(devices)
    if math.prod(shape) > available:
        raise UserError(
            f"the mesh data={shape[0]} x fsdp={m.fsdp} x tensor={m.tensor} needs "
            f"{math.prod(shape)} devices, and {available} are available; lower mesh.data, "
            f"mesh.fsdp or mesh.tensor"
        )
    if jax.process_count() > 1 and math.prod(shape) < available:
        raise UserError(
            f"the mesh data={shape[0]} x fsdp={m.fsdp} x tensor={m.tensor} does not use all "
            f"{available} devices of the {jax.process_count()} processes; raise mesh.data or "
            f"mesh.fsdp, with a batch_size that they divide"
        )
    # An axis of a TPU's torus may be split between two mesh axes; fsdp 32 on 4x4x4 needs that.
    grid = create_device_mesh(shape, devices[: math.prod(shape)], allow_split_physical_axes=True)
    # Auto: XLA infers the shardings of intermediates. Explicit would need them in the model.
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * 3)


def shardings(mesh: Mesh, tree: Any) -> Any:
    """Shardings of parameters or of a whole train state, by `RULES`.

    Args:
        mesh: from `make_mesh`.
        tree: pytree of arrays or shapes; names as in `model.py`.

    Raises:
        UserError: an axis of a leaf is not divisible by its mesh axis.
    """

    def place(path: Any, leaf: Any) -> NamedSharding:
        name = _name(path)
        spec = _spec(name, leaf.shape, mesh)
        for size, axis in zip(leaf.shape, spec, strict=False):
            if axis is not None and size % mesh.shape[axis]:
                raise UserError(
                    f"{name} has an axis of {size}, not divisible by mesh.{axis}="
                    f"{mesh.shape[axis]}; sizes that divide it: {_divisors(size)}"
                )
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(place, tree)


def layout(mesh: Mesh, tree: Any) -> Any:
    """Shapes, dtypes and shardings of a tree of arrays or shapes, as `jax.ShapeDtypeStruct`."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        tree,
        shardings(mesh, tree),
    )


def replicated(mesh: Mesh) -> NamedSharding:
    """Sharding of an array that every device holds whole."""
    return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of an array whose first axis is the batch."""
    return NamedSharding(mesh, BATCH)


def put(mesh: Mesh, tree: Any, spec: P = EVERYWHERE) -> Any:
    """Arrays of this host onto the devices of a mesh; by default each device gets all of them.

    The arrays must be the same in all processes.
    """
    place = NamedSharding(mesh, spec)

    def one(x: Any) -> jax.Array:
        if isinstance(x, jax.Array) and x.sharding == place:
            return x
        if place.is_fully_addressable:
            return jax.device_put(x, place)
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, place, lambda index: x[index])

    return jax.tree.map(one, tree)


def on_mesh(model: nn.Module, mesh: Mesh) -> nn.Module:
    """The model with its activations constrained to the mesh; used like any other module."""
    return model if mesh.size == 1 else cast(nn.Module, OnMesh(model, mesh))


@dataclass(frozen=True)
class OnMesh:
    """A module whose `apply` keeps the rows of a batch on their devices.

    Without this, XLA lets activations follow the shards of the parameters: with fsdp it then moves
    activations between devices instead of the smaller parameters, in every layer.
    """

    model: nn.Module
    mesh: Mesh

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def apply(self, variables: Any, *args: Any, **kwargs: Any) -> Any:
        """The module's `apply`, with every submodule's output sharded along its rows."""
        params = jax.tree_util.tree_map_with_path(self._table_whole, variables["params"])
        with nn.intercept_methods(self._pin):
            return self.model.apply({**variables, "params": params}, *args, **kwargs)

    def init_cache(self, batch: int) -> Any:
        """The module's cache, with rows and heads sharded over the mesh."""
        rows = self._rows(batch)
        layers = P(None, rows, TENSOR)
        specs = {"k": layers, "v": layers}

        def place(path: Any, leaf: jax.Array) -> jax.Array:
            spec = specs.get(_name(path), P(rows) if leaf.ndim else P())
            return self._constrain(leaf, _fitting(spec, leaf.shape, self.mesh))

        cache = cast(Any, self.model).init_cache(batch)
        return jax.tree_util.tree_map_with_path(place, cache)

    def _rows(self, batch: int) -> Any:
        """Mesh axes that this many rows are sharded over."""
        return ROWS if batch % math.prod(self.mesh.shape[axis] for axis in ROWS) == 0 else None

    def _pin(self, method: Any, args: Any, kwargs: Any, context: Any) -> Any:
        """Call a submodule and constrain the rows of its output, but not its cache."""
        result = method(*args, **kwargs)
        if context.method_name != "__call__":
            return result
        x, *cache = result if isinstance(result, tuple) else (result,)
        if x.ndim > 1 and (rows := self._rows(x.shape[0])):
            x = self._constrain(x, P(rows, *[P.UNCONSTRAINED] * (x.ndim - 1)))
        return (x, *cache) if isinstance(result, tuple) else x

    def _table_whole(self, path: Any, leaf: jax.Array) -> jax.Array:
        """Gather a table over fsdp: a lookup in a table sharded along its width would gather the
        whole batch's activations instead."""
        if not re.search(rf"(^|/)({TABLES}|wpe)$", _name(path)):
            return leaf
        spec = _spec(_name(path), leaf.shape, self.mesh)
        return self._constrain(leaf, P(*(None if axis == "fsdp" else axis for axis in spec)))

    def _constrain(self, x: jax.Array, spec: P) -> jax.Array:
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, spec))


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _spec(name: str, shape: tuple[int, ...], mesh: Mesh) -> P:
    """Spec of the leaf at path `name`; a leaf without a rule (a custom module's) is replicated."""
    for pattern, spec in RULES:
        if re.search(rf"(^|/){pattern}$", name) and len(spec) in (0, len(shape)):
            return _fitting(spec, shape, mesh)
    return P()


def _fitting(spec: P, shape: tuple[int, ...], mesh: Mesh) -> P:
    """The spec with TENSOR resolved: "tensor" if it divides the size, else None."""
    n = mesh.shape["tensor"]
    decide = lambda axis, size: axis if axis != TENSOR else "tensor" if size % n == 0 else None
    return P(*map(decide, spec, shape))


def _divisors(n: int) -> str:
    return ", ".join(str(d) for d in range(1, n + 1) if n % d == 0)
