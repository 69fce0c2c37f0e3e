"""Tests of the HLO parser, on programs with known collectives and on lines as the TPU and GPU
compilers write them."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from gptjax.plan.hlo import Collective, Program

MESH = {"data": 2, "fsdp": 2, "tensor": 2}


@pytest.fixture(scope="module")
def mesh() -> Mesh:
    sizes, auto = tuple(MESH.values()), (AxisType.Auto,) * 3
    return jax.make_mesh(sizes, tuple(MESH), axis_types=auto, devices=jax.devices()[:8])


def program(function: Any, *shapes: tuple[int, ...], **options: Any) -> tuple[Program, Any]:
    arguments = [jnp.zeros(shape) for shape in shapes]
    compiled = jax.jit(function, **options).lower(*arguments).compile()
    return Program(compiled.as_text() or ""), compiled


COLLECTIVES = {
    "all-reduce": lambda x, axes: jax.lax.psum(x, axes),
    "all-gather": lambda x, axes: jax.lax.all_gather(x, axes, tiled=True).sum() + x,
    "reduce-scatter": lambda x, axes: jnp.tile(jax.lax.psum_scatter(x, axes, tiled=True), (2, 1)),
    "all-to-all": lambda x, axes: jax.lax.all_to_all(x, axes, 0, 0, tiled=True),
    "collective-permute": lambda x, axes: jax.lax.ppermute(x, axes, [(0, 1), (1, 0)]),
}


@pytest.mark.parametrize("kind", COLLECTIVES)
@pytest.mark.parametrize("axis", MESH)
def test_a_collective_is_multiplied_by_its_loops_trip_count(mesh, kind, axis):
    """6 iterations, (8, 16) float32 on each device, groups of two."""

    @partial(jax.shard_map, mesh=mesh, in_specs=P(axis), out_specs=P(axis), check_vma=False)
    def looped(x: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda x, _: (COLLECTIVES[kind](x, axis) * 0.5, None), x, length=6)[0]

    [found] = [c for c in program(looped, (16, 16))[0].collectives() if c.bytes > 4]
    assert found[0] == kind
    assert (found.bytes, len(found.group), found.times) == (8 * 16 * 4, 2, 6)
    assert found.axes(MESH) == (axis,)
    wires = {"all-reduce": 1, "all-gather": 1, "collective-permute": 1}  # of 2 devices
    assert found.wire == found.bytes * wires.get(kind, 0.5)


def test_trip_counts_of_nested_loops_multiply(mesh):
    @partial(jax.shard_map, mesh=mesh, in_specs=P("data"), out_specs=P("data"), check_vma=False)
    def looped(x: jax.Array) -> jax.Array:
        inner = lambda x, _: (jax.lax.psum(x, ("fsdp", "tensor")) * 0.5, None)
        outer = lambda x, _: (jax.lax.scan(inner, x + 1, length=5)[0], None)
        return jax.lax.scan(outer, x, length=3)[0]

    [found] = program(looped, (16, 16))[0].collectives()
    assert (found.kind, found.times, found.axes(MESH)) == ("all-reduce", 15, ("fsdp", "tensor"))
    assert found.wire == found.bytes * 2 * 3 / 4


def test_a_program_on_one_device_has_no_collectives():
    assert program(lambda x: jnp.tanh(x) @ x.T, (8, 8))[0].collectives() == []


# A line of one device's program, in the notations of three compilers.
LINE = "  %c = f32[{}] {}(%x), channel_id=1, {}, use_global_device_ids=true, to_apply=%add"


@pytest.mark.parametrize(
    ("groups", "group"),
    [
        ("replica_groups={{0,3},{1,2}}", (0, 3)),
        ("replica_groups=[2,4]<=[8]", (0, 1, 2, 3)),
        ("replica_groups=[2,4]<=[4,2]T(1,0)", (0, 2, 4, 6)),
        ("replica_groups=[4,2]<=[2,2,2]T(0,2,1)", (0, 2)),
        ("replica_groups=mesh['a'=2,'b'=4] {'b'}", (0, 1, 2, 3)),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}", (0, 4)),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=2,'axis_2'=2] {'axis_0','axis_2'}", (0, 1, 4, 5)),
        ("replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}", (0, 2, 4, 6)),
        ("replica_groups=mesh['a'=2,'b'=4], device_ids=([2,2,2]T(1,0,2)) {'a'}", (0, 2)),
        ("source_target_pairs={{0,2},{2,1},{1,0},{3,4}}", (0, 2, 1)),
    ],
)
def test_groups_are_read_in_every_notation(groups, group):
    lines = ["ENTRY %main (x: f32[4]) -> f32[4] {", "  %x = f32[4]{0} parameter(0)"]
    text = "\n".join([*lines, LINE.format("4", "all-reduce", groups), "}"])
    assert Program(text).collectives() == [Collective("all-reduce", 16, group, 1)]


def test_iota_groups_equal_numpy():
    for shape, order in (((4, 2), (1, 0)), ((2, 3, 4), (2, 0, 1)), ((2, 2, 2), (1, 0, 2))):
        expected = np.arange(np.prod(shape)).reshape(shape).transpose(order).reshape(2, -1)[0]
        sizes = ",".join(map(str, shape)), ",".join(map(str, order))
        line = f"replica_groups=[2,{expected.size}]<=[{sizes[0]}]T({sizes[1]})"
        lines = ["ENTRY %main (x: f32[4]) -> f32[4] {", "  %x = f32[4]{0} parameter(0)"]
        text = "\n".join([*lines, LINE.format("4", "all-gather", line), "}"])
        assert Program(text).collectives()[0].group == tuple(expected)


TPU = """\
HloModule jit_f, is_scheduled=true

%fused (p: f32[8,4], q: s32[]) -> f32[1,4] {
  %p = f32[8,4]{1,0:T(8,128)} parameter(0)
  %q = s32[]{:T(128)} parameter(1)
  %zero = s32[] constant(0)
  ROOT %slice = f32[1,4]{1,0} dynamic-slice(%p, %q, %zero), dynamic_slice_sizes={1,4}
}

%piece (a: f32[8,4]) -> f32[16,4] {
  %a = f32[8,4]{1,0:T(8,128)} parameter(0)
  ROOT %all-gather.2 = f32[16,4]{1,0} all-gather(%a), channel_id=7, replica_groups={{0,1}}
}

%cond (t: (s32[], f32[8,4])) -> pred[] {
  %t = (s32[]{:T(128)}, f32[8,4]{1,0:T(8,128)}) parameter(0)
  %n = s32[]{:T(128)} constant(48)
  %i = s32[]{:T(128)} get-tuple-element(%t), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %n), direction=LT
}

%body (t: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %t = (s32[]{:T(128)}, f32[8,4]{1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%t), index=0
  %x = f32[8,4]{1,0:T(8,128)} get-tuple-element(%t), index=1
  %row = f32[1,4]{1,0} fusion(%x, %i), kind=kLoop, calls=%fused
  %near = f32[8,4]{1,0:T(8,128)S(1)} negate(%x)
  %cut = ((f32[8,4]{1,0:T(8,128)}), f32[2,4]{1,0:T(8,128)S(1)}, s32[]{:S(2)}) slice-start(%x)
  %buffer = f32[16,4]{1,0} custom-call(), custom_call_target="AllocateBuffer"
  %start = f32[16,4]{1,0} fusion(%x), kind=kCustom, calls=%piece
  %again = f32[16,4]{1,0} all-gather(%x), channel_id=7, replica_groups={{0,1}}
  ROOT %out = (s32[]{:T(128)}, f32[8,4]{1,0:T(8,128)}) tuple(%i, %x)
}

ENTRY %main (t: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %t = (s32[]{:T(128)}, f32[8,4]{1,0:T(8,128)}) parameter(0)
  ROOT %while = (s32[]{:T(128)}, f32[8,4]{1,0}) while(%t), condition=%cond, body=%body
}
"""


def test_a_tpu_program_is_parsed():
    """The trip count is in the condition only; parts of a split collective share a channel; on-chip
    memory, S(1), is no main-memory traffic."""
    program = Program(TPU)
    assert program.collectives() == [Collective("all-gather", 128, (0, 1), 48)]
    # row, near, cut (with one word of state), start, again
    a_round = (16 + 4 + 16) + 128 + (32 + 4) + (128 + 256) + (128 + 256)
    assert program.traffic() == 48 * a_round + 48 * (1 + 4 + 4)  # and the comparison


GPU = """\
HloModule jit_f, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%fused_scatter (p: f32[64,4], q: s32[2,1], r: f32[8]) -> f32[64,4] {
  %p = f32[64,4]{1,0} parameter(0)
  %q = s32[2,1]{1,0} parameter(1)
  %r = f32[8]{0} parameter(2)
  %rows = f32[2,4]{1,0} bitcast(%r)
  ROOT %scatter = f32[64,4]{1,0} scatter(%p, %q, %rows), to_apply=%add
}

ENTRY %main (table: f32[64,4], ids: s32[2,1], rows: f32[2,4]) -> f32[64,4] {
  %table = f32[64,4]{1,0} parameter(0)
  %ids = s32[2,1]{1,0} parameter(1)
  %rows = f32[2,4]{1,0} parameter(2)
  %one = f32[64,4]{1,0} scatter(%table, %ids, %rows), to_apply=%add
  ROOT %two = f32[64,4]{1,0} fusion(%one, %ids, %rows), kind=kInput, calls=%fused_scatter
}
"""


def test_a_scatter_moves_its_rows_and_not_the_table():
    """Two of 16 bytes each, read and written, with the two ids and the rows that are added."""
    assert Program(GPU).traffic() == 2 * (2 * 32 + 8 + 32)


def test_traffic_without_loops_equals_xlas_cost_analysis():
    """For matmuls, whose operands and results XLA counts too."""

    def chain(a: jax.Array, b: jax.Array) -> jax.Array:
        return (a @ b) @ a

    found, compiled = program(chain, (64, 128), (128, 64))
    assert found.traffic() == pytest.approx(compiled.cost_analysis()["bytes accessed"], rel=0.05)


def test_traffic_of_a_loop_counts_each_iteration_and_only_its_slices():
    """50 layers of 64 x 64: each iteration reads one layer, not the whole stack."""

    def layers(x: jax.Array, stack: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, stack)[0]

    found, _ = program(layers, (8, 64), (50, 64, 64))
    least = 50 * 64 * 64 * 4
    assert least < found.traffic() < 4 * least
