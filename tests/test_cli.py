"""Tests of the command lines: what they understand, and one exact line for what they do not."""

import io
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gptjax import __version__, training
from gptjax.assembly import make_model
from gptjax.cli import names, streams
from gptjax.cli import train as train_cli
from gptjax.cli.flags import flags_of
from gptjax.cli.main import COMMANDS, main
from gptjax.cli.prompts import read_prompt
from gptjax.cli.recipe import load_recipe
from gptjax.cli.sample import SampleCommand, parse_sample
from gptjax.cli.train import TrainCommand, parse_train
from gptjax.config import Config
from gptjax.errors import LONGEST, UserError, one_line_errors
from gptjax.parallel import switches
from gptjax.presets import PRESETS
from gptjax.runs import folders
from gptjax.runs.run import Run
from gptjax.text.tokenizers import CharTokenizer

ROOT = Path(__file__).resolve().parents[1]
NAMES = ", ".join(PRESETS)
SEE_TRAIN, SEE_SAMPLE = "; see train.py --help", "; see sample.py --help"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """A working directory without runs/."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def settings_of(*argv: str) -> Config:
    return parse_train(list(argv)).settings


def message_of(read: Any, value: Any) -> str:
    with pytest.raises(UserError) as caught:
        read(value)
    return str(caught.value)


# ---------------------------------------------------------------------------------------------
# train.py


def test_deterministic_kernels_are_asked_for_before_the_devices_start(monkeypatch):
    """After that XLA no longer reads its flags, and a run would vary without a word."""
    monkeypatch.setenv("XLA_FLAGS", "--mine")
    monkeypatch.setattr(switches.xla_bridge, "backends_are_initialized", lambda: False)
    switches.use_deterministic_kernels()
    assert os.environ["XLA_FLAGS"] == f"--mine {switches.DETERMINISTIC}"
    monkeypatch.setattr(switches.xla_bridge, "backends_are_initialized", lambda: True)
    with pytest.raises(UserError, match="--deterministic comes too late"):
        train_cli.main(["--config", "tiny", "--deterministic"], "train.py")


def test_no_arguments_is_the_small_preset():
    assert parse_train([]) == TrainCommand("small", settings=PRESETS["small"])


@pytest.mark.parametrize("name", PRESETS)
def test_presets(name):
    command = parse_train(["--config", name])
    assert command == TrainCommand(name, settings=PRESETS[name])
    assert parse_train([f"--config={name}"]) == command


@pytest.mark.parametrize(
    "argv",
    [
        ["--optim.learning-rate", "0.25", "--batch-size", "6"],
        ["--optim.learning_rate", "0.25", "--batch_size", "6"],
        ["--optim.learning-rate=0.25", "--batch_size=6"],
        ["--batch-size=6", "--config", "tiny", "--optim.learning_rate=0.25"],
    ],
)
def test_overrides_in_any_spelling_and_order(argv):
    expected = PRESETS["tiny"]
    expected = replace(expected, batch_size=6, optim=replace(expected.optim, learning_rate=0.25))
    argv = argv if "--config" in argv else ["--config", "tiny", *argv]
    assert settings_of(*argv) == expected


def test_overrides_of_every_kind():
    assert settings_of("--optim.grad-clip", "None").optim.grad_clip is None
    scaling = settings_of("--model.rope-scaling", "8", "1", "4", "8192").model.rope_scaling
    assert scaling == (8.0, 1.0, 4.0, 8192.0)
    assert settings_of("--model.rope-scaling", "None").model.rope_scaling is None
    assert settings_of("--optim.grad-clip", "2").optim.grad_clip == 2.0
    assert settings_of("--model.no-bias").model.bias is False
    assert settings_of("--config", "shakespeare", "--model.bias").model.bias is True
    assert settings_of("--model.activation", "relu").model.activation == "relu"
    assert settings_of("--mesh.data", "2").mesh.data == 2
    assert settings_of("--data.text", "my text.txt").data.text == "my text.txt"
    # Only together are these two sound, so they must not be checked one by one.
    model = settings_of("--model.n-head", "3", "--model.n-embd", "48").model
    assert (model.n_head, model.n_embd) == (3, 48)


def test_run_name():
    assert parse_train(["--run", "mine"]).run == "mine"
    assert parse_train(["--run=mine"]).run == "mine"


def test_resume_starts_from_the_runs_own_config(elsewhere):
    config = replace(PRESETS["tiny"], steps=7)
    Run.create(Path("runs/mine"), config, CharTokenizer("ab"))
    command = parse_train(["--run", "mine", "--resume", "--steps", "9"])
    assert command.run == str(Path("runs/mine")) and command.resume
    assert command.settings == replace(config, steps=9)
    assert parse_train(["--resume"]).settings == config


@pytest.fixture
def made(elsewhere) -> Config:
    """The config of runs/mine."""
    config = replace(PRESETS["small"], steps=70)
    Run.create(Path("runs/mine"), config, CharTokenizer("ab"))
    return config


@pytest.mark.parametrize("name", ["mine", "runs/mine", "./runs/mine/", "runs/mine/config.json"])
def test_a_run_is_a_config_for_a_new_one(made, name):
    command = parse_train(["--config", name, "--seed", "3"])
    assert command.settings == replace(made, seed=3) and not command.resume
    assert command.directory() == Path("runs/mine-2")


def test_a_preset_comes_before_a_run_of_its_name(made):
    Run.create(Path("runs/tiny"), made, CharTokenizer("ab"))
    assert settings_of("--config", "tiny") == PRESETS["tiny"]
    assert settings_of("--config", "runs/tiny") == made


def test_runs_that_are_no_configs(made, monkeypatch):
    own = {"model": "Mine", "config": "mine.py"}
    Run.create(Path("runs/own"), made, CharTokenizer("ab"), own)
    assert message_of(parse_train, ["--config", "own"]) == (
        "own was trained with parts that its config does not hold (model Mine); give the file that "
        "defines them, --config mine.py"
    )
    Path("runs/mine/config.json").write_text('{"n_layer": 3}')
    assert message_of(parse_train, ["--config", "runs/mine/config.json"]) == (
        "runs/mine/config.json is not the config.json of a run: format None is not the format 2 "
        "this gptjax reads; update gptjax"
    )
    assert message_of(parse_train, ["--config", "mine"]).startswith("runs/mine/config.json is dama")
    assert message_of(parse_train, ["--config", "own", "--resume"])


def test_a_run_of_the_lecture_as_a_config_trains_that_model(made, monkeypatch):
    bigram = PRESETS["bigram"]
    Run.create(Path("runs/first"), bigram, CharTokenizer("ab"), {"model": "Bigram"})
    seen: dict[str, Any] = {}
    monkeypatch.setattr(training, "train", lambda *args, **kwargs: seen.update(kwargs, args=args))
    main(["train", "--config", "first"])
    assert seen["args"] == (bigram, Path("runs/first-2")) and seen["model"].__name__ == "Bigram"
    assert "no effect on the lecture's models" in message_of(
        parse_train, ["--config", "first", "--model.norm", "rms"]
    )


def test_a_run_to_resume_is_named_by_run(made):
    assert message_of(parse_train, ["--config", "mine", "--resume"]).startswith(
        "--config mine is a run; to continue it give --run mine --resume"
    )


def test_resume_or_start(made, monkeypatch):
    """The same command starts a run and continues it; its exit code says whether it is done."""
    argv = list("--config tiny --steps 9 --resume-or-start --run".split())
    new, old = parse_train([*argv, "new"]), parse_train([*argv, "mine", "--warmup-steps", "1"])
    assert (new.resume, new.settings.model, new.directory()) == (
        *(False, PRESETS["tiny"].model),
        Path("runs/new"),
    )
    assert (old.resume, old.settings.model, old.settings.steps) == (True, made.model, 9)
    assert old.directory() == Path("runs/mine")
    Path("runs/half").mkdir()
    Path("runs/half/tokenizer.json").touch()  # killed while it was made
    assert not parse_train([*argv, "half"]).resume
    for step, code in ((8, 75), (9, None)):
        monkeypatch.setattr(training, "train", lambda *_, step=step, **__: {"step": step})
        if code is None:
            main(["train", *argv, "new"])
        else:
            with pytest.raises(SystemExit) as caught:
                main(["train", *argv, "new"])
            assert caught.value.code == code
    main(["train", "--config", "tiny", "--steps", "10"])  # 0 after a signal, as ever


def test_a_warm_up_that_resuming_would_not_end(made):
    for length in ("--steps 20", "--tokens 40960"):
        assert message_of(parse_train, ["--run", "mine", "--resume", *length.split()]) == (
            "20 steps would end runs/mine within its warm-up of 50; give --steps 50 or more, or "
            "keep its learning rates with --optim.schedule-steps 70"
        )
    kept = parse_train(["--run", "mine", "--resume", "--steps=20", "--schedule-steps=70"])
    assert kept.settings == replace(made, steps=20, optim=replace(made.optim, schedule_steps=70))


def test_a_budget_of_tokens():
    command = parse_train(["--tokens", "1e6"])
    assert command.settings == replace(PRESETS["small"], steps=488)
    assert command.budget == "1,000,000 tokens are 488 steps of 2,048 tokens (32 x 64)"
    short = parse_train(["--tokens", "10240", "--batch-size", "4"])
    assert short.settings.steps == 40 and short.fitted == "optim.warmup_steps=2, not 50"


def test_a_budget_of_flops(made, monkeypatch, capsys):
    """Of a model of 1 layer, width 2 and 3 tokens, by hand."""
    size = "--n-layer 1 --n-head 1 --n-embd 2 --block-size 4 --batch-size 5 --vocab-size 3"
    per_token = 6 * ((2 * 6 + 6) + (4 + 2) + (2 * 8 + 8) + (8 * 2 + 2) + 2 * 4 + 6) + 12 * 2 * 4
    seen: list[Any] = []
    monkeypatch.setattr(training, "train", lambda *args, **kwargs: seen.append(args[0].steps))
    main(f"train --config tiny {size} --flops {per_token * 20 * 8 - 1}".split())
    assert seen == [7]
    assert "FLOPs are 7 steps of 1.15e+04 FLOPs (20 tokens)" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(f"train --config tiny {size} --flops 3".split())
    assert "--flops 3 is less than one step of 1.15e+04 FLOPs" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main("train --config bigram --flops 1e9".split())
    assert "--flops is for the config's own GPT" in capsys.readouterr().err


TRAIN_MESSAGES = [
    ("--config smal", "unknown preset 'smal'; did you mean small? give the path of a Python file"),
    (
        "--config zzz",
        "unknown preset 'zzz'; give the path of a Python file, a run or its config.json, or one of "
        f"{NAMES}",
    ),
    ("--config no.json", "cannot read no.json: No such file or directory"),
    ("--resume-or-start", "--resume-or-start needs --run NAME, for a repeated command must find"),
    ("--run x --resume-or-start=true", "give --resume-or-start alone, without a value"),
    ("--tokens 1000 --steps 2", "--steps and --tokens exclude each other; give one of them"),
    ("--tokens 1e6 --flops 1e9", "--tokens and --flops exclude each other; give one of them"),
    ("--tokens 2047", "--tokens 2,047 is less than one step of 2,048 tokens (32 x 64); give more"),
    ("--flops nan", "--flops=nan is out of range; give a number above 0"),
    (
        "--val x --val-limit 3",
        "--data.val-limit has no effect with --data.val, all of which is read",
    ),
    ("--model.n_layr 3", f"unknown flag --model.n_layr (did you mean --model.n-layer?){SEE_TRAIN}"),
    ("--n_layr 3", f"unknown flag --n_layr (did you mean --model.n-layer?){SEE_TRAIN}"),
    ("--stepz 4", f"unknown flag --stepz (did you mean --steps?){SEE_TRAIN}"),
    ("--qqq", f"unknown flag --qqq{SEE_TRAIN}"),
    ("extra", "unexpected 'extra'; is it --config extra?"),
    ("config/mine.py --steps 3", "unexpected 'config/mine.py'; is it --config config/mine.py?"),
    ("--model.n-layer x", f"--model.n-layer: expected an integer, got 'x'{SEE_TRAIN}"),
    ("--steps 1.5", f"--steps: expected an integer, got '1.5'{SEE_TRAIN}"),
    ("--steps 1e999", f"--steps: expected an integer, got '1e999'{SEE_TRAIN}"),
    ("--model.dropout abc", f"--model.dropout: expected a number, got 'abc'{SEE_TRAIN}"),
    ("--grad-clip abc", f"--optim.grad-clip: expected a number or None, got 'abc'{SEE_TRAIN}"),
    ("--model.activation swish", "expected one of gelu, gelu_erf, relu, relu2, swiglu, got"),
    ("--model.bias=maybe", "--model.bias is on or off: give it alone, or --model.no-bias"),
    (
        "--model.n-head 5",
        "model.n_embd=128 is not divisible by model.n_head=5; change one of them (heads share the "
        "width equally)",
    ),
    ("--model.n-head", "--model.n-head needs a value"),
    ("--config", "--config needs a value"),
    ("--run", "--run needs a value"),
    ("--steps 0", "steps=0 is too small; give 1 or more"),
    ("--distributed-wait 0", "--distributed-wait 0 is too small; give 1 or more seconds"),
    (
        "--resume --run nope",
        "runs/nope is not a run's folder (it has no config.json); available runs: none",
    ),
    ("--resume", "there is no run in runs/; train one with python train.py"),
    ("--resume=true", "give --resume alone, without a value"),
    (
        "--resume --config tiny",
        "there is no run of preset tiny in runs/; train one with python train.py",
    ),
]


@pytest.mark.parametrize(("argv", "message"), TRAIN_MESSAGES, ids=[a for a, _ in TRAIN_MESSAGES])
def test_train_says_what_is_wrong(argv, message):
    assert message in message_of(parse_train, argv.split())


def test_a_step_is_made_again_by_one_process(elsewhere, monkeypatch):
    monkeypatch.setattr(folders, "find", lambda *args, **kwargs: elsewhere)
    monkeypatch.setattr("gptjax.runs.run.read_config", lambda directory: PRESETS["tiny"])
    assert message_of(parse_train, ["--replay", "3", "--distributed", "auto"]) == (
        "--replay runs in one process; leave --distributed out"
    )


def test_two_presets_are_not_mixed():
    """The name of the run's folder and its settings must come from the same preset."""
    try:
        command = parse_train(["--config", "small", "--config", "tiny"])
    except UserError:
        return
    assert command.settings == PRESETS[command.config]


def test_a_name_too_long_for_the_disk_is_a_user_error():
    name = "x" * 300
    for action in (
        lambda: parse_train(["--resume", "--run", name]),
        lambda: folders.new_directory(name, "small"),
    ):
        with pytest.raises(UserError):
            action()


# ---------------------------------------------------------------------------------------------
# sample.py


def test_sample_defaults_and_spellings():
    assert parse_sample([]) == SampleCommand()
    expected = SampleCommand(run="mine", max_new_tokens=5, top_k=3, unknown="skip", prompt="--a")
    dashes = ["--run", "mine", "--max-new-tokens", "5", "--top-k", "3", "--unknown", "skip"]
    for argv in (dashes, [word.replace("-n", "_n").replace("top-", "top_") for word in dashes]):
        assert parse_sample([*argv, "--prompt=--a"]) == expected


SAMPLE_MESSAGES = [
    ("--max-new-tokens 0", "--max-new-tokens 0 is too small; give 1 or more"),
    ("--num-samples 0", "--num-samples 0 is too small; give 1 or more"),
    ("--temperature -1", "--temperature -1.0 is out of range; give 0 or more"),
    ("--temperature nan", "--temperature nan is out of range; give 0 or more"),
    ("--temperature inf", "--temperature inf is out of range; give 0 or more"),
    ("--top-k 0", "--top-k 0 is too small; give 1 or more"),
    ("--top-p 0", "--top-p 0.0 is out of range; give 0 < top-p <= 1"),
    ("--top-p 1.5", "--top-p 1.5 is out of range; give 0 < top-p <= 1"),
    ("--seed -1", "--seed -1 is out of range; give 0 <= seed < 2**32"),
    ("--seed 4294967296", "--seed 4294967296 is out of range; give 0 <= seed < 2**32"),
    ("--topk 3", f"--topk is --top-k here{SEE_SAMPLE}"),
    ("--unknown foo", "--unknown: expected one of error, replace, skip, got 'foo'"),
    ("--prompt", "--prompt needs a value"),
]


@pytest.mark.parametrize(("argv", "message"), SAMPLE_MESSAGES, ids=[a for a, _ in SAMPLE_MESSAGES])
def test_sample_says_what_is_wrong(argv, message):
    assert message in message_of(parse_sample, argv.split())


# ---------------------------------------------------------------------------------------------
# Names people try


@pytest.mark.parametrize(
    ("typed", "same"),
    [
        ("--n_layer 2", "--model.n-layer 2"),
        ("--n-layer=2", "--model.n-layer 2"),
        ("--learning_rate 1e-2", "--optim.learning-rate 0.01"),
        ("--dropout 0.1 --block_size=32", "--model.dropout 0.1 --model.block-size 32"),
        ("--bias=False", "--model.no-bias"),
        ("--bias False --steps 80", "--model.no-bias --steps 80"),
        ("--no-bias", "--model.no-bias"),
        ("--model.no_bias=false", "--model.bias"),
        ("--steps 1e3", "--steps 1000"),
        ("--steps 1_000", "--steps 1000"),
        ("--warmup-steps 1.0E+2", "--optim.warmup-steps 100"),
    ],
)
def test_other_spellings(typed, same):
    assert settings_of(*typed.split()) == settings_of(*same.split())


@pytest.mark.parametrize(
    ("typed", "flag"),
    [
        ("--lr", "--optim.learning-rate"),
        ("--max_iters", "--steps"),
        ("--max-steps", "--steps"),
        ("--out_dir", "--run"),
        ("--output_dir", "--run"),
        ("--context-length", "--model.block-size"),
        ("--max_seq_len", "--model.block-size"),
        ("--num_layers", "--model.n-layer"),
        ("--depth", "--model.n-layer"),
        ("--heads", "--model.n-head"),
        ("--dataset", "--data.text"),
        ("--data", "--data.text"),
        ("--model", "--init"),
        ("--validation_file", "--data.val"),
        ("--optim", "--optim.kind"),
        ("--lr_decay_iters", "--optim.schedule-steps"),
        ("--per_device_train_batch_size", "--batch-size"),
        ("--gradient_accumulation_steps", "--optim.accumulate"),
        ("--eval_interval", "--eval-every"),
        ("--bf16", "--model.dtype bfloat16"),
    ],
)
def test_foreign_names_of_training(typed, flag):
    assert message_of(parse_train, [typed, "3"]) == f"{typed} is {flag} here{SEE_TRAIN}"


@pytest.mark.parametrize(
    "typed", ["--epochs", "--device", "--compile", "--min_lr", "--wandb_project"]
)
def test_names_without_a_flag(typed):
    assert message_of(parse_train, [typed, "3"]).startswith(f"there is no {typed}: ")


@pytest.mark.parametrize(
    ("typed", "flag"),
    [("--max_tokens", "--max-new-tokens"), ("--n", "--num-samples"), ("--start", "--prompt")],
)
def test_foreign_names_of_sampling(typed, flag):
    assert message_of(parse_sample, [typed, "3"]) == f"{typed} is {flag} here{SEE_SAMPLE}"


def test_synonyms_stand_for_flags_and_for_one_flag_of_a_command():
    for cls in (TrainCommand, SampleCommand):
        flags = {flag.name: flag for flag in flags_of(cls)}
        mine = [full for full in names.SYNONYMS if full.partition(" ")[0] in flags]
        words = [word for full in mine for word in names.SYNONYMS[full].split()]
        assert len(words) == len(set(words))
        own = {name[2:] for name in flags} | {name[2:].rpartition(".")[2] for name in flags}
        # `--out` names the run where one is trained, and is a flag of its own for samples.
        assert not set(words) & own - {flag.section for flag in flags.values()} - {"out"}
    every = {flag.name for cls in (TrainCommand, SampleCommand) for flag in flags_of(cls)}
    assert {full.partition(" ")[0] for full in names.SYNONYMS} <= every


# ---------------------------------------------------------------------------------------------
# Config files

RECIPE = """
from dataclasses import replace
import flax.linen as nn
import optax
import beside
from gptjax.presets import PRESETS

config = replace(PRESETS["tiny"], steps=7)

class Model(nn.Module):
    config: object
    vocab_size: int

model = Model
optimizer = lambda config: optax.sgd(config.optim.learning_rate)
loss_fn = beside.loss
"""


@pytest.fixture
def mine(elsewhere):
    (elsewhere / "configs").mkdir()
    (elsewhere / "configs" / "beside.py").write_text("def loss(): ...\n")
    (elsewhere / "configs" / "mine.py").write_text(RECIPE)
    return "configs/mine.py"


def test_a_config_file_is_a_preset_with_parts(mine, monkeypatch):
    command = parse_train(["--config", mine, "--n-layer", "1"])
    tiny = PRESETS["tiny"]
    assert command.settings == replace(tiny, steps=7, model=replace(tiny.model, n_layer=1))
    assert command.directory() == Path("runs/mine")
    seen: dict[str, Any] = {}
    monkeypatch.setattr(training, "train", lambda *args, **kwargs: seen.update(kwargs, args=args))
    main(["train", "--config", mine, "--steps", "9"])
    assert seen.pop("args") == (replace(tiny, steps=9), Path("runs/mine"))
    passed = {"resume", "profile", "special_tokens", "model", "optimizer", "loss_fn", "recipe"}
    assert seen.keys() == passed
    assert seen["recipe"] == mine and seen["loss_fn"].__name__ == "loss"
    module = seen["model"](tiny.model, 65)
    assert (module.config, module.vocab_size) == (tiny.model, 65)
    assert callable(seen["optimizer"].update)
    main(["train", "--config", "tiny"])
    assert seen.pop("args") == (tiny, Path("runs/tiny"))


def test_a_config_file_gives_a_resumed_run_its_parts_only(mine, monkeypatch):
    config = replace(PRESETS["tiny"], seed=3)
    Run.create(Path("runs/mine"), config, CharTokenizer("ab"))
    command = parse_train(["--config", mine, "--resume", "--steps", "80"])
    assert command.settings == replace(config, steps=80) and command.recipe
    seen: dict[str, Any] = {}
    monkeypatch.setattr(
        "gptjax.tools.replay.replay", lambda *args, **kwargs: seen.update(kwargs, args=args)
    )
    main(["replay", "2", "--config", mine])
    assert seen.pop("args") == (Path("runs/mine"), 2)
    assert seen.keys() == {"model", "optimizer", "loss_fn"}
    assert seen["model"](config.model, 2).vocab_size == 2


def test_the_model_of_a_config_file_may_be_a_function_or_a_module(elsewhere):
    head = "from gptjax.presets import PRESETS\nimport flax.linen as nn\nconfig=PRESETS['tiny']\n"
    for model in ("nn.Dense(3)", "lambda config, vocab_size: nn.Dense(vocab_size)"):
        Path("own.py").write_text(f"{head}model = {model}\n")
        recipe = parse_train(["--config", "own.py"]).recipe
        made = make_model(recipe.config.model, 3, recipe.model) if recipe else None
        assert getattr(made, "features", None) == 3


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (None, "config file bad.py is not there; give a Python file or a preset's name"),
        ("x = 1", "config file bad.py defines no `config`"),
        ("config = {}", "config file bad.py: `config` is a dict, expected a gptjax.config.Config"),
        ("x = 1\nx.y", "config file bad.py, line 2: AttributeError: 'int' object has no attribute"),
        ("x = 1\n\ny = (", "config file bad.py, line 3: SyntaxError: '(' was never closed"),
        ("import nowhere_at_all", "config file bad.py, line 1: ModuleNotFoundError: No module"),
        (
            "from gptjax.config import Config\nconfig = Config(steps=0)",
            "config file bad.py, line 2: steps=0 is too small; give 1 or more",
        ),
        (
            "from gptjax.config import Config\nconfig = Config()\nmodel = 3",
            "config file bad.py: `model` is 3, expected a flax.linen.Module",
        ),
    ],
)
def test_a_config_file_that_cannot_be_used(elsewhere, code, message):
    if code is not None:
        Path("bad.py").write_text(code)
    before = list(sys.path)
    assert message_of(parse_train, ["--config", "bad.py"]).startswith(message)
    assert sys.path == before


def test_presets_that_became_files(monkeypatch):
    monkeypatch.delitem(PRESETS, "fast", raising=False)
    assert "--config examples/speedrun/fast.py" in message_of(parse_train, ["--config", "fast"])


def test_a_run_takes_no_preset(capsys):
    for argv in (["sample"], ["verify"], ["replay", "1"], ["export", "a", "b"]):
        with pytest.raises(SystemExit) as caught:
            main([*argv, "--config", "tiny"])
        assert caught.value.code == 2
        assert "--config tiny is not a Python file" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------
# gptjax


def test_the_front_command(capsys):
    main(["--version"])
    assert capsys.readouterr().out == f"gptjax {__version__}\n"
    for argv in ([], ["--help"], ["-h"]):
        main(argv)
        listed = capsys.readouterr().out
        for name, sentence in COMMANDS.items():
            assert f"  {name} " in listed and sentence in listed and sentence.endswith(".")
    with pytest.raises(SystemExit) as caught:
        main(["trian"])
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith(
        "gptjax: error: unknown command 'trian'; did you mean train? commands: train, sample, "
    )


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_in_whole_sentences(name, capsys):
    with pytest.raises(SystemExit) as caught:
        main([name, "--help"])
    assert caught.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: gptjax {name} ")
    with pytest.raises(SystemExit) as caught:
        main([name, "--no-such-flag"])
    assert caught.value.code == 2
    assert capsys.readouterr().err == (
        f"gptjax {name}: error: unknown flag --no-such-flag; see gptjax {name} --help\n"
    )


def test_no_help_imports_jax():
    code = """
import contextlib, sys
from gptjax.cli.main import COMMANDS, main
main(["--help"])
for name in COMMANDS:
    with contextlib.suppress(SystemExit):
        main([name, "--help"])
print({"jax", "flax", "optax", "orbax", "matplotlib"} & {*sys.modules}, file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], **spawn_options())
    assert (done.returncode, done.stderr) == (0, "set()\n")


def test_presets_are_listed(capsys):
    main(["presets"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split("\t") == ["preset", "parameters", "tokens/step", "steps", "for"]
    assert [line.split()[0] for line in lines[1:]] == list(PRESETS)


def test_prompts(elsewhere):
    Path("start.txt").write_bytes("To be,\r\n\u00e9".encode())
    Path("latin.txt").write_bytes(b"caf\xe9")
    Path("empty.txt").touch()
    Path("wide.txt").write_bytes("To be".encode("utf-16-le"))
    Path("mark.txt").write_bytes(b"\xef\xbb\xbfTo be")
    with Path("large.txt").open("wb") as file:
        file.truncate(10**12)  # it takes no space
    os.mkfifo("pipe")
    assert read_prompt(None) is None
    assert read_prompt("file:mark.txt") == "To be"
    assert read_prompt("ROMEO:") == "ROMEO:"
    assert read_prompt("file:start.txt") == "To be,\r\n\u00e9"
    nothing = "the prompt has no characters; give one or more, or leave --prompt out"
    for prompt, message in (
        ("", nothing),
        ("file:empty.txt", nothing),
        ("file:none.txt", "prompt file none.txt: No such file or directory"),
        ("file:.", "prompt file .: Is a directory"),
        ("file:latin.txt", "prompt file latin.txt is not UTF-8 (byte 3)"),
        ("file:wide.txt", "prompt file wide.txt has NULs, as in UTF-16; store it as UTF-8"),
        ("file:pipe", "prompt file pipe: it is a device or a pipe; give a regular file"),
        ("file:/dev/zero", "prompt file /dev/zero: it is a device or a pipe; give a regular file"),
        (f"file:{'x' * 300}", f"prompt file {'x' * 300}: File name too long"),
        ("file:a\0b", "prompt file a\\x00b: there is a NUL in its name"),
        ("file:large.txt", "prompt file large.txt: it is larger than 67108864 bytes"),
    ):
        assert message_of(read_prompt, prompt) == message


# ---------------------------------------------------------------------------------------------
# Completion


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("gptjax trai", "train"),
        ("gptjax train --model.n-l", "--model.n-layer"),
        ("gptjax train --config ti", "tiny"),
        ("gptjax train --config mi", "mine.py"),
        ("gptjax train --config=ti", "tiny"),
        ("gptjax train --model.activation sw", "swiglu"),
        ("gptjax sample --run ol", "old"),
        ("gptjax verify ol", "old"),
        ("gptjax import --bl", "--block-size"),
        ("gptjax completion f", "fish"),
        ("gptjax nonsense --x", ""),
        ("gptjax train --data.text my", ""),  # bash itself offers files then
    ],
)
def test_bash_completes(elsewhere, line, expected):
    """The script that is printed, run in bash as a Tab would run it."""
    Run.create(Path("runs/old"), PRESETS["tiny"], CharTokenizer("ab"))
    Path("mine.py").touch()
    # As readline cuts a line into words, `=` being one.
    words = line.replace("=", " = ").split()
    script = f"""
        gptjax() {{ PYTHONPATH={ROOT} {sys.executable} -m gptjax "$@"; }}
        eval "$(gptjax completion bash)"
        COMP_WORDS=({" ".join(words)})
        COMP_CWORD={len(words) - 1}
        $(complete -p gptjax | sed "s/.*-F \\([^ ]*\\).*/\\1/")
        echo "${{COMPREPLY[*]}}"
    """
    done = subprocess.run(["bash", "-c", script], **spawn_options() | {"cwd": elsewhere})
    assert (done.stdout.strip(), done.stderr) == (expected, "")


@pytest.mark.parametrize(("shell", "options"), [("zsh", ["-n"]), ("fish", ["--no-execute"])])
def test_other_shells_understand_their_script(shell, options, capsys, elsewhere):
    main(["completion", shell])
    Path("script").write_text(capsys.readouterr().out)
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    assert subprocess.run([shell, *options, "script"]).returncode == 0


# ---------------------------------------------------------------------------------------------
# The scripts themselves

# Runs a script as its shell line would, then tells on stderr whether jax was imported.
WATCH = """
import runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    print("jax imported:", "jax" in sys.modules, file=sys.stderr)
"""


def run_script(script: str, *argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", WATCH, script, *argv], **spawn_options())


def spawn_options() -> dict[str, Any]:
    return {"capture_output": True, "text": True, "timeout": 60, "cwd": ROOT}


def help_of(script: str, *argv: str) -> str:
    """The help text without line breaks; checks that it came without jax."""
    done = run_script(script, *argv, "--help")
    assert done.returncode == 0
    assert done.stderr == "jax imported: False\n"
    return " ".join(done.stdout.split())


def shown_defaults(config: Any, prefix: str = "") -> dict[str, str]:
    """`{"--model.n-layer": "4"}` for every field of a config."""
    shown = {}
    for f in fields(config):
        value = getattr(config, f.name)
        flag = f"{prefix}{f.name}".replace("_", "-")
        shown |= (
            shown_defaults(value, f"{flag}.") if is_dataclass(value) else {f"--{flag}": str(value)}
        )
    return shown


@pytest.mark.parametrize("preset", ["small", "lecture"])
def test_train_help_lists_every_field_and_the_presets_value(preset):
    text = help_of("train.py", "--config", preset)
    for flag, value in shown_defaults(PRESETS[preset]).items():
        # From the flag to the first default after it.
        found = re.search(rf"{re.escape(flag)}[ ,].*?\(default: (.*?)\)", text)
        assert found, flag
        assert value == "()" or found[1] == value, flag  # nothing is no default to show
    for name in (*PRESETS, "--config", "--run", "--resume"):
        assert name in text


def test_sample_help_lists_every_field():
    text = help_of("sample.py")
    for flag in SAMPLE_FLAGS:
        assert re.search(rf"{flag}[ ,]", text), flag


def test_help_needs_no_run_to_resume(elsewhere, capsys):
    with pytest.raises(SystemExit) as caught:
        parse_train(["--resume", "--help"])
    assert caught.value.code == 0
    assert "usage: train.py" in capsys.readouterr().out


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(
    ("arguments", "code", "line"),
    [
        ("presets >/dev/full", 2, "gptjax presets: error: the output cannot be written (No space "),
        ("--version >/dev/full", 2, "gptjax: error: the output cannot be written (No space left "),
        ("train --help >/dev/full", 2, "gptjax train: error: the output cannot be written (No sp"),
        ("presets >&-", 0, ""),
        ("presets x >&- 2>&-", 2, ""),
        ("presets x 2>/dev/full", 2, ""),
        ("presets é日 >&-", 2, "gptjax presets: error: unexpected '\\xe9\\u65e5'"),
    ],
)
def test_any_standard_streams(arguments, code, line, unbuffered):
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUNBUFFERED": unbuffered}
    command = f"{shlex.quote(sys.executable)} -m gptjax {arguments}"
    options = {**spawn_options(), "env": environment}
    done = subprocess.run(command, shell=True, **options)
    assert (done.returncode, done.stderr[: len(line)]) == (code, line)
    assert len(done.stderr.splitlines()) == bool(line)


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_streams_escape_what_their_encoding_lacks(monkeypatch, errors):
    written = {name: io.BytesIO() for name in ("stdout", "stderr")}
    for name, raw in written.items():
        monkeypatch.setattr(sys, name, io.TextIOWrapper(raw, "ascii", errors, write_through=True))
    streams.prepare()
    for name, raw in written.items():
        getattr(sys, name).write("é日\udcff")
        assert raw.getvalue() == rb"\xe9\u65e5\udcff"


def test_closed_streams_are_opened_before_any_file():
    """Or the next file, such as a run's lock, would get their descriptors and what is written."""
    code = (
        "import sys; from gptjax.cli import streams; streams.prepare(); print(open('x').fileno())"
    )
    Path("x").touch()
    command = f'{shlex.quote(sys.executable)} -c "{code}" <&- 2>&-'
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, shell=True, capture_output=True, text=True, env=environment)
    assert int(done.stdout) > 2


@pytest.mark.parametrize("script", ["train.py", "sample.py"])
def test_an_unknown_flag_is_one_line_and_exit_2(script):
    done = subprocess.run([sys.executable, script, "--stepz", "4"], **spawn_options())
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith(f"{script}: error: unknown flag --stepz")


@pytest.mark.parametrize("name", ["x" * 300, "y/" * 3000, "a\0b", "a/" * 1500])
def test_names_that_no_file_can_have(elsewhere, name: str):
    for function in (folders.find, lambda name: folders.new_directory(name, "small")):
        assert message_of(function, name).startswith("--run '")
    assert message_of(load_recipe, name).startswith("config file ")


def test_ctrl_c_at_any_time_is_one_line(capsys):
    with pytest.raises(SystemExit) as caught, one_line_errors("train.py"):
        raise KeyboardInterrupt
    assert caught.value.code == 130
    assert capsys.readouterr().err == "train.py: interrupted\n"


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (
            "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 GiB.\nBuffers: ...",
            "the device has too little memory (RESOURCE_EXHAUSTED: Out of memory while trying to "
            "allocate 9 GiB.); lower --batch-size or the model's sizes",
        ),
        (
            "Unable to initialize backend 'cuda': no driver\n(set JAX_PLATFORMS)",
            "Unable to initialize backend 'cuda': no driver; check the driver (nvidia-smi) and",
        ),
    ],
)
def test_what_lies_with_the_device_is_one_line(capsys, error, expected):
    with pytest.raises(SystemExit) as caught, one_line_errors("train.py"):
        raise RuntimeError(error)
    printed = capsys.readouterr().err
    assert caught.value.code == 2 and printed.count("\n") == 1
    assert printed.startswith(f"train.py: error: {expected}")
    with pytest.raises(RuntimeError, match="INTERNAL"), one_line_errors("train.py"):
        raise RuntimeError("INTERNAL: a bug")


def test_a_platform_without_its_plug_in_is_one_line(monkeypatch, capsys):
    """JAX asserts that it has found a device."""
    fails = compile("assert False", "jax/_src/xla_bridge.py", "exec")
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    with pytest.raises(SystemExit) as caught, one_line_errors("train.py"):
        exec(fails)
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith(
        "train.py: error: JAX finds no device of JAX_PLATFORMS=cuda; install its plug-in ("
    )
    with pytest.raises(AssertionError), one_line_errors("train.py"):
        raise AssertionError("a bug")
    monkeypatch.delenv("JAX_PLATFORMS")
    with pytest.raises(AssertionError), one_line_errors("train.py"):
        exec(fails)


def test_a_message_is_one_line_that_ends_and_paints_nothing():
    assert str(UserError("red \x1b[31m\nand\u2028more: é 文")) == (
        "red \\x1b[31m\\nand\\u2028more: é 文"
    )
    half = "x" * (LONGEST // 2)
    assert str(UserError("x" * 10**6)) == f"{half}...{half}"
    assert str(UserError(f"{half * 9}; do this")).endswith("xxx; do this")


FLAGS = [*shown_defaults(Config()), "--config", "--run", "--resume", "--help", "-h"]
SAMPLE_FLAGS = [*shown_defaults(SampleCommand())]
# What an operating system can pass: no NUL and no lone surrogates.
any_word = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=8)
values = st.sampled_from(
    [
        "",
        "-",
        "--",
        "1",
        "-1",
        "0.5",
        "1e999",
        "nan",
        "None",
        "True",
        "x",
        "tiny",
        "=",
        "~",
        "9" * 5000,
    ]
)
words = st.one_of(
    st.sampled_from(FLAGS + SAMPLE_FLAGS),
    values,
    any_word,
    st.builds("{}={}".format, st.sampled_from(FLAGS + SAMPLE_FLAGS), values),
)


@pytest.mark.parametrize(
    ("parse", "kind"), [(parse_train, TrainCommand), (parse_sample, SampleCommand)]
)
@given(argv=st.lists(words, max_size=5))
@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_words_give_a_command_or_a_user_error(parse, kind, argv):
    try:
        assert isinstance(parse(argv), kind)
    except UserError as error:
        assert len(str(error).splitlines()) == 1
    except SystemExit as leave:
        assert leave.code == 0 and ("-h" in argv or "--help" in argv)


# ---------------------------------------------------------------------------------------------
# Starting from weights


def test_init_starts_from_the_preset_for_it():
    config = parse_train(["--init", "gpt2-xl", "--model.block-size", "256"]).settings
    assert config == replace(
        PRESETS["finetune"],
        init="gpt2-xl",
        model=replace(PRESETS["finetune"].model, block_size=256),
    )
    assert parse_train(["--config", "finetune-shakespeare"]).settings.init == "gpt2"
    small = parse_train(["--config", "small", "--init=runs/other"])
    assert small.settings == replace(PRESETS["small"], init="runs/other")


@pytest.mark.parametrize(
    ("argv", "fitted"),
    [
        ("--config small --steps 2", "optim.warmup_steps=0, not 50"),
        ("--config small --steps 40", "optim.warmup_steps=2, not 50"),
        ("--init x --batch-size 4", "optim.accumulate=4, not 32"),
        ("--init x --batch_size=48", "optim.accumulate=16, not 32"),
        ("--config small --steps 2 --warmup-steps 1", ""),
        ("--config small --steps 60", ""),
        ("--config small --steps 20 --schedule-steps 1000", ""),
        ("--config small --schedule-steps 100", ""),
        ("--config small --schedule-steps 20", "optim.warmup_steps=1, not 50"),
    ],
)
def test_a_preset_gives_way_to_what_is_given(argv, fitted):
    assert parse_train(argv.split()).fitted == fitted


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--config small --steps 2 --warmup-steps 3", "optim.warmup_steps=3 is more than steps=2"),
        ("--init x --batch-size 4 --accumulate 3", "batch_size=4 is not divisible by optim.accumu"),
    ],
)
def test_what_is_given_stays(argv, message):
    assert message_of(parse_train, argv.split()).startswith(message)


def test_all_that_is_missing_is_named(capsys):
    with pytest.raises(SystemExit):
        main(["export"])
    assert capsys.readouterr().err == (
        "gptjax export: error: RUN and FOLDER are missing; see gptjax export --help\n"
    )


def test_the_model_of_loaded_weights_cannot_be_changed():
    with pytest.raises(UserError) as error:
        parse_train(["--init", "gpt2", "--model.n-layer", "3"])
    assert str(error.value) == (
        "--model.n-layer cannot be set with --init, for the model comes with its weights; what can "
        "be set: block_size, dropout, attn_dropout, attention, dtype, remat, remat_saves"
    )


def test_a_lecture_model_refuses_settings_that_it_does_not_read():
    with pytest.raises(UserError, match=r"--model\.position has no effect .* lecture/3-head"):
        parse_train(["--config", "lecture/3-head", "--model.position", "rotary"])
    assert parse_train(["--config", "lecture/3-head", "--n-embd", "64"]).settings.model.n_embd == 64


def test_a_run_may_be_called_none(elsewhere):
    assert parse_sample(["--run", "none"]).run == "none"
    assert parse_sample(["--run", "None"]).run is None
