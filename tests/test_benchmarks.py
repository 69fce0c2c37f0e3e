"""Tests of the benchmarks: each command end to end at a tiny size, and its arithmetic."""

import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import optax
import pytest

from benchmarks import (
    ablation,
    checks,
    feed,
    gpu,
    growth,
    jax_gpt,
    measure,
    sampling,
    scaling,
    serve,
    soak,
    startup,
    step,
    time_to_loss,
    where,
)
from gptjax.assembly import assemble, evaluate_split
from gptjax.config import Config, MeshConfig, ModelConfig
from gptjax.errors import UserError
from gptjax.model import GPT
from gptjax.parallel import sharding
from gptjax.plan import aot

SPEEDRUN = Path(__file__).resolve().parents[1] / "examples" / "speedrun"


def results(path: Path, name: str) -> Any:
    """Rows that a benchmark wrote, after checking the common fields."""
    content = json.loads(path.read_text())
    assert content["benchmark"] == name
    assert content["machine"]["processor"] and content["machine"]["versions"]["jax"]
    assert content["settings"]["out"] == str(path)
    return content["rows"]


@pytest.fixture
def text(tmp_path: Path, play: str) -> str:
    (tmp_path / "play.txt").write_text(play)
    return str(tmp_path / "play.txt")


class Here:
    """A `measure.Side` that needs no process: one that starts takes seconds to import its side."""

    def __init__(self, make: Callable[..., Callable[..., Any]], *args: Any):
        make, args = pickle.loads(pickle.dumps((make, args)))  # as the way to a process asks
        self._function = make(*args)

    def __call__(self, *args: Any) -> Any:
        return pickle.loads(pickle.dumps(self._function(*pickle.loads(pickle.dumps(args)))))

    def wait(self) -> None: ...

    def close(self) -> None: ...


@pytest.fixture
def sides_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without processes, which `test_step` has, and the tests of failing sides."""
    monkeypatch.setattr(measure, "Side", Here)


def test_scaling(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """Estimates only: no device is used."""
    monkeypatch.setattr(scaling, "COUNTS", (8, 16))
    out = tmp_path / "scaling.json"
    scaling.main(f"--models gpt2 --chips h100 --out {out}".split())
    rows = results(out, "scaling")
    assert {row["count"] for row in rows} == {8, 16}
    assert all(0 < row["share"] <= row["bound"] < 1 and 0 < row["memory"] < 60 for row in rows)
    printed = capsys.readouterr().out
    assert "the fastest mesh that fits, on NVIDIA H100" in printed
    assert "where each kind of mesh stops scaling" in printed
    assert out.with_suffix(".png").stat().st_size > 10_000
    for axes, found in scaling.meshes(16, scaling.CHIPS["h100"]).items():
        assert found and all((m.data or 1) * m.fsdp * m.tensor == 16 for m in found), axes


def test_confirm_adds_compiled_points(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """Compiled for the simulated devices instead of those that the point names."""
    monkeypatch.setattr(scaling, "COUNTS", (8,))
    monkeypatch.setattr(aot, "topology", lambda target: jax.devices())
    out = tmp_path / "scaling.json"
    scaling.main(f"--models tiny --chips h100 --confirm --points tiny@h100:8 --out {out}".split())
    *points, compiled = results(out, "scaling")
    assert compiled.pop("compiled")
    [same] = [p for p in points if p["mesh"] == compiled["mesh"]]
    assert 0 < compiled["share"] <= compiled["bound"] and compiled["memory"] < 10 * same["memory"]
    assert "tiny@h100:8  compiled in " in capsys.readouterr().out
    monkeypatch.setattr(aot, "topology", lambda target: None)
    with pytest.raises(UserError, match="--confirm needs compilers: pip install -e"):
        scaling.confirm(("tiny@h100:8",))


@pytest.mark.torch
def test_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("transformers")
    out = tmp_path / "step.json"
    step.main(f"--sizes tiny --sides plain transformers --rounds 2 --seconds 0 --out {out}".split())
    [row] = results(out, "step")
    assert list(row["sides"]) == ["gptjax", "plain", "transformers"]
    times = {name: side["seconds_per_step"] for name, side in row["sides"].items()}
    for name, side in row["sides"].items():
        assert len(times[name]) == 2
        quotients = [a / b for a, b in zip(times["gptjax"], times[name], strict=True)]
        assert side["gptjax_over_this"]["median"] == pytest.approx(np.median(quotients))
        # Much closer than the tolerance: same weights, batches and updates.
        np.testing.assert_allclose(
            side["first_losses"], row["sides"]["gptjax"]["first_losses"], rtol=1e-5
        )
        assert side["peak_memory"] > 50e6
    assert "ms per step" in capsys.readouterr().out


def test_sides_with_different_losses_are_not_compared():
    same = [4.17, 4.16]
    step.check_losses({"gptjax": same, "plain": [4.1701, 4.1601]}, 1e-4)
    with pytest.raises(RuntimeError, match="plain computes something else than gptjax"):
        step.check_losses({"gptjax": same, "plain": [4.17, 4.19]}, 1e-4)
    with pytest.raises(RuntimeError, match="computes something else"):
        step.check_losses({"gptjax": same, "plain": [4.17, float("nan")]}, 1e-4)


@pytest.mark.usefixtures("sides_here")
@pytest.mark.torch
def test_sampling(tmp_path: Path):
    pytest.importorskip("transformers")
    out = tmp_path / "sampling.json"
    few = "--batches 2 --rounds 1 --seconds 0 --length 20"
    sampling.main(f"--sizes tiny {few} --out {out}".split())
    rows = results(out, "sampling")
    assert [(row["task"], row["batch"]) for row in rows] == [("window", 2), ("long", 2)]
    assert list(rows[0]["tokens_per_second"]) == list(sampling.SamplingCommand().sides)
    assert list(rows[1]["tokens_per_second"]) == ["gptjax", "nanogpt"]
    assert all(0 < row["share_of_floor"] < 1 for row in rows)


def test_the_sampling_roofline():
    """A token needs each weight and each cached vector once."""
    model = ModelConfig(n_layer=2, n_head=4, n_kv_head=2, n_embd=8, block_size=16, bias=False)
    tokens = jax.numpy.zeros((1, 1), int)
    params = jax.eval_shape(GPT(model, 5).init, jax.random.key(0), tokens)["params"]
    floor = jax_gpt.floor(Config(model=model), params, 3, 100, peak=1e9)
    norms = 2 * 8  # per layer
    matrices = 2 * (8 * 8 + 8 * 2 * 4 + 8 * 8 + 2 * 8 * 32 + norms) + 5 * 8
    cached = 3 * 2 * 2 * 8 * 4  # streams, layers, keys and values, half a window, half the width
    assert floor.bytes_per_step == 4 * (matrices + cached)
    assert floor.flops_per_step == 3 * (2 * matrices + 2 * 2 * 2 * 8 * 8)
    seconds = max(floor.bytes_per_step / floor.bandwidth, floor.flops_per_step / 1e9)
    assert floor.tokens_per_second == pytest.approx(3 / seconds)


def test_startup(tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(startup, "FOR_SCALE", {"nothing": "pass", "failing": "1 / 0"})
    out = tmp_path / "startup.json"
    startup.main(f"--config bigram --rounds 1 --text {text} --out {out}".split())
    rows = results(out, "startup")
    assert len(rows["seconds"]["nothing"]) == 1 and "failing" not in rows["seconds"]
    for heat in ("cold", "warm"):
        assert rows["seconds"][f"train.py to the first step, {heat}"][0] > 0
        assert rows["seconds"][f"sample.py to the first character, {heat}"][0] > 0
        parts = rows["parts"][heat][0]
        assert {"import jax", "first step", "all compiling or loading"} <= parts.keys()
        assert all(seconds >= 0 for seconds in parts.values())


@pytest.mark.usefixtures("sides_here")
def test_growth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    small = replace(growth.BASE.model, n_layer=1, n_embd=32)
    monkeypatch.setattr(growth, "BASE", replace(growth.BASE, model=small))
    out = tmp_path / "growth.json"
    growth.main(f"--axes batch --points 2 --rounds 1 --seconds 0 --out {out}".split())
    rows = results(out, "growth")
    assert [row["value"] for row in rows] == [4, 8]
    assert rows[1]["flops_per_step"] == 2 * rows[0]["flops_per_step"]
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_each_axis_of_growth_changes_one_thing():
    for axis, values in growth.POINTS.items():
        for value in values:
            config = growth.config_of(axis, value)
            m = config.model
            found = {
                "batch": config.batch_size,
                "context": m.block_size,
                "width": m.n_embd,
                "layers": m.n_layer,
            }
            usual = {"batch": 16, "context": 64, "width": 128, "layers": 4}
            assert found == usual | ({axis: value} if axis != "corpus" else {})


def test_slopes():
    xs = [1.0, 2.0, 4.0]
    assert growth.slopes(xs, [3.0, 12.0, 48.0]) == pytest.approx((2.0, 2.0))
    assert growth.slopes(xs, [5.0, 5.0, 10.0]) == pytest.approx((1.0, 0.5))


@pytest.mark.usefixtures("sides_here")
@pytest.mark.torch
def test_time_to_loss(tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("torch")
    page, out = tmp_path / "leaderboard.md", tmp_path / "loss.json"
    page.write_text("| day |\n| --- |\n")
    monkeypatch.setattr(time_to_loss, "LEADERBOARD", page)
    few = "--seeds 1 --steps 6 --eval-every 3 --baseline --baseline-steps 3"
    time_to_loss.main(f"--config tiny {few} --target 5 --text {text} --docs --out {out}".split())
    ours, theirs = results(out, "time_to_loss")
    assert ours["recipe"] == "tiny, 6 steps" and theirs["recipe"] == "nanoGPT's, PyTorch, 3 steps"
    [history] = ours["histories"]
    assert [record["step"] for record in history] == [0, 3, 6]
    assert ours["seconds_to_target"] == [0.0]  # an untrained model is below 5 already
    assert 0 < ours["compile_seconds"][0] <= ours["seconds"][0]
    assert [record["step"] for record in theirs["histories"][0]] == [0, 3]
    lines = page.read_text().splitlines()
    assert len(lines) == 4 and "| tiny, 6 steps | 5.0000 | 0.0 |" in lines[2]


def test_the_target_is_reached_at_the_first_evaluation_below_it():
    losses = [(0.0, 4.2), (10.0, 1.9), (20.0, 1.88), (30.0, 1.885), (40.0, 1.7)]
    history = [{"seconds": s, "val_loss": loss} for s, loss in losses]
    assert time_to_loss.seconds_to(history, 1.8857) == 20.0
    assert time_to_loss.seconds_to(history, 1.5) is None
    result = time_to_loss.summary("x", 1.8857, [history, history[:2]])
    assert time_to_loss.cells(result)[2] == "reached by 1 of 2"
    assert time_to_loss.cells(result)[4:] == ["25.0 (10.0 to 40.0)", "1.8000 (1.7000 to 1.9000)"]


def test_compile_time_is_the_first_call_minus_the_median():
    seconds = [9.0, 9.0, 10.0, 10.0, 11.0, 11.0]
    records: list[dict[str, float]] = [{"step": 0, "seconds": 0.0, "val_loss": 4.2}]
    records += [{"step": i + 1, "seconds": s} for i, s in enumerate(seconds)]
    assert time_to_loss._evaluations(records, 2)[0]["compile_seconds"] == 8.0


@pytest.mark.torch
@pytest.mark.parametrize("kind", ["plain", "transformers"])
def test_pytorch_models_compute_the_same_loss(kind: str):
    """With gptjax's perturbed weights, and a split that is no multiple of the window."""
    pytest.importorskip("transformers")
    torch_gpt = pytest.importorskip("benchmarks.torch_gpt", reason="needs torch")
    config = Config(batch_size=4, model=step.SIZES["tiny"].config.model)
    setup = assemble(replace(config, mesh=MeshConfig(data=1)), 65)
    params = setup.start().params
    params = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(2), x.shape), params)
    val = measure.random_tokens(65, 333)
    theirs, forward = torch_gpt.build(kind, config, 65)
    torch_gpt.load(theirs, jax_gpt.flat(params))
    ours = evaluate_split(setup, params, sharding.put(setup.mesh, val))["loss"]
    loss = torch_gpt.whole_split_loss(theirs, forward, val, config.model.block_size)
    assert loss == pytest.approx(ours, rel=1e-6)


def test_the_parts_of_a_gpu_run_fail_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """One without a checkout to run, one that has no time, and one that works."""
    limits = {**gpu.LIMITS, "sweep": 0.1, "facts": 300}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "LIMITS", limits)
        gpu.main(f"--toy --parts nanogpt sweep facts --out {tmp_path}".split())
    rows = [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines()]
    by_part = {part: [row for row in rows if row["part"] == part] for part in gpu.LIMITS}
    [nanogpt], [sweep] = by_part["nanogpt"], by_part["sweep"]
    assert nanogpt["name"] == sweep["name"] == "failed"
    assert nanogpt["value"].endswith("no train.py there; give a checkout")
    assert sweep["value"] == "stopped after its limit of 0 s"
    assert {"device", "versions", "memory"} <= {row["name"] for row in by_part["facts"]}
    assert "facts: device: " in capsys.readouterr().out


def test_a_gpu_table_goes_into_its_page(tmp_path: Path):
    page, (start, end) = tmp_path / "speed.md", gpu.MARKERS
    page.write_text(f"before\n{start}\nold\n{end}\nafter\n")
    gpu.write_page([gpu.Row("step", "a | b", "1 ms")], page)
    written = page.read_text()
    assert "| step | a / b | 1 ms |" in written and "old" not in written
    assert written.startswith("before\n") and written.endswith("after\n")
    assert gpu.MARKERS[0] in gpu.PAGE.read_text()
    with pytest.raises(UserError, match="lacks the lines"):
        page.write_text("nothing")
        gpu.write_page([], page)


def test_spread_and_ratios():
    assert measure.spread([3.0, 1.0, 2.0]) == (1.0, 2.0, 3.0)
    assert measure.ratios([1.0, 9.0], [2.0, 3.0]) == (0.5, 1.75, 3.0)
    assert str(measure.spread([0.01234, 0.5, 1234.5])) == "0.500 (0.0123 to 1,234)"


def failing(kind: str) -> Any:
    if kind == "user":
        raise UserError("one line")
    if kind == "bug":
        raise ZeroDivisionError("x")
    import os

    os._exit(3)


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        ("user", UserError, "one line"),
        ("bug", RuntimeError, "ZeroDivisionError: x"),
        ("death", RuntimeError, "died with exit code 3"),
    ],
)
def test_a_failing_side_raises_its_error(kind: str, error: type, message: str):
    with pytest.raises(error, match=message), measure.sides({"a": (failing, kind)}):
        pass


def test_user_errors(tmp_path: Path):
    unknown = "unknown preset 'x'; give the path of a Python file, a run or its config.json, or"
    for command, message in {
        lambda: step.main(["--rounds", "0"]): "--rounds 0 is too small; give 1 or more",
        lambda: step.main(["--seconds", "-1"]): "--seconds -1.0 is too small; give 0 or more",
        lambda: scaling.main(["--chips", "v7"]): "--chips: unknown 'v7'; known: v4, v5e, v5p, v6e",
        lambda: scaling.main(["--points", "x"]): (
            "--points x: give MODEL@CHIP:SHAPE, such as gpt2@v5p:2x2x2"
        ),
        lambda: growth.main(["--points", "0"]): "--points 0 is too small; give 1 or more",
        lambda: feed.main(["--preset", "x"]): unknown,
        lambda: sampling.main(["--batches", "0"]): "--batches 0 is too small; give 1 or more",
        lambda: where.main(["--presets", "x"]): unknown,
        lambda: ablation.main(["--options", "x"]): "unknown option 'x'; options: rotary, rms",
        lambda: startup.main(["--config", "x"]): "unknown preset 'x'; presets: bigram, tiny",
        lambda: time_to_loss.main(["--config", "x"]): unknown,
        lambda: measure.need("torch_x", instead="--sides gptjax"): (
            "the comparison needs torch_x, not installed here; pip install torch_x"
        ),
        lambda: time_to_loss.append(tmp_path / "no.md", []): (
            f"cannot write {tmp_path}/no.md: No such file or directory"
        ),
        lambda: measure.save(Path("/dev/null/x.json"), "x", {}, None, []): (
            "cannot write /dev/null/x.json: File exists; give another --out"
        ),
    }.items():
        with pytest.raises(UserError) as caught:
            command()
        assert str(caught.value).startswith(message)


def test_checks(tmp_path: Path):
    out = tmp_path / "checks.json"
    checks.main(f"--presets tiny --rounds 1 --seconds 0 --out {out}".split())
    [row] = results(out, "checks")
    assert row["preset"] == "tiny" and len(row["wall"]) == len(row["cpu"]) == 2


@pytest.mark.usefixtures("sides_here")
def test_feed(tmp_path: Path):
    pytest.importorskip("grain", reason="needs the extra text")
    out = tmp_path / "feed.json"
    feed.main(f"--preset tiny --tokens 20000 --rounds 2 --seconds 0 --out {out}".split())
    rows = results(out, "feed")
    assert [row["side"] for row in rows] == list(feed.SIDES)
    for row in rows:
        assert len(row["seconds"]) == 2 and min(row["cpu_seconds"]) > 0
        assert all(0 < share < 1 for share in row["stalled"])


def test_unchecked_removes_the_checks():
    """Otherwise the two sides would be the same program."""

    def tests_for_finite_numbers() -> int:
        setup = assemble(replace(step.SIZES["tiny"].config, mesh=MeshConfig(data=1)), 65)
        tokens = jax.ShapeDtypeStruct((1000,), np.uint16)
        program = setup.steps.trace(setup.layout, tokens, setup.seed_key(), 0, 1)
        return str(program.jaxpr).count("= is_finite")

    checked = tests_for_finite_numbers()  # the loss's softmax has some of its own
    with checks.unchecked():
        assert tests_for_finite_numbers() == checked - 2
        assert optax.tree.norm(jax.numpy.ones(3)) == 0


@pytest.mark.usefixtures("sides_here")
def test_ablation(
    tmp_path: Path,
    text: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    small = replace(ablation.CLASSIC.model, n_layer=1, n_embd=32)
    monkeypatch.setattr(ablation, "CLASSIC", replace(ablation.CLASSIC, model=small))
    out = tmp_path / "ablation.json"
    ablation.main(f"--options recall --steps 2 --seeds 1 --text {text} --out {out}".split())
    rows = results(out, "ablation")
    assert [row["recipe"] for row in rows] == [
        *("classic", "classic + recall", "modern", "modern - recall"),
    ]
    assert len({row["ends"][0]["val_loss"] for row in rows}) == 4
    assert "mean of 1 seeds" in capsys.readouterr().out


def test_every_option_of_an_ablation_changes_the_recipe():
    plain = ablation.with_options((), 300, "x")
    for name in ablation.OPTIONS:
        assert ablation.with_options((name,), 300, "x") != plain or ablation.tables((name,))
    modern = ablation.with_options(ablation.MODERN, 5, "x")
    assert modern.optim.kind == "muon" and modern.optim.warmup_steps == 5
    fast = measure.recipe(str(SPEEDRUN / "fast.py"))
    assert replace(modern.model, n_layer=1, block_size=1024) == fast.config.model
    assert ablation.tables(ablation.MODERN) == fast.model.keywords
    assert ablation.tables(("muon", "ngram")) == {"ngram": 3}


def test_recipes_are_presets_or_config_files():
    assert measure.recipe("small").model is None
    assert measure.recipe("bigram").model.__name__ == "Bigram"
    for name in ("fast", "record"):
        config, model = measure.recipe(str(SPEEDRUN / f"{name}.py"))
        assert type(model(config.model, 65)).__name__ == "NGramGPT"


def test_where(tmp_path: Path):
    out = tmp_path / "where.json"
    where.main(f"--presets tiny --steps 2 --out {out}".split())
    [row] = results(out, "where")
    assert {"attention: linear layers", "MLP: linear layers", "optimizer"} <= row["parts"].keys()
    assert 0 < row["covered"] <= 1
    assert sum(row["parts"].values()) >= row["covered"] * row["milliseconds"] * 0.99


def test_operations_are_assigned_to_parts_and_durations():
    hlo = """
ENTRY %main (a: f32[]) -> f32[] {
  %dot.1 = f32[8,4]{1,0} dot(%a, %b), metadata={op_name="jit(f)/h/attn/c_proj/dot"}
  ROOT %while.2 = (f32[], s32[]) while(%t), backend_config={"known_trip_count":{"n":"2"}}
}
"""
    found = where.instructions(hlo)
    assert found["dot.1"] == ("dot", "jit(f)/h/attn/c_proj/dot")
    assert found["while.2"][0] == "while" and where.part(found["dot.1"][1]) == (
        "attention: linear layers"
    )
    assert where.part("") == "copies and the rest"
    assert where.part("jit(steps)/while/body/jit(_where)/select_n") == "optimizer"
    assert where.part("jit(steps)/while/body/mul") == "optimizer"
    drawn = where.part("jit(steps)/while/body/jit(_randint)/slice")
    assert drawn == "batch and random numbers"
    events = [("dot.1", 0.0, 1.0), ("dot.1", 4.0, 5.0), ("end: dot.1", 3.0, 3.0)]
    assert where.durations(events) == [("dot.1", 0.0, 3.0), ("dot.1", 4.0, 5.0)]
    assert where.covered([(0, 2), (1, 3), (5, 6)]) == 4


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs /proc")
def test_soak(tmp_path: Path, text: str):
    """Two short sessions; only a long run can show whether memory is flat."""
    out = tmp_path / "soak.json"
    soak.main(f"--seconds 60 --lives 2 --text {text} --out {out}".split())
    *lives, times = results(out, "soak")
    assert len(lives) == 2 and all(life["threads"][1] >= 1 for life in lives)
    assert lives[1]["samples"][-1]["step"] > 0 and len(times["step_times"]) == 2
    assert out.with_suffix(".png").stat().st_size > 1000


def test_slopes_and_step_times(tmp_path: Path):
    assert soak.slope([1, 2, 3], [2, 4, 6]) == pytest.approx(2)
    lines = [{"step": s, "loss": 1.0, "seconds": 0.25 * s} for s in range(1, 9)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    steps, milliseconds = soak.step_times(tmp_path, bins=4)
    assert milliseconds == [250.0] * len(steps) and steps[-1] == 8


def test_serve_counts_what_wrk_says(monkeypatch: pytest.MonkeyPatch):
    said = """Running 2s test @ http://127.0.0.1:1/
  1 threads and 8 connections
  300 requests in 2.00s, 71.02KB read
  Socket errors: connect 0, read 2, write 0, timeout 1
  Non-2xx or 3xx responses: 4
Requests/sec:    150.00
"""
    monkeypatch.setattr(serve.subprocess, "run", lambda *_, **__: SimpleNamespace(stdout=said))
    found = serve.wrk("http://127.0.0.1:1/", Path("ask.lua"), 8, 2.0, tokens=50)
    assert found == {"rate": 300 * 50 / 2, "requests": 300, "failed": 7}
    monkeypatch.setattr(serve.shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="apt-get install wrk"):
        serve.main(["--sides", "serve"])
