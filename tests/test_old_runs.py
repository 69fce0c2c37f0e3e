"""Tests that run folders of gptjax 0.1 (format 1) load, verify, sample and resume."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from run_helpers import (
    CONFIG,
    QUIET,
    SignalAt,
    arrays,
    assert_same,
    contents,
    message,
    records,
    text_file,
)

import gptjax
from gptjax.config import Config, ModelConfig
from gptjax.interop.export import export
from gptjax.lecture.models import Bigram
from gptjax.runs import files
from gptjax.runs.run import Run, read_config
from gptjax.tools.replay import replay
from gptjax.tools.verify import verify
from gptjax.training import train

# What gptjax 0.1 wrote for the fields that are gone, with the values of its presets.
HARMLESS: dict[str, Any] = {
    **{"kind": "gpt", "qkv_bias": True, "ngram": 1, "pair_rows": None, "recall": None},
}
VARIANTS: dict[str, Callable[[Config], Config]] = {
    "adamw": lambda config: config,
    "muon and ema": lambda config: replace(
        config, optim=replace(config.optim, kind="muon", schedule="wsd", ema=0.9)
    ),
    "lora": lambda config: replace(config, optim=replace(config.optim, lora_rank=2)),
    "frozen": lambda config: replace(config, optim=replace(config.optim, freeze="wte", ema=0.9)),
}


def to_format_1(run: Path, **model: Any) -> None:
    """Rewrite a run's config.json, and the copies in its checkpoints, as gptjax 0.1 wrote them."""

    def rewrite(path: Path) -> None:
        values = json.loads(path.read_text())
        assert values.pop("format") == 2
        del values["gptjax"], values["parts"]
        values["model"] |= {**HARMLESS, **model}
        path.write_text(json.dumps({"format": 1, "gptjax": "0.1.0", **values}, indent=2) + "\n")

    rewrite(run / "config.json")
    for checkpoint in (run / "checkpoints").iterdir():
        rewrite(checkpoint / "config.json")
        (checkpoint / files.MANIFEST).unlink()
        files.seal(checkpoint)


@pytest.fixture(scope="module")
def config(play: str, tmp_path_factory: pytest.TempPathFactory) -> Config:
    return replace(CONFIG, data=text_file(tmp_path_factory.mktemp("text"), play))


@pytest.fixture(scope="module", params=VARIANTS)
def whole(request, config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the present format."""
    directory = tmp_path_factory.mktemp("whole") / "run"
    train(VARIANTS[request.param](config), directory, report=QUIET)
    return directory


def test_an_old_run_loads_samples_verifies_and_replays(whole: Path, tmp_path: Path):
    old = tmp_path / "old"
    shutil.copytree(whole, old)
    to_format_1(old)
    before = contents(old)
    assert read_config(old) == read_config(whole)
    assert all(check.sound for check in verify(str(old)))
    texts = ["".join(gptjax.load(run, "last").generate("the", 30)) for run in (old, whole)]
    assert texts[0] == texts[1]
    assert replay(old, 6, report=QUIET)["loss"] == records(whole)[6]["loss"]
    assert export(old, tmp_path / "exported") == "GPT2LMHeadModel"
    assert contents(old) == before


def test_an_old_run_resumes_bit_for_bit(whole: Path, tmp_path: Path):
    old, config = tmp_path / "old", read_config(whole)
    train(config, old, report=SignalAt(3))
    stopped = max(int(p.name) for p in (old / "checkpoints").iterdir())
    assert stopped < 8
    to_format_1(old)
    assert Run(old).config == config and Run(old).changed == {}
    train(Run(old).config, old, resume=True, report=QUIET)
    assert records(old) == records(whole)
    assert_same(arrays(old, 8), arrays(whole, 8))


def test_a_bigram_of_gptjax_01_is_the_lectures(config: Config, tmp_path: Path):
    """The part that it stands for need not be given; its table may have padding rows."""
    config = replace(config, model=ModelConfig(block_size=8, vocab_size=64))
    train(config, tmp_path / "whole", model=Bigram, report=QUIET)
    train(config, tmp_path / "old", model=Bigram, report=SignalAt(3))
    to_format_1(tmp_path / "old", kind="bigram", n_layer=1, n_head=1, norm="none")
    assert Run(tmp_path / "old").parts == {"model": "Bigram"}
    train(Run(tmp_path / "old").config, tmp_path / "old", resume=True, report=QUIET)
    assert records(tmp_path / "old") == records(tmp_path / "whole")
    assert_same(arrays(tmp_path / "old", 8), arrays(tmp_path / "whole", 8))
    assert all(check.sound for check in verify(str(tmp_path / "old")))
    assert len("".join(gptjax.load(tmp_path / "old").generate("the", 20))) == 20


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("recall", 4), ("pair_rows", 30_000), ("ngram", 2), ("qkv_bias", False)],
        *[("norm", "none"), ("init", "torch"), ("kind", "attention")],
    ],
)
def test_what_only_gptjax_01_can_do_is_refused_in_one_line(
    config: Config, tmp_path: Path, name: str, value: Any
):
    run = tmp_path / "run"
    train(replace(config, steps=1), run, report=QUIET)
    to_format_1(run, **{name: value})
    before = contents(run)
    for action in (
        lambda: train(config, run, resume=True, report=QUIET),
        lambda: gptjax.load(run),
        lambda: replay(run, 1, report=QUIET),
        lambda: export(run, tmp_path / "exported"),
    ):
        said = message(action)
        assert f"model.{name}={value!r} is a setting of gptjax 0.1" in said
    assert contents(run) == before and not (tmp_path / "exported").exists()
    [check] = [check for check in verify(str(run)) if check.sound is False]
    assert check.name == "config" and "gptjax 0.1" in check.found
