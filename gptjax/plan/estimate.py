"""Analytical cost of a train step on each device of a mesh, without a compiler or a device.

The size of the state is exact, because shapes and sharding rules are known. The rest is a model of
what has to be stored and moved. Letters as in `model.py`; b is the rows of a device's micro-batch.
`plan.py` compares it with the compiled step.
"""

import math
from dataclasses import replace
from typing import Any, NamedTuple

import jax
from jax.sharding import AbstractMesh, AxisType

from gptjax.config import Config, MeshConfig
from gptjax.errors import UserError
from gptjax.parallel import sharding
from gptjax.parallel.flops import count_params, flops_per_token
from gptjax.plan.chips import Chip
from gptjax.plan.hlo import Collective

ROOM = 0.9  # fraction of the memory that a proposal may fill, as a margin for the estimate


class Cost(NamedTuple):
    """Cost of one step on one device.

    Attributes:
        memory: bytes, by purpose.
        flops: executed, recomputation included.
        traffic: bytes read from and written to device memory.
        collectives: between devices.
        useful: FLOPs of the model itself (`flops_per_token`), without recomputation.
    """

    memory: dict[str, float]
    flops: float
    traffic: float
    collectives: list[Collective]
    useful: float

    @property
    def total(self) -> float:
        """Total bytes of memory."""
        return sum(self.memory.values())


class Times(NamedTuple):
    """Lower bounds on a step's seconds, for each resource alone."""

    compute: float
    memory: float
    network: float

    @property
    def least(self) -> float:
        """With perfect overlap: the roofline (Williams et al. 2009)."""
        return max(self)

    @property
    def most(self) -> float:
        """With no overlap, each resource at its peak rate."""
        return sum(self)


def times(cost: Cost, chip: Chip) -> Times:
    """Times of a cost on a chip, each resource at its published peak."""
    sent = [c.wire * c.times / rate(c, chip) for c in cost.collectives]
    return Times(cost.flops / chip.flops, cost.traffic / chip.bandwidth, sum(sent))


def rate(collective: Collective, chip: Chip) -> float:
    """Bytes/s that a device sends in a collective: over the links, or the network beyond them.

    Devices of a mesh are numbered along its last axes first, so the positions of a group show
    whether it lies within one server or pod.
    """
    places = {device // chip.joined for device in collective.group}
    return chip.links if len(places) == 1 else chip.network or chip.links


def estimate(config: Config, state: Any, mesh: MeshConfig) -> Cost:
    """The cost of a step of a GPT.

    Args:
        config: the run's config.
        state: shapes of its train state.
        mesh: mesh sizes; `data` must be a number.

    Raises:
        UserError: the mesh does not divide a size.
    """
    m, o = config.model, config.optim
    sizes = (mesh.data or 1, mesh.fsdp, mesh.tensor)
    abstract = AbstractMesh(sizes, sharding.AXES, axis_types=(AxisType.Auto,) * 3)
    rows, ways = config.batch_size // o.accumulate, sizes[0] * sizes[1]
    if rows % ways:
        raise UserError(f"a micro-batch of {rows} rows is not divisible by {ways}")
    b, T, C, L, H = rows // ways, m.block_size, m.n_embd, m.n_layer, m.n_head
    t, s = mesh.tensor, 2 if m.dtype == "bfloat16" else 4
    F = m.n_inner or 4 * C
    F_in = 2 * F if m.activation == "swiglu" else F
    V = m.vocab_size or state.params["wte"]["embedding"].shape[0]
    A, kv = H * m.head_size, 2 * (m.n_kv_head or H) * m.head_size
    params, held = bytes_of(state.params, abstract), bytes_of(state, abstract)
    layers = bytes_of({"h": state.params["h"]}, abstract)

    # Activations of a layer: its input, the outputs of its linear layers, and the rest.
    given = b * T * C * s
    dots = b * T * (A + kv + F_in) // t * s + 2 * b * T * C * s
    seen = T  # positions whose scores are stored: two windows with `window_attention`
    if m.window is not None and T % m.window == 0 and not m.dropped_attention:
        seen = min(T, 2 * m.window)
    weights = 0 if m.attention != "plain" else b * H * T * seen // t * (4 + s)
    rest = 2 * b * T * C * (4 + s) + b * T * (A + F) // t * s + weights
    kept = {(False, "nothing"): given + dots + rest, (True, "dots"): given + dots}
    saved = L * kept.get((m.remat, m.remat_saves), given)
    chunk = config.loss_chunk or T
    memory = {
        "parameters": params,
        "optimizer": held - params,
        # With accumulation, a running sum too; the weights are cast to the compute dtype.
        "gradients": params * (1 + (o.accumulate > 1)),
        "weights in use": (params * s / 4 if s < 4 else 0) + 2 * layers / L * mesh.fsdp * s / 4,
        "activations": saved + 2 * (dots + rest) + 3 * weights,
        "logits": b * chunk * V / _vocabulary_ways(V, t) * (8 + s) + 3 * b * T * C * s,
        "batch": 4 * config.batch_size * (T + 1),
    }

    tokens, devices = config.batch_size * T, math.prod(sizes)
    useful = flops_per_token(m, state.params) * tokens / devices
    again = 0
    if m.remat:
        # All but a block's last matmul, whose output the backward pass does not need.
        linear = 2 * (count_params(state.params["h"]) - L * F * C)
        again += (linear if m.remat_saves == "nothing" else 0) + 4 * L * A * seen
    if config.loss_chunk is not None:
        again += 2 * V * C
    passes = 3 + m.remat
    moved = 2 * (dots + given) + 3 * rest + 2 * weights  # forward, of a layer
    traffic = o.accumulate * (
        passes * (L * moved + layers * mesh.fsdp * s / 4)
        + 4 * b * T * V / _vocabulary_ways(V, t) * 4
        + 3 * params
    ) + 2 * (held + params)
    return Cost(
        memory,
        useful + again * tokens / devices,
        traffic,
        _collectives(config, mesh, params, given, V * C * s / _vocabulary_ways(V, t)),
        useful,
    )


def _collectives(
    config: Config, mesh: MeshConfig, params: float, given: float, head: float
) -> list[Collective]:
    """Collectives of a step, by mesh axis; see `docs/plan.md`.

    Args:
        params: bytes of a device's parameters, in float32.
        given: bytes of a layer's input, in the compute dtype.
        head: bytes of the whole head matrix, in the compute dtype.
    """
    m, G = config.model, config.optim.accumulate
    s = 2 if m.dtype == "bfloat16" else 4
    data, fsdp, tensor = mesh.data or 1, mesh.fsdp, mesh.tensor
    group = {
        "data": tuple(range(0, data * fsdp * tensor, fsdp * tensor)),
        "fsdp": tuple(range(0, fsdp * tensor, tensor)),
        "tensor": tuple(range(tensor)),
    }
    found = []
    part = round(params * s / 4)
    if fsdp > 1:  # weights are gathered layer by layer, at every use
        uses = 2 + (m.remat and m.remat_saves == "nothing")
        found.append(Collective("all-gather", part, group["fsdp"], uses * G))
        found.append(Collective("reduce-scatter", part * fsdp, group["fsdp"], G))
    if data > 1:  # every micro-batch's gradient is summed, in the compute dtype
        found.append(Collective("all-reduce", part, group["data"], G))
    if tensor > 1:  # each layer's two outputs are summed over devices, forward and backward
        times = m.n_layer * (4 + 2 * m.remat) * G
        found.append(Collective("all-reduce", round(given), group["tensor"], times))
    if config.loss_chunk is not None and data * fsdp > 1:  # the head's gradient, chunk by chunk
        rows = tuple(range(0, data * fsdp * tensor, tensor))
        times = m.block_size // config.loss_chunk * G
        found.append(Collective("all-reduce", round(head), rows, times))
    return found


def bytes_of(tree: Any, mesh: AbstractMesh) -> float:
    """Bytes of one device's shard of a tree of shapes."""
    placed: Any = sharding.shardings(mesh, tree)  # pyright: ignore[reportArgumentType]
    part = lambda x, s: math.prod(s.shard_shape(x.shape)) * x.dtype.itemsize
    return sum(jax.tree.leaves(jax.tree.map(part, tree, placed)))


def _vocabulary_ways(V: int, tensor: int) -> int:
    """Number of shards of the vocabulary along the tensor axis."""
    return tensor if V % tensor == 0 else 1


def meshes(devices: int, chip: Chip) -> list[MeshConfig]:
    """Every mesh of this many devices whose tensor axis stays within the fast links."""
    divisors = [n for n in range(1, devices + 1) if devices % n == 0]
    return [
        MeshConfig(devices // fsdp // tensor, fsdp, tensor)
        for tensor in (n for n in divisors if n <= min(8, chip.joined))
        for fsdp in divisors
        if devices % (fsdp * tensor) == 0
    ]


def proposals(
    config: Config, state: Any, chip: Chip, among: list[MeshConfig]
) -> list[tuple[Config, Cost]]:
    """Combinations of mesh, accumulation and rematerialisation that fit by estimate, fastest first.

    Args:
        config: the run's config; its batch and its results stay the same.
        state: shapes of its train state.
        chip: the devices' chip.
        among: meshes to consider.
    """
    found = []
    room = ROOM * chip.usable * chip.memory
    for mesh in among:
        rows = config.batch_size // ((mesh.data or 1) * mesh.fsdp)
        for remat, saves in ((False, "nothing"), (True, "dots"), (True, "nothing")):
            model = replace(config.model, remat=remat, remat_saves=saves)
            for accumulate in (n for n in range(1, rows + 1) if config.batch_size % n == 0):
                optim = replace(config.optim, accumulate=accumulate)
                candidate = replace(config, model=model, optim=optim, mesh=mesh)
                try:
                    cost = estimate(candidate, state, mesh)
                except UserError:  # not divisible
                    continue
                if cost.total < room:  # the fewest micro-batches that fit
                    found.append((candidate, cost))
                    break
    return sorted(found, key=lambda pair: times(pair[1], chip).most)
