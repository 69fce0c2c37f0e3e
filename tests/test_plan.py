"""Tests of --plan: its estimates against arrays and compiled programs, and its errors."""

import io
import itertools
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from rich.console import Console
from run_helpers import QUIET, MeanOfThePast, message, text_file

from gptjax.assembly import assemble, trace
from gptjax.cli import plan as command
from gptjax.cli.train import parse_train
from gptjax.config import Config, DataConfig, MeshConfig, ModelConfig, OptimConfig
from gptjax.errors import UserError
from gptjax.model import GPT
from gptjax.parallel import kernels
from gptjax.parallel.flops import flops_per_token
from gptjax.plan import aot, chips, estimate, room
from gptjax.plan.chips import CHIPS, GIB, Chip, read_target
from gptjax.plan.estimate import Cost, Times
from gptjax.plan.hlo import Collective, Program
from gptjax.plan.plan import flags, plan
from gptjax.presets import PRESETS
from gptjax.training import train

ROOT = Path(__file__).resolve().parents[1]
CONFIG = Config(
    batch_size=16,
    steps_per_dispatch=1,
    model=ModelConfig(n_layer=2, n_head=4, n_embd=32, block_size=16, vocab_size=64),
    optim=OptimConfig(accumulate=2),
)


def printed(config: Config, target: str) -> str:
    """The output of a plan, followed by its error, if any."""
    out = io.StringIO()
    try:
        plan(config, target, Console(file=out, width=200, highlight=False))
    except UserError as error:
        out.write(f"error: {error}")
    return out.getvalue()


# ---------------------------------------------------------------------------------------------
# Targets


@pytest.mark.parametrize(
    ("text", "chip", "count"),
    [
        ("v5e:4x4", "v5e", 16),
        ("v5p:2x2x1", "v5p", 4),
        ("h100:8", "h100", 8),
        ("a100:16", "a100", 16),
    ],
)
def test_targets(text, chip, count):
    target = read_target(text)
    assert (target.chip, target.count, str(target)) == (CHIPS[chip], count, text)


KNOWN = ", ".join(CHIPS)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (
            "v7:4x4",
            ["unknown chip 'v7'", f"one of {KNOWN}", "such as v5e:4x4 or h100:8"],
        ),
        ("v5e", ["shape for TPU v5e", "such as v5e:4x4"]),
        ("v5e:16", ["shape for TPU v5e", "such as v5e:4x4"]),
        ("v5p:4x4", ["shape for TPU v5p", "such as v5p:2x2x2"]),
        ("v5e:4x0", ["shape for TPU v5e", "such as v5e:4x4"]),
        ("h100:eight", ["shape for NVIDIA H100 80GB HBM3", "such as h100:8"]),
        ("h100:12", ["holds 8 NVIDIA H100 80GB HBM3", "at most 8 or a multiple"]),
        ("v5e:32x16", ["at most 256 TPU v5e", "512", "give fewer"]),
    ],
)
def test_impossible_targets_are_refused(text, parts):
    with pytest.raises(UserError) as caught:
        read_target(text)
    message = str(caught.value)
    assert message.startswith(f"--plan {text}: ") and all(part in message for part in parts)


def test_every_chip_has_its_source_and_every_gpu_a_target():
    for name, chip in CHIPS.items():
        assert chip.source and chip.title and 0 < chip.usable <= 1, name
        assert (chip.kind == "gpu") == bool(chip.target)
        if chip.kind == "gpu":
            assert f"core_count: {chip.target['core_count']}" in chips.gpu_target(chip)


# ---------------------------------------------------------------------------------------------
# The estimate


def shapes(config: Config) -> Any:
    return assemble(replace(config, mesh=MeshConfig(1)), 64).layout


@pytest.mark.parametrize("mesh", [MeshConfig(8), MeshConfig(1, 8), MeshConfig(2, 2, 2)])
def test_estimated_state_equals_what_a_device_holds(mesh):
    config = replace(CONFIG, mesh=mesh)
    cost = estimate.estimate(config, shapes(config), mesh)
    state = assemble(config, 64).start()
    held = lambda tree: sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree))
    assert cost.memory["parameters"] == held(state.params)
    assert cost.memory["parameters"] + cost.memory["optimizer"] == held(state)


@pytest.mark.parametrize(
    ("mesh", "kind", "tolerance"),
    [
        (MeshConfig(8), "all-reduce", 0.05),
        (MeshConfig(1, 8), "all-gather", 0.35),
    ],
)
def test_estimated_collectives_are_close_to_the_compiled_steps(mesh, kind, tolerance):
    """With a wider model, so that what the estimate leaves out stays small."""
    model = replace(CONFIG.model, n_embd=128, n_layer=13)  # rolled
    config = replace(CONFIG, mesh=mesh, model=model)
    cost = estimate.estimate(config, shapes(config), mesh)
    sent = lambda found: sum(c.wire * c.times for c in found if c.kind == kind)
    compiled = trace(assemble(config, 64), 1000).lower().compile()
    expected = sent(Program(compiled.as_text() or "").collectives())
    assert sent(cost.collectives) == pytest.approx(expected, rel=tolerance)


@pytest.mark.parametrize("mesh", [MeshConfig(8), MeshConfig(1, 8)])
def test_collectives_use_the_compute_dtype(mesh):
    """As the TPU and GPU compilers do; the CPU compiler reduces bfloat16 in float32."""
    state = shapes(CONFIG)

    def sent(dtype: Any) -> float:
        config = replace(CONFIG, model=replace(CONFIG.model, dtype=dtype))
        found = estimate.estimate(config, state, mesh).collectives
        return sum(c.wire * c.times for c in found)

    assert sent("bfloat16") == pytest.approx(sent("float32") / 2)


def test_the_roofline_is_the_slowest_resource():
    chip = replace(CHIPS["h100"], flops=100.0, bandwidth=10.0, links=4.0, network=1.0)
    near, far = tuple(range(8)), (0, 8)
    collectives = [Collective("all-reduce", 16, near, 2), Collective("all-gather", 3, far, 1)]
    cost = Cost({"a": 1.0, "b": 2.0}, 500.0, 20.0, collectives, 400.0)
    times = estimate.times(cost, chip)
    assert times == Times(5.0, 2.0, 2 * 2 * 7 / 8 * 16 / 4 + 3 / 1)
    assert (times.least, times.most) == (17.0, 24.0)
    assert cost.total == 3.0


def test_more_shards_take_less_memory_and_traffic():
    config = replace(PRESETS["7b"], optim=OptimConfig())
    state = shapes(replace(config, model=replace(config.model, attention="plain")))
    costs = [estimate.estimate(config, state, MeshConfig(1, n)) for n in (8, 16, 32, 64)]
    assert all(a.total > 1.5 * b.total for a, b in itertools.pairwise(costs))
    assert all(a.traffic > 1.5 * b.traffic for a, b in itertools.pairwise(costs))


def test_sliding_window_attention_costs_less():
    config = PRESETS["gpt2"]
    config = replace(config, model=replace(config.model, attention="plain"))
    windowed = replace(config, model=replace(config.model, window=64))
    whole, less = (estimate.estimate(c, shapes(config), MeshConfig(8)) for c in (config, windowed))
    assert less.flops < whole.flops and less.traffic < whole.traffic
    assert less.memory["activations"] < whole.memory["activations"] / 2


def test_rematerialisation_trades_memory_for_flops():
    config = PRESETS["gpt2"]
    state, mesh = shapes(config), MeshConfig(8)

    def cost(remat: bool, saves: Any = "nothing") -> Cost:
        model = replace(config.model, remat=remat, remat_saves=saves)
        return estimate.estimate(replace(config, model=model), state, mesh)

    plain, dots, nothing = cost(False), cost(True, "dots"), cost(True)
    assert plain.memory["activations"] > dots.memory["activations"] > nothing.memory["activations"]
    assert plain.flops < dots.flops < nothing.flops
    assert plain.useful == dots.useful == nothing.useful


# ---------------------------------------------------------------------------------------------
# FLOPs of a traced function


def flops(function: Any, *shapes: tuple[int, ...]) -> int:
    return aot.count_flops(jax.make_jaxpr(function)(*[jnp.zeros(s) for s in shapes]).jaxpr)


def test_flops_of_matmuls_loops_branches_and_devices():
    assert flops(jnp.matmul, (4, 5), (5, 6)) == 2 * 4 * 5 * 6
    layers = lambda x, ws: jax.lax.scan(lambda x, w: (x @ w, None), x, ws)[0]
    assert flops(layers, (2, 3), (7, 3, 3)) == 7 * 2 * 2 * 3 * 3
    either = lambda x: jax.lax.cond(x.sum() > 0, lambda: (x @ x) @ x, lambda: x @ x)
    assert flops(either, (3, 3)) == 2 * 2 * 27
    auto = {"axis_types": (AxisType.Auto,), "devices": jax.devices()[:4]}
    mesh = jax.make_mesh((4,), ("a",), **auto)
    cut = jax.shard_map(lambda x: x @ x.T, mesh=mesh, in_specs=P("a"), out_specs=P("a"))
    assert flops(cut, (8, 3)) == 4 * 2 * 2 * 3 * 2


def test_flops_of_cudnns_attention():
    """Of the half of the scores that is not masked: two products forward, five backward."""
    loss = lambda q, k, v: kernels.cudnn(*(x.astype(jnp.bfloat16) for x in (q, k, v))).sum()
    shapes = (2, 128, 4, 8), (2, 128, 4, 8), (2, 128, 4, 8)
    with aot._assumed_cudnn():
        assert flops(loss, *shapes) == 2 * 2 * 4 * 128 * 128 * 8
        assert flops(jax.grad(loss), *shapes) == 7 * 2 * 4 * 128 * 128 * 8


@pytest.mark.parametrize("remat", [False, True])
def test_counted_flops_of_a_step_match_the_estimate(remat):
    config = replace(CONFIG, model=replace(CONFIG.model, n_embd=64, remat=remat))
    setup = assemble(config, 64)
    counted = aot.count_flops(trace(setup, 1000).jaxpr.jaxpr)
    cost = estimate.estimate(config, setup.layout, MeshConfig(1))
    assert counted == pytest.approx(cost.flops, rel=0.03)
    tokens = 16 * 16
    expected = flops_per_token(config.model, setup.layout.params) * tokens
    assert cost.useful == expected and (cost.flops > expected) == remat


# ---------------------------------------------------------------------------------------------
# The command


@pytest.fixture
def no_compiler(monkeypatch):
    monkeypatch.setattr(aot, "topology", lambda target: None)


def test_a_plan_that_does_not_fit_proposes_one_that_does(no_compiler):
    config = PRESETS["gpt2-xl"]
    text = printed(config, "v5e:4x4")
    assert "estimated analytically" in text and "pip install -e '.[plan]'" in text
    error = text.splitlines()[-1].partition("error: ")[2]
    assert error.startswith("it does not fit: a device needs ")
    assert "GiB, and TPU v5e has 15.8 GiB; this fits: --mesh.data" in error
    words = error.partition("this fits: ")[2].split()
    again = parse_train(["--config", "gpt2-xl", *words]).settings
    assert "error" not in printed(again, "v5e:4x4")
    assert flags(again, config).split() == words


def test_a_plan_that_fits_is_printed(no_compiler):
    lines = printed(PRESETS["gpt2"], "h100:8").splitlines()
    assert lines[0] == (
        "h100:8: 8 x NVIDIA H100 80GB HBM3, data 8 x fsdp 1 x tensor 1; per device 15 x 4 "
        "sequences of 1024 tokens; rematerialisation off"
    )
    names = [line.split("  ")[0] for line in lines]
    for kind in ("parameters", "optimizer", "gradients", "activations", "total", "available"):
        assert kind in names
    for kind in ("compute", "memory", "network", "all-reduce"):
        assert kind in names
    assert lines[-1].startswith("limited by ") and lines[-1].endswith(CHIPS["h100"].source)
    assert [x.split(":")[0] for x in lines[-3:-1]] == ["lower bound", "without overlap"]


@pytest.mark.parametrize("remat", [False, True])
def test_the_command_accepts_the_proposed_flags(remat):
    config, saves = PRESETS["gpt2"], "dots" if remat else "nothing"
    model = replace(config.model, remat=remat, remat_saves=saves)
    wanted = replace(config, mesh=MeshConfig(2, 4), model=model)
    start = replace(config, model=replace(config.model, remat=not remat))
    words = flags(wanted, start).split()
    off = [] if remat else ["--model.remat"]
    assert parse_train(["--config", "gpt2", *off, *words]).settings == wanted


def test_a_run_that_fits_nowhere_is_refused(no_compiler):
    config = replace(PRESETS["7b"], batch_size=8, optim=OptimConfig(accumulate=8))
    error = printed(config, "v5e:1x1").splitlines()[-1]
    assert "TPU v5e has 15.8 GiB, and no mesh, accumulation or rematerialisation" in error
    assert error.endswith("use more devices")


def test_models_other_than_a_gpt_are_refused(tmp_path):
    path = tmp_path / "own.py"
    path.write_text(
        "from gptjax import GPT, PRESETS\nconfig = PRESETS['tiny']\n"
        "class Mine(GPT):\n    pass\nmodel = Mine\n"
    )
    for config in ("bigram", "lecture/7-layernorm", str(path)):
        with pytest.raises(UserError) as caught:
            command.main(["v5e:4x4", "--config", config], "gptjax plan")
        assert "only" in str(caught.value) and "GPT" in str(caught.value)
        assert config in str(caught.value) and "\n" not in str(caught.value)


def test_chips_are_found_by_device_kind():
    """Kinds from jax/_src/pallas/mosaic/tpu_info.py and from drivers."""
    for kind, name in {
        "TPU v4": "v4",
        "TPU v5 lite": "v5e",
        "TPU v5": "v5p",
        "TPU v5p": "v5p",
        "TPU v6 lite": "v6e",
        "NVIDIA H100 80GB HBM3": "h100",
    }.items():
        assert chips.by_device_kind(kind) is chips.CHIPS[name]
    assert chips.by_device_kind("TPU v4 lite") is chips.by_device_kind("cpu") is None


@pytest.mark.parametrize(
    ("change", "largest"),
    [
        ({"batch_size": 10**9}, "batch"),
        ({"model": ModelConfig(n_embd=2_000_000)}, "parameters"),
        ({"model": ModelConfig(n_embd=2**31 - 4, n_layer=2**31 - 1)}, "parameters"),
        ({"eval_batches": 10**9}, "evaluation"),
        ({"steps_per_dispatch": 2 * 10**9}, "calls of the device"),
    ],
)
def test_sizes_that_fit_no_memory_are_refused_before_the_folder(
    tmp_path, play, monkeypatch, change, largest
):
    monkeypatch.setattr(room, "memory_of_device", lambda: 16.0 * GIB)
    config = replace(CONFIG, data=text_file(tmp_path, play), mesh=MeshConfig(data=1), **change)
    error = message(train, config, tmp_path / "run", report=QUIET)
    assert re.match(
        rf"this run needs about [\d,.]+ GiB of a device's memory, of which [\d,.]+ GiB for the "
        rf"{largest}, and a device here has 16.0 GiB; lower --",
        error,
    )
    assert not (tmp_path / "run").exists()


def test_models_of_ones_own_and_samples_are_refused_too(tmp_path, play, monkeypatch):
    monkeypatch.setattr(room, "memory_of_device", lambda: 16.0 * GIB)
    config = replace(CONFIG, data=text_file(tmp_path, play), batch_size=10**9)
    error = message(train, config, tmp_path / "run", model=MeanOfThePast, report=QUIET)
    assert "GiB for the batch" in error
    small = GPT(CONFIG.model, 64)
    room.check_sampling(small, 1000, 64)
    error = message(room.check_sampling, small, 10**9, 64)
    assert error.startswith("drawing 1000000000 samples at once needs about ")


def test_memory_of_this_machine():
    assert 2**28 < room.memory_of_device() * jax.local_device_count() < 2**50


def test_plan_here_compiles_the_step(tmp_path, play):
    """On the simulated devices, with the tokenizer's vocabulary size."""
    (tmp_path / "play.txt").write_text(play)
    model = replace(CONFIG.model, vocab_size=None)
    config = replace(CONFIG, data=DataConfig(text=str(tmp_path / "play.txt")), model=model)
    lines = printed(config, "here").splitlines()
    assert "data 8 x fsdp 1 x tensor 1; per device 2 x 1 sequences of 16 tokens" in lines[0]
    assert lines[1].startswith("the step compiled in ")
    assert "activations, workspace" in "\n".join(lines)
    [reduced] = [line.split() for line in lines if line.startswith("all-reduce")]
    assert reduced[1] == "data" and int(reduced[2]) >= 2
    assert lines[-1].endswith("measured now with a large matmul and a large addition")


def test_the_command_makes_no_folder_and_refuses_in_one_line(tmp_path):
    words = [sys.executable, str(ROOT / "train.py"), "--config", "gpt2", "--plan", "v5e:4by4"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stdout == "" and not list(tmp_path.iterdir())
    assert done.stderr.startswith("train.py: error: --plan v5e:4by4: ")
    assert done.stderr.count("\n") == 1


# ---------------------------------------------------------------------------------------------
# Compilation for absent machines

COMPILE = """
import json, sys
from dataclasses import replace
from gptjax.plan import aot
from gptjax.plan import chips
from gptjax.parallel import kernels
from gptjax.config import Config, MeshConfig, ModelConfig, OptimConfig
model = ModelConfig(n_layer=13, n_head=2, n_embd=128, block_size=256, vocab_size=512,
                    dtype="bfloat16", attention="auto", remat=True)
target = chips.read_target(sys.argv[1])
ways = target.count // 2
config = Config(batch_size=2 * ways, steps_per_dispatch=1, loss_chunk=128, model=model,
                optim=OptimConfig(accumulate=2), mesh=MeshConfig(1, ways, 2))
compiled = aot.compile_step(config, 512, aot.topology(target))
kinds = sorted({c.kind for c in compiled.collectives if len(c.group) > 1})
print(json.dumps([compiled.refused, compiled.by, compiled.temporaries, compiled.flops, kinds]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "text", ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "h100:4", "a100:8"]
)
def test_the_step_compiles_for_absent_devices(text):
    """With the attention kernel; in subprocesses, because libtpu allows one target each."""
    chip: Chip = read_target(text).chip
    if aot.compiler(chip.kind) is None:
        pytest.skip("needs a compiler: pip install -e '.[plan]'")
    words = [sys.executable, "-c", COMPILE, text]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr
    refused, by, temporaries, flops, kinds = json.loads(done.stdout.splitlines()[-1])
    assert refused is None and by == aot.compiler(chip.kind)
    assert 0 < temporaries < GIB and flops > 0
    assert "all-reduce" in kinds and len(kinds) > 1  # of the tensor axis, and of fsdp
