"""What a step costs on each device of a mesh, by arithmetic alone: no compiler, no device.

State is exact, for shapes and rules are known. The rest counts what has to be held and moved, in
the letters of `model.py`; b is the rows of a device's micro-batch. `plan.py` compares it with what
a compiler makes of the same step.
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

ROOM = 0.9  # of the memory that a proposal may fill, for the estimate is one


class Cost(NamedTuple):
    """Of one step, on one device.

    Attributes:
        memory: bytes, by what they are for.
        flops: made, what is computed again included.
        traffic: bytes read from and written to the device's memory.
        collectives: between devices.
        useful: FLOPs that the model's arithmetic needs (`flops_per_token`).
    """

    memory: dict[str, float]
    flops: float
    traffic: float
    collectives: list[Collective]
    useful: float

    @property
    def total(self) -> float:
        """Bytes of memory."""
        return sum(self.memory.values())


class Times(NamedTuple):
    """Seconds that a step needs at least, for each thing by itself."""

    compute: float
    memory: float
    network: float

    @property
    def least(self) -> float:
        """If all three go on side by side: no step is faster (Williams et al. 2009, roofline)."""
        return max(self)

    @property
    def most(self) -> float:
        """If nothing overlaps, and each is at its peak."""
        return sum(self)


def times(cost: Cost, chip: Chip) -> Times:
    """Of a cost on a chip, each thing at the published peak."""
    sent = [c.wire * c.times / rate(c, chip) for c in cost.collectives]
    return Times(cost.flops / chip.flops, cost.traffic / chip.bandwidth, sum(sent))


def rate(collective: Collective, chip: Chip) -> float:
    """Bytes/s that a device sends in a collective: over the links, or where they end the network.

    Devices of a mesh follow one another along its last axes first, so a group within one server
    or pod shows by its positions.
    """
    places = {device // chip.joined for device in collective.group}
    return chip.links if len(places) == 1 else chip.network or chip.links


def estimate(config: Config, state: Any, mesh: MeshConfig) -> Cost:
    """The cost of a step of a GPT.

    Args:
        config: of the run.
        state: shapes of its train state.
        mesh: sizes of its axes; data is a number.

    Raises:
        UserError: sizes that the mesh does not divide.
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
    kv = 2 * (m.n_kv_head or H) * m.head_size
    params, held = _bytes(state.params, abstract), _bytes(state, abstract)
    layers = _bytes({"h": state.params["h"]}, abstract)

    # Activations of a layer: what enters it, what its linear layers give, and the rest.
    given = b * T * C * s
    dots = b * T * (C + kv + F_in) // t * s + 2 * b * T * C * s
    seen = T  # positions whose scores are held: two windows, where `window_attention` serves
    if m.window is not None and T % m.window == 0 and not m.dropped_attention:
        seen = min(T, 2 * m.window)
    weights = 0 if m.attention != "plain" else b * H * T * seen // t * (4 + s)
    rest = 2 * b * T * C * (4 + s) + b * T * (C + F) // t * s + weights
    kept = {(False, "nothing"): given + dots + rest, (True, "dots"): given + dots}
    saved = L * kept.get((m.remat, m.remat_saves), given)
    chunk = config.loss_chunk or T
    memory = {
        "parameters": params,
        "optimizer": held - params,
        # A sum besides the micro-batch's own, and the weights in the dtype of matmuls.
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
        # All but a block's last matmul, whose result nothing asks for.
        linear = 2 * (count_params(state.params["h"]) - L * F * C)
        again += (linear if m.remat_saves == "nothing" else 0) + 4 * L * C * seen
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
    """What the three axes make a step send; see `docs/plan.md`.

    Args:
        params: bytes of a device's parameters, float32.
        given: bytes of what enters a layer.
        head: bytes of the head's whole matrix, both as matmuls take them.
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
    if fsdp > 1:  # weights are gathered layer by layer, each time they are used
        uses = 2 + (m.remat and m.remat_saves == "nothing")
        found.append(Collective("all-gather", part, group["fsdp"], uses * G))
        found.append(Collective("reduce-scatter", part * fsdp, group["fsdp"], G))
    if data > 1:  # the gradient of every micro-batch is summed, as the matmuls give it
        found.append(Collective("all-reduce", part, group["data"], G))
    if tensor > 1:  # each layer's two outputs are sums over the devices, there and back
        times = m.n_layer * (4 + 2 * m.remat) * G
        found.append(Collective("all-reduce", round(given), group["tensor"], times))
    if config.loss_chunk is not None and data * fsdp > 1:  # the head's gradient, chunk by chunk
        rows = tuple(range(0, data * fsdp * tensor, tensor))
        times = m.block_size // config.loss_chunk * G
        found.append(Collective("all-reduce", round(head), rows, times))
    return found


def _bytes(tree: Any, mesh: AbstractMesh) -> float:
    """Of one device's part of a tree of shapes."""
    placed: Any = sharding.shardings(mesh, tree)  # pyright: ignore[reportArgumentType]
    part = lambda x, s: math.prod(s.shard_shape(x.shape)) * x.dtype.itemsize
    return sum(jax.tree.leaves(jax.tree.map(part, tree, placed)))


def _vocabulary_ways(V: int, tensor: int) -> int:
    """Parts that the tensor axis cuts the vocabulary into."""
    return tensor if V % tensor == 0 else 1


def meshes(devices: int, chip: Chip) -> list[MeshConfig]:
    """Every mesh of so many devices whose tensor axis stays within what links join."""
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
    """Meshes, accumulations and rematerialisations that fit by the estimate, fastest first.

    Args:
        config: of the run; its batch, model and numbers stay as they are.
        state: shapes of its train state.
        chip: of the devices.
        among: the meshes to look at.
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
