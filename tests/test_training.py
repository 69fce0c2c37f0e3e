"""Tests of whole runs: their files, exact resume, what stops them, and what the console shows."""

import contextlib
import errno
import io
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import by_path
from rich.console import Console
from run_helpers import (
    QUIET,
    SignalAt,
    arrays,
    assert_same,
    assert_same_run,
    message,
    records,
)

from gptjax import assembly, training
from gptjax.cli.draw import print_samples
from gptjax.cli.sample import SampleCommand, parse_sample
from gptjax.config import Config, DataConfig, MeshConfig, OptimConfig
from gptjax.console import Report, duration, rounded
from gptjax.errors import UserError
from gptjax.parallel import flops
from gptjax.parallel.signals import until_signal
from gptjax.presets import PRESETS
from gptjax.runs import environment, samples
from gptjax.runs.checkpoint import Checkpoints
from gptjax.runs.loaded import load
from gptjax.runs.run import Run
from gptjax.step import NORMS
from gptjax.text import corpora
from gptjax.text.tokenizers import IdTokenizer
from gptjax.training import train

ROOT = Path(__file__).resolve().parents[1]
TINY = replace(
    PRESETS["tiny"],
    steps=24,
    eval_every=8,
    norms_every=8,
    sample_tokens=40,
    save_every=8,
    steps_per_dispatch=3,
    optim=OptimConfig(learning_rate=3e-3, warmup_steps=5, accumulate=2),
    mesh=MeshConfig(data=1),
)


@pytest.fixture(scope="module")
def finished(play, tmp_path_factory) -> tuple[Path, Config]:
    """A run that was never interrupted, and its config."""
    home = tmp_path_factory.mktemp("home")
    (home / "play.txt").write_text(play)
    config = replace(TINY, data=DataConfig(text=str(home / "play.txt")))
    directory = home / "runs" / "whole"
    train(config, directory, report=QUIET)
    return directory, config


def test_the_files_of_a_run(finished):
    directory, _ = finished
    assert sorted(p.name for p in directory.iterdir()) == [
        ".lock",
        "checkpoints",
        "config.json",
        "environment.json",
        "metrics.jsonl",
        "samples.jsonl",
        "tokenizer.json",
    ]
    texts = samples.read(directory)
    assert list(texts) == [0, 8, 16, 24] and len(set(texts.values())) == 4
    lines = records(directory)
    assert [r["step"] for r in lines] == list(range(25))
    assert set(lines[0]) == {"step", "train_sampled_loss", "val_sampled_loss"}
    assert set(lines[1]) == {"step", "loss", "grad_norm", "lr"}
    norms = {name for name in lines[8] if name.startswith(NORMS)}
    assert set(lines[8]) == {*lines[1], "train_sampled_loss", "val_sampled_loss", *norms}
    layers = ["h/0", "h/1", "ln_f", "wpe", "wte"]
    assert sorted(norms) == sorted(start + layer for start in NORMS for layer in layers)
    assert set(lines[24]) == {*lines[8], "val_loss", "val_bits_per_byte"}
    assert lines[24]["loss"] < lines[1]["loss"]
    assert Checkpoints(directory / "checkpoints").steps()[-2:] == [16, 24]
    assert not list(directory.rglob("*.tmp")) and not list(directory.rglob("*.pkl"))


@pytest.mark.parametrize(
    ("at", "number"),
    [
        (4, signal.SIGTERM),
        (8, signal.SIGINT),
        (17, signal.SIGTERM),
        (17, signal.SIGHUP),
        (4, signal.SIGUSR1),
    ],
)
def test_a_stopped_and_resumed_run_is_as_never_stopped(finished, tmp_path, at, number):
    """Dropout and accumulation on; in the middle, on a boundary, and past one."""
    whole, config = finished
    directory = tmp_path / "cut"
    if number == signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN:
        pytest.skip("hang-ups are ignored here, as under nohup")
    before = signal.getsignal(number)
    stopped = train(config, directory, report=SignalAt(at, number))
    assert at <= stopped["step"] < config.steps
    assert Checkpoints(directory / "checkpoints").steps()[-1] == stopped["step"]
    assert signal.getsignal(number) is before
    train(config, directory, resume=True, report=QUIET)
    assert_same_run(whole, directory, 24)
    entries = environment.read(directory)
    assert [entry["step"] for entry in entries] == [0, stopped["step"]]
    assert entries[0]["parameters"] == sum(x.size for x in jax.tree.leaves(load(whole).params))
    assert entries[0]["devices"] == {"kind": "cpu", "count": 1, "processes": 1}


def test_a_schedule_of_its_own_length_makes_an_extended_run_the_whole_one(finished, tmp_path):
    whole, config = finished
    short = replace(config, steps=10, optim=replace(config.optim, schedule_steps=config.steps))
    train(short, tmp_path / "run", report=QUIET)
    train(replace(short, steps=config.steps), tmp_path / "run", resume=True, report=QUIET)
    rates = lambda run: [(r.get("loss"), r.get("lr")) for r in records(run)]
    assert rates(tmp_path / "run") == rates(whole)


def test_a_use_of_ones_own_for_a_signal_stays():
    """Of SIGUSR1, which programs use for themselves."""
    before = signal.signal(signal.SIGUSR1, lambda number, frame: None)
    try:
        with until_signal() as asked:
            os.kill(os.getpid(), signal.SIGUSR1)
            assert not asked()
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_jax_switches_change_neither_a_run_nor_its_samples(finished, tmp_path, monkeypatch):
    """Batches from the device and from a thread; set in the program, as the environment would."""
    monkeypatch.setattr(training, "assemble", assembly.assemble)  # traced under the switches
    whole, config = finished
    sample = lambda: "".join(load(whole).generate("KING", 20))
    expected = sample(), load(whole).logits("KING")
    other = {
        "jax_enable_x64": True,
        "jax_default_prng_impl": "rbg",
        "jax_threefry_partitionable": False,
        "jax_numpy_dtype_promotion": "strict",
        "jax_random_seed_offset": 7,
        "jax_default_matmul_precision": "bfloat16",
    }
    before = {name: getattr(jax.config, name) for name in other}
    try:
        for name, value in other.items():
            jax.config.update(name, value)
        for name, tokens in (("device", config.data.resident_tokens), ("thread", 100)):
            data = replace(config.data, resident_tokens=tokens)
            train(replace(config, data=data), tmp_path / name, report=QUIET)
            # The last record's whole split is averaged in parts where tokens are streamed.
            assert records(tmp_path / name)[:24] == records(whole)[:24]
        found = sample(), load(whole).logits("KING")
        assert {name: getattr(jax.config, name) for name in other} == other
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
    assert found[0] == expected[0]
    np.testing.assert_array_equal(found[1], expected[1], strict=True)
    assert_same(arrays(tmp_path / "device", 24), arrays(whole, 24))


def test_a_killed_and_resumed_run_is_as_never_killed(finished, tmp_path):
    """A power cut leaves a folder as it was at some moment: here, before the last step."""
    whole, config = finished
    directory = tmp_path / "killed"
    shutil.copytree(whole, directory)
    shutil.rmtree(directory / "checkpoints" / "24")
    (directory / "checkpoints" / "24.orbax-checkpoint-tmp").mkdir()
    lines = (directory / "metrics.jsonl").read_text().splitlines(keepends=True)
    for kept in (lines[:16], lines[:17], [*lines[:20], lines[20][:9]]):  # step 16 is line 17
        (directory / "metrics.jsonl").write_text("".join(kept))
        train(config, directory, resume=True, report=QUIET)
        assert_same_run(whole, directory, 24)
        shutil.rmtree(directory / "checkpoints" / "24")


def test_muon_and_ema_resume_bit_for_bit(finished, tmp_path):
    _, config = finished
    model = replace(config.model, position="rotary", norm="rms")
    optim = replace(config.optim, kind="muon", schedule="wsd", ema=0.9)
    config = replace(config, model=model, optim=optim)
    train(config, tmp_path / "whole", report=QUIET)
    train(config, tmp_path / "cut", report=SignalAt(10))
    train(config, tmp_path / "cut", resume=True, report=QUIET)
    assert_same_run(tmp_path / "whole", tmp_path / "cut", 24)
    run = load(tmp_path / "whole", "last")
    assert len("".join(run.generate(max_new_tokens=20))) == 20
    expected = {name: x for name, x in arrays(run.directory, 24).items() if "params/" in name[:7]}
    found = {f"params/{name}": np.asarray(x) for name, x in by_path(run.params).items()}
    assert_same(found, expected)


def test_killed_before_the_first_checkpoint(finished, tmp_path):
    whole, config = finished
    directory = tmp_path / "early"
    shutil.copytree(whole, directory)
    shutil.rmtree(directory / "checkpoints")
    lines = (directory / "metrics.jsonl").read_text().splitlines(keepends=True)
    (directory / "metrics.jsonl").write_text("".join(lines[: config.save_every]))
    train(config, directory, resume=True, report=QUIET)
    assert_same_run(whole, directory, 24)


def test_killed_while_the_first_checkpoint_was_saved(finished, tmp_path):
    """The folder is there, a few more steps are logged, and no checkpoint is complete."""
    whole, config = finished
    directory = tmp_path / "early"
    shutil.copytree(whole, directory)
    shutil.rmtree(directory / "checkpoints")
    (directory / "checkpoints").mkdir()
    lines = (directory / "metrics.jsonl").read_text().splitlines(keepends=True)
    (directory / "metrics.jsonl").write_text("".join(lines[: 2 * config.save_every]))
    train(config, directory, resume=True, report=QUIET)
    assert_same_run(whole, directory, 24)


def test_other_intervals_and_dispatches_change_no_number(finished, tmp_path):
    whole, config = finished
    other = replace(config, eval_every=24, save_every=6, steps_per_dispatch=5)
    train(other, tmp_path / "other", report=QUIET)
    assert_same(arrays(whole, 24), arrays(tmp_path / "other", 24))


def test_resuming_with_other_intervals_changes_no_number(finished, tmp_path):
    """The step of the cut is a boundary of neither; evaluations and saves fall elsewhere then."""
    whole, config = finished
    train(config, tmp_path / "cut", report=SignalAt(10))
    other = replace(config, eval_every=5, save_every=7, steps_per_dispatch=4, keep_last=9)
    train(other, tmp_path / "cut", resume=True, report=QUIET)
    assert_same(arrays(whole, 24), arrays(tmp_path / "cut", 24))
    for a, b in zip(records(whole), records(tmp_path / "cut"), strict=True):
        shared = a.keys() & b.keys()
        assert {"step"} < shared or a["step"] == 0
        assert {name: a[name] for name in shared} == {name: b[name] for name in shared}


def test_resuming_on_other_devices_is_equal_but_for_rounding(finished, tmp_path):
    """Stopped on one device, continued on four: two data-parallel, each over two FSDP shards."""
    whole, config = finished
    train(config, tmp_path / "cut", report=SignalAt(10))
    other = replace(config, mesh=MeshConfig(data=2, fsdp=2))
    train(other, tmp_path / "cut", resume=True, report=QUIET)
    one, other = arrays(whole, 24), arrays(tmp_path / "cut", 24)
    assert one.keys() == other.keys()
    for name, x in one.items():
        np.testing.assert_allclose(x, other[name], rtol=1e-4, atol=1e-5, err_msg=name)
    for a, b in zip(records(whole), records(tmp_path / "cut"), strict=True):
        assert a == pytest.approx(b, rel=1e-4)


def test_a_crash_in_the_last_evaluation_loses_nothing(finished, tmp_path, monkeypatch):
    """The save comes first, and resuming makes up for the evaluation alone."""
    whole, config = finished
    directory = tmp_path / "crash"
    shutil.copytree(whole, directory)
    shutil.rmtree(directory / "checkpoints" / "24")

    def crash(*args):
        raise RuntimeError("out of memory, say")

    monkeypatch.setattr(assembly, "evaluate_split", crash)
    with pytest.raises(RuntimeError, match="out of memory"):
        train(config, directory, resume=True, report=QUIET)
    assert Checkpoints(directory / "checkpoints").newest_sound() == 24
    assert records(directory)[-1]["step"] == 23
    monkeypatch.undo()
    train(config, directory, resume=True, report=SignalAt(0))  # no step is made again
    assert_same_run(whole, directory, 24)


def test_a_state_that_is_not_finite_is_never_saved(finished, tmp_path):
    """The gradient of the last step was finite, and the step it made was not."""
    _, config = finished
    directory = tmp_path / "poisoned"
    optimizer = optax.sgd(lambda step: jnp.where(step == 23, jnp.inf, 1e-3))
    with pytest.raises(UserError) as caught:
        train(config, directory, optimizer=optimizer, report=QUIET)
    assert str(caught.value).startswith(
        "the parameters or the optimizer's state are not finite after step 24: training has "
        "diverged, and nothing was saved; "
    )
    assert Checkpoints(directory / "checkpoints").steps() == [8, 16]


def test_a_trace_changes_no_number_and_names_the_step(finished, tmp_path):
    directory, config = finished
    train(config, tmp_path / "run", report=QUIET, profile=True)
    assert_same_run(directory, tmp_path / "run", config.steps)
    [trace] = (tmp_path / "run" / "profile").rglob("*.xplane.pb")
    assert b"train_steps" in trace.read_bytes()
    assert not (directory / "profile").exists()


def test_a_damaged_newest_checkpoint_is_set_aside(finished, tmp_path, capsys):
    whole, config = finished
    directory = tmp_path / "flipped"
    shutil.copytree(whole, directory)
    victim = next((directory / "checkpoints" / "24" / "params").rglob("d/*"))
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(bytes(data))
    train(config, directory, resume=True)
    printed = " ".join(capsys.readouterr().out.split())
    assert "set aside: checkpoint" in printed and "does not match its checksum" in printed
    assert_same_run(whole, directory, 24)


def test_resuming_what_is_finished_or_past_its_end(finished, tmp_path):
    whole, config = finished
    directory = tmp_path / "finished"
    shutil.copytree(whole, directory)
    record = train(config, directory, resume=True, report=QUIET)
    assert record["step"] == 24 and "val_loss" in record
    assert_same_run(whole, directory, 24)
    with pytest.raises(UserError, match=r"is at step 24 already, past steps=20; give more --steps"):
        train(replace(config, steps=20), directory, resume=True, report=QUIET)
    longer = train(replace(config, steps=30), directory, resume=True, report=QUIET)
    assert longer["step"] == 30


def test_a_run_that_stopped_at_what_is_now_its_last_step_is_evaluated(finished, tmp_path):
    _, config = finished
    directory = tmp_path / "cut"
    config = replace(config, eval_every=24, save_every=24)  # nothing is due in between
    step = train(config, directory, report=SignalAt(4))["step"]
    assert step < 24
    config = replace(config, steps=step)
    record = train(config, directory, resume=True, report=QUIET)
    assert record["step"] == step and "val_loss" in record
    lines = records(directory)
    assert [line["step"] for line in lines] == list(range(step + 1))
    assert lines[-1]["val_loss"] == record["val_loss"] and "loss" in lines[-1]


def test_divergence_stops_the_run_and_keeps_its_checkpoint(finished, tmp_path):
    _, config = finished
    config = replace(config, optim=replace(config.optim, learning_rate=1e30, grad_clip=None))
    expected = (
        r"^the loss or the gradient was not finite for 3 steps in a row, up to step (\d+) \(loss "
        r"(nan|inf), gradient norm (nan|inf)\): training has diverged; .*--replay \1\b.*--resume"
    )
    with pytest.raises(UserError, match=expected):
        train(config, tmp_path / "diverged", report=QUIET)


def test_the_run_folder_is_all_the_sampler_needs(finished, tmp_path, monkeypatch, capsys):
    whole, _ = finished
    shutil.copytree(whole, tmp_path / "elsewhere" / "copy")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(corpora, "DESCRIPTIONS", tmp_path / "gone")
    command = SampleCommand(run="elsewhere/copy", max_new_tokens=40, num_samples=2)
    printed = []
    for again in (command, command, replace(command, seed=2)):
        print_samples(again)
        printed.append(capsys.readouterr())
    once, twice, other = (re.split(r"--- \d of 2\n", one.out) for one in printed)
    assert [len(text) for text in once] == [0, 41, 41] and once == twice != other
    assert all(one.err.endswith("tokens/s, compilation not counted\n") for one in printed)


def test_a_text_without_a_newline(tmp_path, monkeypatch, capsys):
    """It is sampled by the command that training prints, from its first character."""
    monkeypatch.chdir(tmp_path)
    Path("dna.txt").write_text("acgt" * 1000)
    config = replace(TINY, steps=8, data=DataConfig(text="dna.txt"))
    train(config, Path("runs/dna"))
    command = re.findall(r"next: python sample.py (.*)", capsys.readouterr().out)[0].split()
    print_samples(parse_sample([*command, "--max-new-tokens", "9"]))
    assert re.fullmatch("[acgt]{9}\n", capsys.readouterr().out)
    run = load("dna", "last")
    text = "".join(run.generate(None, 20, temperature=0.0))
    assert text == "".join(run.generate("a", 20, temperature=0.0))  # "a" is id 0
    with pytest.raises(UserError, match=r"^1 unknown characters \('\\n' at 0\)"):
        list(run.generate("\n", 3))


def test_a_prompt_without_tokens_is_refused(finished):
    """Nothing is drawn after padding, and nothing else stands in for the prompt."""
    run = load(finished[0], "last")
    nothing = "to this run's tokenizer it is blank, or its characters are all skipped"
    with pytest.raises(UserError, match=nothing):
        list(run.generate("\u4eca\u65e5", 3, unknown="skip"))
    with pytest.raises(UserError, match=nothing):
        list(run.generate("", 3))
    run.tokenizer = IdTokenizer(run.tokenizer.vocab_size)
    with pytest.raises(UserError, match=r"^the prompt '  \\n' has no tokens: "):
        list(run.generate("  \n", 3))
    assert list(run.generate(max_new_tokens=3))


def test_a_checkpoint_is_chosen_as_best_last_or_a_step(finished):
    whole, _ = finished
    steps = Checkpoints(whole / "checkpoints").steps()
    best = Run(whole).best_step(steps)
    texts = {}
    for which in ("best", "last", *steps):
        run = load(whole, which)
        assert run.step == {"best": best, "last": 24}.get(str(which), which)
        texts[which] = "".join(run.generate(max_new_tokens=30))
    assert texts["best"] == texts[best]
    assert texts["last"] == texts[24]
    assert texts[24] != texts[16]


def test_a_loaded_run_gives_logits_and_losses(finished):
    whole, config = finished
    run = load(whole, "last")
    text = "the king and the prince of my love"
    ids = run.tokenizer.encode(text)
    logits = run.logits(text[:16])
    expected, _ = run.model.apply({"params": run.params}, ids[None, :16])
    assert logits.shape == (16, run.tokenizer.vocab_size) and logits.dtype == np.float32
    np.testing.assert_allclose(logits, np.asarray(expected[0]), atol=1e-5)
    # A loss is read window by window: 16 targets, 16, and one.
    total = 0.0
    for start in range(0, len(ids) - 1, 16):
        window = ids[start : start + 17]
        logits, _ = run.model.apply({"params": run.params}, window[None, :-1])
        log_probs = jax.nn.log_softmax(logits[0])
        total -= float(jnp.take_along_axis(log_probs, jnp.asarray(window[1:, None]), 1).sum())
    assert run.loss(text) == pytest.approx(total / (len(ids) - 1), rel=1e-5)
    assert run.config == config and run.step == 24 and run.directory == whole
    assert [record["step"] for record in run.metrics] == list(range(25))


def test_the_loss_of_the_validation_split_is_the_one_that_was_logged(finished):
    whole, config = finished
    run = load(whole, "last")
    text = Path(config.data.text).read_text()
    val = text[int(0.9 * len(text)) :]
    assert run.loss(val) == pytest.approx(run.metrics[-1]["val_loss"], abs=1e-4)


def test_prompts(finished, tmp_path, capsys):
    whole, _ = finished
    command = SampleCommand(run=str(whole), prompt="\u2603!", max_new_tokens=5)
    with pytest.raises(UserError, match=r"unknown characters \('\u2603' at 0"):
        print_samples(command)
    for unknown in ("replace", "skip"):
        print_samples(replace(command, unknown=unknown))
        assert len(capsys.readouterr().out) == 6
    (tmp_path / "p.txt").write_text("the ")
    texts = []
    for prompt in (f"file:{tmp_path / 'p.txt'}", "the "):
        print_samples(replace(command, prompt=prompt))
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    with pytest.raises(UserError, match="the prompt has no characters"):
        print_samples(replace(command, prompt=""))


def run_command(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    script, *rest = words
    return subprocess.run(
        [sys.executable, str(ROOT / script), *rest],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_the_commands_as_typed(play, tmp_path):
    """Train, be refused, resume for longer, sample, plot: as a person would."""
    (tmp_path / "play.txt").write_text(play)
    words = ("train.py", "--config", "tiny", "--data.text", "play.txt", "--run", "mine")
    first = run_command(*words, cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    assert first.stdout.rstrip().endswith("next: python sample.py --run mine")
    again = run_command(*words, cwd=tmp_path)
    assert again.returncode == 2
    assert again.stderr == (
        "train.py: error: runs/mine already contains a run; resume it (--run mine --resume) or "
        "choose another name\n"
    )
    resumed = run_command("train.py", "--resume", "--steps", "70", "--deterministic", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert "changed: steps was 60, is 70" in resumed.stdout
    sampled = run_command("sample.py", "--max-new-tokens", "20", cwd=tmp_path)
    assert sampled.returncode == 0 and len(sampled.stdout) == 21
    changed = run_command("train.py", "--resume", "--model.n-layer", "3", cwd=tmp_path)
    assert changed.returncode == 2 and changed.stderr == (
        "train.py: error: cannot resume runs/mine with model.n_layer=3: it was trained with "
        "model.n_layer=2; start a new run for that\n"
    )


# ---------------------------------------------------------------------------------------------
# The console


def test_the_console_describes_the_text_and_warns_of_memorising(play, tmp_path):
    """And bits per byte, which for a byte-level tokenizer are the loss in bits."""
    path = tmp_path / "short.txt"
    path.write_text(play[:1500])
    data = DataConfig(text=str(path), tokenizer="byte")
    config = replace(TINY, eval_batches=2, steps=48, batch_size=32, data=data)
    with (tmp_path / "printed").open("w+") as file:
        console = Console(file=file, width=500, highlight=False)
        record = train(config, tmp_path / "run", report=Report(console))
        file.seek(0)
        printed = [line.strip() for line in file]
    assert record["val_bits_per_byte"] == pytest.approx(record["val_loss"] / np.log(2), rel=1e-12)
    assert records(tmp_path / "run")[-1]["val_bits_per_byte"] == record["val_bits_per_byte"]
    rows = dict(line.split(maxsplit=1) for line in printed if len(line.split()) > 1)
    assert rows["text"].startswith(f"{path}: 1,350 training and 150 validation tokens")
    assert rows["text"].endswith("vocabulary size 256")
    assert re.search(r"byte-level, .*256 .*1\.00 bytes per token", rows["tokenizer"])
    assert "the last 150 characters" in rows["split"]
    assert re.match(r"\d+ MB for parameters, gradients and optimizer state", rows["memory"])
    assert any(f"({record['val_bits_per_byte']:.4f} bits per byte)" in line for line in printed)
    epochs = 48 * config.batch_size * config.model.block_size / 1350
    [warning] = [line for line in printed if "memorise" in line]
    assert f"{epochs:.0f} epochs" in warning


@pytest.mark.parametrize(
    ("tokens", "parameters", "epochs", "expected"),
    [(100, 101, 16.1, True), (100, 101, 16.0, False), (100, 100, 99.0, False)],
)
def test_when_a_model_memorises(tokens: int, parameters: int, epochs: float, expected: bool):
    assert flops.will_memorise(tokens, parameters, epochs) == expected


def shown(*calls: tuple[Any, ...], encoding: str = "utf-8") -> str:
    """What a report prints into a pipe of this encoding."""
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding)
    with contextlib.redirect_stdout(stream):
        report = Report()
        for name, *arguments in calls:
            getattr(report, name)(*arguments)
    return raw.getvalue().decode(encoding)


def test_strangers_text_has_no_effect_on_a_terminal():
    text = "a\x1b[31m :cat: [red]b[/] \x9b2J\u202e\r\nc\td"
    assert shown(("say", text)).split("\n") == [
        "a\\x1b[31m :cat: [red]b[/] \\x9b2J\\u202e",
        "c       d",
        "",
    ]
    assert "a\\x1b[31m :cat: [red]b[/]" in shown(("summary", "t", {"x": text}))


def test_a_pipe_gets_whole_lines_without_blanks_at_their_ends():
    rows = {"short": "x", "long": "y " * 100 + "y"}
    assert shown(("summary", "title", rows)) == f"title\n short  x\n long   {rows['long']}\n"


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_characters_that_an_output_lacks_are_escaped(encoding):
    assert shown(("say", "λ 日 ok"), encoding=encoding) == "\\u03bb \\u65e5 ok\n"


class Full(io.StringIO):
    """A file on a full disk."""

    def write(self, s: str) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")


def test_training_saves_and_stops_when_its_output_is_lost(finished, tmp_path):
    whole, config = finished
    with contextlib.redirect_stdout(Full()):
        error = message(train, config, tmp_path / "run", report=Report())
    assert error.startswith("the output cannot be written (No space left on device); saved after ")
    assert Checkpoints(tmp_path / "run" / "checkpoints").steps()
    train(config, tmp_path / "run", resume=True, report=QUIET)
    assert_same_run(whole, tmp_path / "run", 24)


@pytest.mark.parametrize(
    ("x", "text"),
    [(1830.0, "1,830"), (999.7, "1,000"), (1.834, "1.83"), (0.01234, "0.0123"), (0, "0")],
)
def test_numbers_have_no_exponent(x, text):
    assert rounded(x) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "under 1 s"), (12, "12 s"), (59.9, "1 min 0 s"), (7500, "2 h 5 min")],
)
def test_durations(seconds, text):
    assert duration(seconds) == text
