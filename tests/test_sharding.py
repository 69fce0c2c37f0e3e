"""Tests of the mesh on eight simulated devices: where things lie never changes the numbers."""

import functools
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax import sharding
from gptjax.build import build_model
from gptjax.cli import SampleCommand
from gptjax.config import Config, DataConfig, MeshConfig, ModelConfig, OptimConfig
from gptjax.errors import UserError
from gptjax.optim import make_optimizer
from gptjax.report import Report
from gptjax.sample import stream
from gptjax.step import TrainState, init_state, make_evaluate, make_train_steps, whole_split_starts
from gptjax.train import train

VOCAB = 13
CONFIG = Config(
    steps=20,
    batch_size=16,
    steps_per_dispatch=5,
    model=ModelConfig(n_layer=1, n_head=4, n_embd=16, block_size=8, dropout=0.2),
    optim=OptimConfig(learning_rate=0.01, accumulate=2),
)
MODERN = replace(
    CONFIG,
    model=replace(
        CONFIG.model, n_kv_head=2, norm="rms", position="rotary", activation="swiglu", ngram=3
    ),
    optim=replace(CONFIG.optim, kind="muon", ema=0.5),
)
TOKENS = np.random.default_rng(0).integers(0, VOCAB, 300).astype(np.uint16)
ONE = MeshConfig(data=1)
MESHES = {
    "data 8": MeshConfig(data=8),
    "fsdp 8": MeshConfig(data=1, fsdp=8),
    "tensor 2": MeshConfig(data=1, tensor=2),
    "data 2, fsdp 2, tensor 2": MeshConfig(data=2, fsdp=2, tensor=2),
    "data 4, tensor 2": MeshConfig(data=4, tensor=2),
}
# Tiny programs take longer to compile than to run; this way a third as long.
QUICK = {"xla_backend_optimization_level": 0}
quick_jit = functools.partial(jax.jit, compiler_options=QUICK)


class Outcome(NamedTuple):
    """Of updates on a mesh."""

    first: TrainState  # on the host
    state: TrainState  # on the mesh
    losses: np.ndarray
    evaluation: float


@functools.cache
def outcome(mesh_config: MeshConfig, modern: bool = False) -> Outcome:
    config = replace(MODERN if modern else CONFIG, mesh=mesh_config)
    mesh = sharding.make_mesh(config)
    model, optimizer = build_model(config.model, VOCAB), make_optimizer(config)
    everywhere, rows = sharding.replicated(mesh), sharding.batch_sharding(mesh)
    key, tokens = jax.device_put((jax.random.key(0), TOKENS), everywhere)
    init = functools.partial(init_state, model, optimizer, averaged=modern)
    placed = sharding.shardings(mesh, jax.eval_shape(init, key))
    state = quick_jit(init, out_shardings=placed)(key)
    first = jax.tree.map(np.asarray, state)
    steps = quick_jit(
        make_train_steps(model, optimizer, config, rows),
        donate_argnums=0,
        out_shardings=(placed, everywhere),
    )
    state, out = steps(state, tokens, key, 5)
    evaluate = quick_jit(make_evaluate(model, config, rows))
    starts = jax.device_put(whole_split_starts(len(TOKENS), config.batch_size, 8), everywhere)
    return Outcome(
        first, state, np.asarray(out.loss), float(evaluate(state.weights, tokens, starts))
    )


@pytest.fixture(params=MESHES.values(), ids=list(MESHES))
def mesh_config(request: pytest.FixtureRequest) -> MeshConfig:
    return request.param


def by_path(tree: Any) -> dict[str, Any]:
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(p, simple=True, separator="/"): leaf for p, leaf in flat}


def abstract_state(config: Config) -> TrainState:
    model, optimizer = build_model(config.model, VOCAB), make_optimizer(config)
    init = functools.partial(init_state, model, optimizer)
    return jax.eval_shape(init, jax.random.key(0))


# ---------------------------------------------------------------------------------------------
# The numbers


def test_init_is_the_same_on_every_mesh(mesh_config):
    one, here = outcome(ONE), outcome(mesh_config)
    jax.tree.map(
        lambda x, y: np.testing.assert_array_equal(x, y, strict=True), one.first, here.first
    )


def test_muon_and_the_average_are_the_same_on_every_mesh(mesh_config):
    """With grouped queries, rotary positions and SwiGLU; the state is where the rules say."""
    one, here = outcome(ONE, modern=True), outcome(mesh_config, modern=True)
    np.testing.assert_allclose(here.losses, one.losses, rtol=0, atol=1e-5)
    assert here.evaluation == pytest.approx(one.evaluation, abs=1e-5)
    for name, leaf in by_path(here.state.params).items():
        assert by_path(here.state.average)[name].sharding == leaf.sharding


def test_training_is_the_same_on_every_mesh(mesh_config):
    one, here = outcome(ONE), outcome(mesh_config)
    np.testing.assert_allclose(here.losses, one.losses, rtol=0, atol=1e-5)
    assert here.evaluation == pytest.approx(one.evaluation, abs=1e-5)
    assert len(set(one.losses.tolist())) == 5


# ---------------------------------------------------------------------------------------------
# The places


def test_the_state_uses_every_device_of_the_mesh(mesh_config):
    m = mesh_config
    for leaf in jax.tree.leaves(outcome(mesh_config).state):
        assert len(leaf.sharding.device_set) == m.data * m.fsdp * m.tensor


def parts_of(name: str, m: MeshConfig) -> int:
    """Into how many parts a leaf should be cut, told by its name and without the table of rules."""
    parts = 1
    if re.search(r"(kernel|embedding|wpe)$", name):
        parts *= m.fsdp  # every matrix
    if re.search(r"attn/c_attn|mlp/c_fc|c_proj/kernel", name):
        parts *= m.tensor  # all that has heads or the MLP's width
    return parts


def test_each_device_holds_its_part_and_no_more(mesh_config):
    total = held = 0
    for name, leaf in by_path(outcome(mesh_config).state).items():
        part = leaf.addressable_shards[0].data
        assert part.size * parts_of(name, mesh_config) == leaf.size, name
        total, held = total + leaf.nbytes, held + part.nbytes
    if mesh_config.fsdp == 8:
        assert held < total / 5  # an eighth, and the biases and norms, which are tiny in real life
    if mesh_config.fsdp * mesh_config.tensor == 1:
        assert held == total


def test_moments_lie_where_their_parameters_do(mesh_config):
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
    replace(CONFIG.model, tie_head=tie_head, bias=bias, qkv_bias=qkv_bias)
    for tie_head in (True, False)
    for bias, qkv_bias in ((True, True), (True, False), (False, False))
]
VARIANTS.append(replace(CONFIG.model, n_kv_head=1, activation="swiglu"))


def matches(name: str, ndim: int) -> list[int]:
    return [
        i
        for i, (pattern, spec) in enumerate(sharding.RULES)
        if re.search(rf"(^|/){pattern}$", name) and len(spec) in (0, ndim)
    ]


@pytest.mark.parametrize(
    "model", VARIANTS, ids=lambda m: f"{m.tie_head}-{m.bias}-{m.qkv_bias}-{m.activation}"
)
def test_each_leaf_has_exactly_one_rule(model):
    params = by_path(abstract_state(replace(CONFIG, model=model)).params)
    for name, leaf in params.items():
        found = matches(name, leaf.ndim)
        assert len(found) == 1, f"{name} with {leaf.ndim} axes matches the rules {found}"


def test_each_rule_has_a_leaf():
    used = {
        i
        for model in VARIANTS
        for name, leaf in by_path(abstract_state(replace(CONFIG, model=model)).params).items()
        for i in matches(name, leaf.ndim)
    }
    assert used == set(range(len(sharding.RULES)))


def test_a_leaf_of_your_own_module_is_held_whole():
    mesh = sharding.make_mesh(replace(CONFIG, mesh=MeshConfig(fsdp=8)))
    placed = sharding.shardings(mesh, {"mine": {"weights": jnp.zeros((3, 5))}})
    assert placed["mine"]["weights"].is_fully_replicated


# ---------------------------------------------------------------------------------------------
# The mesh


@pytest.mark.parametrize(
    ("batch_size", "accumulate", "fsdp", "tensor", "data"),
    [
        (12, 1, 1, 1, 6),  # the largest number that divides the batch
        (16, 1, 1, 1, 8),
        (16, 4, 1, 1, 4),  # it is the micro-batch that is spread
        (7, 1, 1, 1, 7),
        (11, 1, 1, 1, 1),
        (12, 1, 2, 1, 3),
        (16, 1, 2, 2, 2),
        (16, 1, 8, 1, 1),
        (16, 1, 1, 3, 2),  # two of the eight devices are left over
    ],
)
def test_data_takes_what_fits(batch_size, accumulate, fsdp, tensor, data):
    config = replace(
        CONFIG,
        batch_size=batch_size,
        optim=replace(CONFIG.optim, accumulate=accumulate),
        mesh=MeshConfig(fsdp=fsdp, tensor=tensor),
    )
    assert dict(sharding.make_mesh(config).shape) == {"data": data, "fsdp": fsdp, "tensor": tensor}


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        (
            MeshConfig(data=3, fsdp=2, tensor=2),
            "the mesh data=3 x fsdp=2 x tensor=2 needs 12 devices and there are 8; lower "
            "mesh.data, mesh.fsdp or mesh.tensor",
        ),
        (
            MeshConfig(tensor=16),
            "the mesh data=1 x fsdp=1 x tensor=16 needs 16 devices and there are 8; lower "
            "mesh.data, mesh.fsdp or mesh.tensor",
        ),
        (
            MeshConfig(data=3, fsdp=2),
            "a micro-batch of 8 rows is not divisible by mesh.data * mesh.fsdp = 6; sizes "
            "that divide it: 1, 2, 4, 8",
        ),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(mesh, message):
    with pytest.raises(UserError) as caught:
        sharding.make_mesh(replace(CONFIG, mesh=mesh))
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("model", "mesh", "message"),
    [
        (
            replace(CONFIG.model, n_head=2),
            MeshConfig(data=1, tensor=4),
            "params/h/attn/c_attn/bias has an axis of 2, not divisible by mesh.tensor=4; sizes "
            "that divide it: 1, 2",
        ),
        (
            replace(CONFIG.model, n_embd=12),
            MeshConfig(data=1, fsdp=8),
            "params/h/attn/c_attn/kernel has an axis of 12, not divisible by mesh.fsdp=8; sizes "
            "that divide it: 1, 2, 3, 4, 6, 12",
        ),
    ],
)
def test_a_model_that_cannot_be_cut_is_refused(model, mesh, message):
    config = replace(CONFIG, model=model, mesh=mesh)
    with pytest.raises(UserError) as caught:
        sharding.shardings(sharding.make_mesh(config), abstract_state(config))
    assert str(caught.value) == message


# ---------------------------------------------------------------------------------------------
# From the mesh to one device


def watch_train_steps(monkeypatch: pytest.MonkeyPatch) -> tuple[list[Any], list[TrainState]]:
    """Lists that fill as `train` runs: its compiled train_steps, the shardings of its states."""
    compiled: list[Any] = []
    states: list[TrainState] = []
    real_jit = jax.jit

    def spying_jit(function: Any, **options: Any) -> Any:
        jitted = real_jit(function, compiler_options=QUICK, **options)
        if getattr(function, "__name__", "") != "train_steps":
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


def test_a_run_on_four_devices_speaks_on_one(
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
        compiled, states = watch_train_steps(patch)
        train(config, tmp_path / "run", report=Report(quiet=True))
    # The state lies as the rules say before and after every call, so one compilation serves all.
    placed = sharding.shardings(sharding.make_mesh(config), abstract_state(config))
    assert len(states) == 2 * 3
    for state in states:
        assert jax.tree.leaves(state) == jax.tree.leaves(placed)
    assert [jitted._cache_size() for jitted in compiled] == [1]

    command = SampleCommand(run=str(tmp_path / "run"), prompt="KING:", max_new_tokens=12, seed=3)
    pieces = list(stream(replace(command, num_samples=2)))
    for i in range(2):
        text = "".join(piece[i] for piece in pieces)
        assert len(text) == 12 and set(text) <= set(play)
