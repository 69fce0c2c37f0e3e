"""Tests of meshes of eight simulated devices: sharding never changes the numbers."""

import functools
import io
import itertools
import math
import re
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import by_path
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from rich.console import Console

import gptjax
from gptjax.assembly import assemble, evaluate_split
from gptjax.config import Config, DataConfig, MeshConfig, ModelConfig, OptimConfig
from gptjax.console import Report
from gptjax.errors import UserError
from gptjax.lecture.models import Transformer
from gptjax.model import GPT, KVCache
from gptjax.parallel import sharding
from gptjax.plan import estimate, hlo, meshes
from gptjax.plan.chips import CHIPS
from gptjax.runs.run import Run
from gptjax.sampling import Sampling
from gptjax.step import TrainState
from gptjax.training import train

VOCAB = 12
CONFIG = Config(
    steps=20,
    batch_size=16,
    steps_per_dispatch=20,
    model=ModelConfig(n_layer=1, n_head=4, n_embd=16, block_size=8, dropout=0.2),
    optim=OptimConfig(learning_rate=0.01, accumulate=2),
)
MODERN = replace(
    CONFIG,
    model=replace(
        CONFIG.model,
        n_kv_head=1,
        norm="rms",
        position="rotary",
        activation="swiglu",
    ),
    optim=replace(CONFIG.optim, kind="muon", ema=0.5),
)
TOKENS = np.random.default_rng(0).integers(0, VOCAB, 300).astype(np.uint16)
ONE = MeshConfig(data=1)
MESHES = {
    "data 8": MeshConfig(data=8),
    "fsdp 8": MeshConfig(data=1, fsdp=8),
    "tensor 4": MeshConfig(data=1, tensor=4),
    "data 2, fsdp 2, tensor 2": MeshConfig(data=2, fsdp=2, tensor=2),
}


class WithPrevious(GPT):
    """A GPT with a second embedding table, of the previous token."""

    def embed(self, tokens: jax.Array, cache: KVCache | None) -> Any:
        x, cache = super().embed(tokens, cache)
        previous = nn.Embed(self.vocab_size, self.config.n_embd, name="wse")(tokens[:, :-1])
        return x + jnp.pad(previous, [(0, 0), (1, 0), (0, 0)]), cache


class Outcome(NamedTuple):
    """Results of 20 updates on a mesh."""

    first: TrainState  # on the host
    state: TrainState  # on the mesh
    losses: np.ndarray
    evaluation: float
    compiled: Any  # of `Setup.steps`


@functools.cache
def outcome(mesh_config: MeshConfig, modern: bool = False, model: Any = None) -> Outcome:
    setup = assemble(replace(MODERN if modern else CONFIG, mesh=mesh_config), VOCAB, model=model)
    tokens, key = sharding.put(setup.mesh, TOKENS), setup.seed_key()
    state = setup.start()
    first = jax.tree.map(np.asarray, state)
    compiled = setup.steps.lower(state, tokens, key, 0, 20).compile()
    state, metrics = compiled(state, tokens, key, 0, 20)
    evaluation = evaluate_split(setup, state.weights, tokens)["loss"]
    return Outcome(first, state, np.asarray(metrics["loss"]), evaluation, compiled)


@pytest.fixture(params=MESHES.values(), ids=list(MESHES))
def mesh_config(request: pytest.FixtureRequest) -> MeshConfig:
    return request.param


# ---------------------------------------------------------------------------------------------
# The numbers


def test_init_is_the_same_on_every_mesh(mesh_config):
    one, here = outcome(ONE), outcome(mesh_config)
    jax.tree.map(
        lambda x, y: np.testing.assert_array_equal(x, y, strict=True), one.first, here.first
    )


@pytest.mark.parametrize("mesh_config", [MESHES["tensor 4"], MESHES["data 2, fsdp 2, tensor 2"]])
def test_the_modern_family_is_the_same_on_every_mesh(mesh_config):
    """Muon, EMA, SwiGLU, and a single key head, which tensor does not divide. The EMA has the
    parameters' shardings."""
    one, here = outcome(ONE, modern=True), outcome(mesh_config, modern=True)
    np.testing.assert_allclose(here.losses, one.losses, rtol=0, atol=1e-5)
    assert here.evaluation == pytest.approx(one.evaluation, abs=1e-5)
    for name, leaf in by_path(here.state.params).items():
        assert by_path(here.state.ema)[name].sharding == leaf.sharding


def test_training_is_the_same_on_every_mesh(mesh_config):
    one, here = outcome(ONE), outcome(mesh_config)
    np.testing.assert_allclose(here.losses, one.losses, rtol=0, atol=1e-5)
    assert here.evaluation == pytest.approx(one.evaluation, abs=1e-5)
    assert len(set(one.losses.tolist())) == 20


@pytest.mark.parametrize("model", [WithPrevious, Transformer])
def test_own_models_are_the_same_on_every_mesh(model):
    """One with a table that `sharding.TABLES` covers, one whose blocks have no rule."""
    one = outcome(ONE, model=model)
    here = outcome(MESHES["data 2, fsdp 2, tensor 2"], model=model)
    np.testing.assert_allclose(here.losses, one.losses, rtol=0, atol=1e-5)
    assert here.evaluation == pytest.approx(one.evaluation, abs=1e-5)


# ---------------------------------------------------------------------------------------------
# Shardings


def test_the_state_uses_every_device_of_the_mesh(mesh_config):
    m = mesh_config
    for leaf in jax.tree.leaves(outcome(mesh_config).state):
        assert len(leaf.sharding.device_set) == m.data * m.fsdp * m.tensor


def parts_of(name: str, m: MeshConfig) -> int:
    """Expected number of shards of a leaf, from its name and without the table of rules."""
    parts = 1
    if re.search(r"(kernel|embedding|wpe)$", name):
        parts *= m.fsdp  # every matrix
    if re.search(r"attn/c_attn|mlp/c_fc|c_proj/kernel|wte", name):
        parts *= m.tensor  # all that has heads, the MLP's width or the vocabulary
    return parts


def test_each_device_holds_only_its_shard(mesh_config):
    total = held = 0
    for name, leaf in by_path(outcome(mesh_config).state).items():
        part = leaf.addressable_shards[0].data
        assert part.size * parts_of(name, mesh_config) == leaf.size, name
        total, held = total + leaf.nbytes, held + part.nbytes
    if mesh_config.fsdp == 8:
        assert held < total / 5  # an eighth, plus biases and norms
    if mesh_config.fsdp * mesh_config.tensor == 1:
        assert held == total


def test_the_compiled_step_holds_its_shard_and_computes_its_share(mesh_config):
    """Its arguments are the device's shard of the state, the tokens, the key and two numbers.
    Duplicated work would show in the FLOPs: no matmul is computed twice."""
    m, one, here = mesh_config, outcome(ONE), outcome(mesh_config)
    part = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(here.state))
    given = here.compiled.memory_analysis().argument_size_in_bytes
    assert part + TOKENS.nbytes <= given <= part + TOKENS.nbytes + 100
    assert matmuls(here) * (m.data * m.fsdp * m.tensor) == matmuls(one)
    # The rest is elementwise: 40 operations for each parameter of the shard, and activations. The
    # tensor axis divides the wide half of these, and not the residual stream, which the compiler
    # may compute again for each of its readers, also on one device.
    flops = [o.compiled.cost_analysis()["flops"] - matmuls(o, 1) for o in (one, here)]
    shard = sum(leaf.addressable_shards[0].data.size for leaf in jax.tree.leaves(here.state.params))
    activations = flops[0] / (m.data * m.fsdp) * (1 + 1 / m.tensor) / 2
    assert flops[1] < activations + 40 * shard


def matmuls(outcome: Outcome, rounds: int | None = None) -> int:
    """FLOPs of the matmuls of a step; `rounds`: of each loop, None: as many as it takes."""
    program, total = hlo.Program(outcome.compiled.as_text()), 0
    shapes = {i.name: i.shape for found in program.computations.values() for i in found}
    sizes = lambda shape: [int(n) for n in hlo.ARRAY.findall(shape)[0][1].split(",") if n]
    for i, times in program.executed("dot"):
        contracted = re.findall(r"lhs_contracting_dims={([\d,]*)}", i.attributes)[0].split(",")
        left = sizes(shapes[i.operands[0]])
        once = 2 * math.prod(sizes(i.shape)) * math.prod(left[int(n)] for n in contracted)
        total += once * (rounds or times)
    assert total
    return total


def sent(mesh_config: MeshConfig) -> dict[tuple[str, ...], list[tuple[str, int]]]:
    """Operand bytes of each collective in a step, by its mesh axes."""
    shape = {"data": mesh_config.data, "fsdp": mesh_config.fsdp, "tensor": mesh_config.tensor}
    found: dict[tuple[str, ...], list[tuple[str, int]]] = defaultdict(list)
    for c in hlo.Program(outcome(mesh_config).compiled.as_text()).collectives():
        found[c.axes(shape)] += [(c.kind, c.bytes)] * c.times
    return dict(found)


PARAMS = 16 * (12 + 8) + 12 * 16**2 + (3 + 1 + 4 + 1) * 16 + 6 * 16  # of CONFIG's model
TABLE = 16 * 12  # the tied table's gradient is reduced in two parts: lookup and head


def test_data_parallel_reduces_each_gradient_once_per_micro_batch():
    """And otherwise only the loss, a scalar."""
    found = sent(MESHES["data 8"])
    assert found.keys() == {("data",)}
    assert {kind for kind, _ in found[("data",)]} == {"all-reduce"}
    assert sum(nbytes for _, nbytes in found[("data",)]) == 2 * 4 * (PARAMS + TABLE + 1)


def test_fsdp_gathers_parameters_and_never_activations():
    """Each matrix twice, forward and backward, and each table once; gradients are reduced as with
    data parallelism."""
    found = sent(MESHES["fsdp 8"])
    assert found.keys() == {("fsdp",)}
    gathered = [nbytes * 8 // 4 for kind, nbytes in found[("fsdp",)] if kind == "all-gather"]
    assert sum(gathered) <= 2 * (16 * (12 + 8) + 2 * 12 * 16**2)
    assert max(gathered) <= 4 * 16**2  # one matrix at a time
    summed = sum(nbytes for kind, nbytes in found[("fsdp",)] if kind == "all-reduce")
    assert 2 * 4 * PARAMS < summed < 2 * 4 * (PARAMS + TABLE + 20)
    assert {kind for kind, _ in found[("fsdp",)]} == {"all-gather", "all-reduce"}


def test_tensor_parallel_reduces_activations_and_never_parameters():
    """Four (B, T, C) in each layer, and two for the sharded vocabulary: lookup and head."""
    found = sent(MESHES["tensor 4"])
    assert found.keys() == {("tensor",)}
    assert {kind for kind, _ in found[("tensor",)]} == {"all-reduce"}
    activations = 4 * 8 * 8 * 16  # float32, of one micro-batch
    big = [nbytes for _, nbytes in found[("tensor",)] if nbytes >= activations]
    assert sum(nbytes // activations for nbytes in big) == 2 * (4 + 2)


def test_moments_are_sharded_like_their_parameters(mesh_config):
    state = outcome(mesh_config).state
    opt_state = by_path(state.opt_state)
    for name, param in by_path(state.params).items():
        moments = [
            leaf for path, leaf in opt_state.items() if re.search(rf"/(mu|nu)/{name}$", path)
        ]
        assert len(moments) == 2, name
        for moment in moments:
            assert moment.sharding == param.sharding, name


VARIANTS = [
    replace(CONFIG.model, tie_head=tie_head, bias=bias)
    for tie_head in (True, False)
    for bias in (True, False)
]
VARIANTS.append(replace(CONFIG.model, n_kv_head=1, activation="swiglu"))
VARIANTS.append(replace(CONFIG.model, norm="rms", qk_norm=True, qk_norm_scale=True))


def layout(config: Config, vocab_size: int = VOCAB) -> TrainState:
    return assemble(config, vocab_size).layout


def leaves(model: ModelConfig) -> dict[str, Any]:
    """Parameters of a model with LoRA: trained and frozen ones have every kind of leaf."""
    state = layout(replace(CONFIG, model=model, optim=replace(CONFIG.optim, lora_rank=2)))
    return {**by_path(state.frozen), **by_path(state.params)}


def matches(name: str, ndim: int) -> list[int]:
    return [
        i
        for i, (pattern, spec) in enumerate(sharding.RULES)
        if re.search(rf"(^|/){pattern}$", name) and len(spec) in (0, ndim)
    ]


@pytest.mark.parametrize("model", VARIANTS, ids=lambda m: f"{m.tie_head}-{m.bias}-{m.activation}")
def test_each_leaf_has_exactly_one_rule(model):
    for name, leaf in leaves(model).items():
        found = matches(name, leaf.ndim)
        assert len(found) == 1, f"{name} with {leaf.ndim} axes matches the rules {found}"


def test_each_rule_has_a_leaf():
    used = {
        i
        for model in VARIANTS
        for name, leaf in leaves(model).items()
        for i in matches(name, leaf.ndim)
    }
    assert used == set(range(len(sharding.RULES)))


def test_an_own_embedding_table_is_sharded_like_wte():
    mesh = MESHES["data 2, fsdp 2, tensor 2"]
    state = outcome(mesh, model=WithPrevious).state
    found = {
        name: leaf for name, leaf in by_path(state.params).items() if name.endswith("embedding")
    }
    assert found.keys() == {"wte/embedding", "wse/embedding"}
    for leaf in found.values():
        assert leaf.sharding == NamedSharding(leaf.sharding.mesh, P("tensor", "fsdp"))
        assert leaf.addressable_shards[0].data.shape == (VOCAB // 2, 16 // 2)


def test_leaves_without_a_rule_are_replicated():
    mesh = sharding.make_mesh(MeshConfig(fsdp=8), rows=8)
    placed = sharding.shardings(mesh, {"mine": {"weights": jnp.zeros((3, 5))}})
    assert placed["mine"]["weights"].is_fully_replicated


# ---------------------------------------------------------------------------------------------
# The mesh


@pytest.mark.parametrize(
    ("rows", "fsdp", "tensor", "data"),
    [
        (12, 1, 1, 6),  # the largest number that divides the rows
        (16, 1, 1, 8),
        (4, 1, 1, 4),
        (7, 1, 1, 7),
        (11, 1, 1, 1),
        (12, 2, 1, 3),
        (16, 2, 2, 2),
        (16, 8, 1, 1),
        (16, 1, 3, 2),  # two of the eight devices are left over
    ],
)
def test_data_axis_uses_the_most_devices_that_divide_the_rows(rows, fsdp, tensor, data):
    mesh = sharding.make_mesh(MeshConfig(fsdp=fsdp, tensor=tensor), rows)
    assert dict(mesh.shape) == {"data": data, "fsdp": fsdp, "tensor": tensor}


def test_a_run_spreads_its_micro_batch():
    config = replace(CONFIG, optim=replace(CONFIG.optim, accumulate=4))  # 4 rows of 16
    assert assemble(config, VOCAB).mesh.shape["data"] == 4


@dataclass(frozen=True)
class Chip:
    """The attributes of a TPU v5p that JAX uses to lay out a mesh on its torus."""

    id: int
    coords: tuple[int, ...]
    platform: str = "tpu"
    device_kind: str = "TPU v5"
    core_on_chip: int = 0
    process_index: int = 0
    slice_index: int = 0


@pytest.mark.parametrize("sizes", [(2, 2, 1), (2, 2, 2), (4, 4, 4), (4, 4, 8)])
def test_every_mesh_lies_on_a_torus(sizes):
    """Also those that no set of its axes multiplies to: fsdp 32 of 4x4x4."""
    places = itertools.product(*map(range, sizes))
    chips: list[Any] = [Chip(i, place) for i, place in enumerate(places)]
    for m in estimate.meshes(len(chips), CHIPS["v5p"]):
        mesh = sharding.mesh_of(m, chips)
        assert tuple(mesh.shape.values()) == (m.data, m.fsdp, m.tensor)
        assert {chip.id for chip in mesh.devices.flat} == set(range(len(chips)))


@pytest.mark.parametrize(
    ("mesh", "parts"),
    [
        (
            MeshConfig(data=3, fsdp=2, tensor=2),
            ["data=3 x fsdp=2 x tensor=2 needs 12 devices, and 8 are available", "mesh.tensor"],
        ),
        (
            MeshConfig(tensor=16),
            ["data=1 x fsdp=1 x tensor=16 needs 16 devices, and 8 are available", "mesh.tensor"],
        ),
        (
            MeshConfig(data=3, fsdp=2),
            ["of 8 rows is not divisible by mesh.data * mesh.fsdp = 6", "1, 2, 4, 8"],
        ),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(mesh, parts):
    with pytest.raises(UserError) as caught:
        sharding.make_mesh(mesh, rows=8)
    assert all(part in str(caught.value) for part in parts)


@pytest.mark.parametrize(
    ("model", "mesh", "parts"),
    [
        (
            replace(CONFIG.model, n_head=2),
            MeshConfig(data=1, tensor=4),
            ["params/h/attn/c_attn/bias has an axis of 2", "by mesh.tensor=4", ": 1, 2"],
        ),
        (
            replace(CONFIG.model, n_embd=12),
            MeshConfig(data=1, fsdp=8),
            [
                "params/h/attn/c_attn/kernel has an axis of 12",
                "by mesh.fsdp=8",
                "1, 2, 3, 4, 6, 12",
            ],
        ),
    ],
)
def test_a_model_that_the_mesh_does_not_divide_is_refused(model, mesh, parts):
    with pytest.raises(UserError) as caught:
        assemble(replace(CONFIG, model=model, mesh=mesh), VOCAB)
    assert all(part in str(caught.value) for part in parts)


# ---------------------------------------------------------------------------------------------
# From the mesh to one device


def watch_steps(monkeypatch: pytest.MonkeyPatch) -> tuple[list[Any], list[TrainState]]:
    """Lists filled while `train` runs: its jitted steps, and the shardings of its states."""
    compiled: list[Any] = []
    states: list[TrainState] = []
    real_jit = jax.jit

    def spying_jit(function: Any, **options: Any) -> Any:
        jitted = real_jit(function, **options)
        if getattr(function, "__name__", "") != "steps":
            return jitted
        compiled.append(jitted)

        def call(state: TrainState, *rest: Any) -> Any:
            states.append(jax.tree.map(lambda leaf: leaf.sharding, state))
            result = jitted(state, *rest)
            states.append(jax.tree.map(lambda leaf: leaf.sharding, result[0]))
            return result

        return call

    monkeypatch.setattr(jax, "jit", spying_jit)
    return compiled, states


def test_a_run_on_four_devices_samples_on_one(
    tmp_path: Path, play: str, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "play.txt").write_text(play, encoding="utf-8")
    mesh = MeshConfig(data=1, fsdp=2, tensor=2)
    config = replace(
        CONFIG,
        steps=10,
        eval_every=10,
        save_every=10,
        steps_per_dispatch=4,
        data=DataConfig(text=str(tmp_path / "play.txt")),
        mesh=mesh,
    )
    with monkeypatch.context() as patch:
        compiled, states = watch_steps(patch)
        train(config, tmp_path / "run", report=Report(quiet=True))
    # The state keeps its shardings before and after every call, so one compilation suffices.
    run = Run(tmp_path / "run")
    expected = [leaf.sharding for leaf in jax.tree.leaves(layout(config, run.tokenizer.vocab_size))]
    assert len(states) == 2 * 3
    for state in states:
        assert jax.tree.leaves(state) == expected
    assert [jitted._cache_size() for jitted in compiled] == [1]

    one = sampled(run, None, 0.0)
    assert all(len(text) == 30 and set(text) <= set(play) for text in one)
    for other in (mesh, MeshConfig(data=2, tensor=4), MeshConfig(data=1, fsdp=4)):
        assert sampled(run, other, 0.0) == one
    assert sampled(run, mesh, 1.0) == sampled(run, None, 1.0) != one
    three = sampled(run, MeshConfig(data=2), 0.0, num_samples=3)  # in slots for four
    assert three == [one[0]] * 3


def sampled(
    run: Run, mesh: MeshConfig | None, temperature: float, num_samples: int = 2
) -> list[str]:
    """Samples of 30 tokens."""
    loaded = gptjax.load(run.directory, mesh=mesh)
    sampling = Sampling(temperature, top_k=5)
    request = lambda i: loaded.request("KING:", 30, sampling=sampling, seed=3, sample=i)
    return [reply.text for reply in loaded.complete([request(i) for i in range(num_samples)])]


@pytest.mark.parametrize("model", [CONFIG.model, MODERN.model], ids=["classic", "modern"])
def test_the_cache_is_sharded_over_rows_and_heads(model):
    mesh = sharding.mesh_of(MeshConfig(data=2, fsdp=2, tensor=2))
    here = sharding.on_mesh(GPT(model, VOCAB), mesh)
    cache = jax.jit(lambda: here.init_cache(4))()
    heads = "tensor" if model.n_kv_head is None else None  # a single head is not sharded
    wanted = NamedSharding(mesh, P(None, ("data", "fsdp"), heads))
    for leaf in (cache.k, cache.v):
        assert leaf.sharding.is_equivalent_to(wanted, leaf.ndim)


# ---------------------------------------------------------------------------------------------
# The table of docs/scaling.md


PAGE = (Path(__file__).resolve().parents[1] / "docs" / "scaling.md").read_text()


def cells(markdown: str) -> list[list[str]]:
    """The rows of a Markdown table, without its header."""
    lines = [line.strip().strip("|").split("|") for line in markdown.splitlines() if "|" in line]
    return [[cell.strip() for cell in line] for line in lines][2:]


def test_the_page_shows_every_mesh():
    shown = cells(PAGE.split("<!-- gptjax meshes -->")[1].split("<!--")[0])
    assert [row[0] for row in shown] == [meshes.described(mesh) for mesh in meshes.meshes()]
    assert len(shown) == 1 + 3 + 6 + 10


@pytest.mark.slow
@pytest.mark.parametrize("modern", [False, True], ids=["plain", "modern"])
def test_every_mesh_has_the_same_losses_and_the_communication_of_the_page(modern):
    config = meshes.MODERN if modern else meshes.PLAIN
    rows = [meshes.measure(replace(config, mesh=mesh)) for mesh in meshes.meshes()]
    for row in rows:
        np.testing.assert_allclose(row.losses, rows[0].losses, rtol=0, atol=1e-5)
    if not modern:
        console = Console(width=400, file=io.StringIO())
        console.print(meshes.table(rows))
        made = cells(console.file.getvalue())  # pyright: ignore[reportAttributeAccessIssue]
        shown = cells(PAGE.split("<!-- gptjax meshes -->")[1].split("<!--")[0])
        for a, b in zip(made, shown, strict=True):
            assert [a[0], *a[2:]] == [b[0], *b[2:]]  # but for the rounding of losses
