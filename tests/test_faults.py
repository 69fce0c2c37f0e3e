"""Tests of disk and file faults: damage is named in one line, and no intact data is lost."""

import gc
import json
import os
import random
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from run_helpers import QUIET, contents, message, text_file

from gptjax.config import Config, ModelConfig, OptimConfig
from gptjax.errors import UserError
from gptjax.runs import files, folders, records
from gptjax.runs.checkpoint import Checkpoints
from gptjax.runs.files import MANIFEST, MAX_JSON, Damaged
from gptjax.runs.loaded import load
from gptjax.runs.run import Run, read_config
from gptjax.text import dataset as data
from gptjax.text.dataset import Dataset, fingerprint
from gptjax.text.tokenizers import ByteTokenizer
from gptjax.training import train

CONFIG = Config(
    steps=6,
    batch_size=4,
    eval_every=2,
    save_every=2,
    steps_per_dispatch=2,
    model=ModelConfig(n_layer=1, n_head=1, n_embd=8, block_size=8),
    optim=OptimConfig(learning_rate=1e-2),
)
OFFSETS = int(os.environ.get("GPTJAX_FAULT_OFFSETS", "2"))  # corruptions per file


@pytest.fixture(scope="module")
def finished(tmp_path_factory, play) -> Path:
    folder = tmp_path_factory.mktemp("faults")
    config = replace(CONFIG, data=text_file(folder, play))
    train(config, folder / "run", report=QUIET)
    return folder / "run"


@pytest.fixture
def run(finished, tmp_path) -> Path:
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def resume(run: Path, **changes) -> dict:
    return train(replace(Run(run).config, **changes), run, resume=True, report=QUIET)


def lines(run: Path) -> list[dict]:
    return [{**r, "seconds": 0} for r in records.read(run / "metrics.jsonl")[0]]


# ---------------------------------------------------------------------------------------------
# Damage to the files of a checkpoint


def damages(path: Path, chance: random.Random) -> Iterator[tuple[str, bytes | None]]:
    """Corruptions of a file: a description, and its new content (None: deleted)."""
    good = path.read_bytes()
    yield "missing", None
    yield "longer", good + b"\0"
    if good:
        yield "empty", b""
    for _ in range(min(OFFSETS, len(good))):
        at = chance.randrange(len(good))
        flipped = bytearray(good)
        flipped[at] ^= 1 << chance.randrange(8)
        yield f"bit flipped at {at}", bytes(flipped)
        yield f"cut at {at}", good[:at]


def test_any_damage_to_a_checkpoint_is_detected(run):
    """It is named, and the previous checkpoint is used instead."""
    chance, folder = random.Random(0), run / "checkpoints" / "6"
    checkpoints = Checkpoints(run / "checkpoints")
    tried = 0
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    assert len(paths) > 20 and {"config.json", "tokenizer.json", "metrics.json", MANIFEST} <= {
        path.name for path in paths
    }
    for path in paths:
        good, name = path.read_bytes(), path.relative_to(folder).as_posix()
        for how, bad in damages(path, chance):
            path.unlink() if bad is None else path.write_bytes(bad)
            said = message(checkpoints.verify, 6)
            assert said.startswith(f"checkpoint {folder} is damaged: "), how
            # With damage to the checksums themselves, another file may be blamed.
            assert name in said or path.name == MANIFEST, (how, said)
            assert checkpoints.newest_sound() == 4, how
            path.write_bytes(good)
            tried += 1
        checkpoints.verify(6)
    print(f"corruptions tried, detected and recovered from: {tried}")


def test_an_unexpected_file_is_damage(run):
    (run / "checkpoints" / "6" / "strange").touch()
    assert message(Checkpoints(run / "checkpoints").verify, 6) == (
        f"checkpoint {run}/checkpoints/6 is damaged: strange is not listed in sha256.json"
    )


def test_a_huge_file_is_refused_before_it_is_hashed(run):
    with (run / "checkpoints" / "6" / "config.json").open("r+") as file:
        file.truncate(2**40)  # sparse; reading it would take an hour
    assert message(Checkpoints(run / "checkpoints").verify, 6) == (
        f"checkpoint {run}/checkpoints/6 is damaged: config.json is larger than {MAX_JSON} bytes"
    )


def test_resuming_sets_a_damaged_checkpoint_aside_and_redoes_it(run, finished):
    (run / "checkpoints" / "6" / "tokenizer.json").write_text("{}")
    resume(run)
    assert lines(run) == lines(finished)
    assert Checkpoints(run / "checkpoints").steps() == [4, 6]
    [aside] = (run / "checkpoints").glob("6.damaged-*")
    assert (aside / "tokenizer.json").read_text() == "{}"


def test_sampling_offers_the_newest_intact_checkpoint(run):
    (run / "checkpoints" / "6" / MANIFEST).unlink()
    error = message(load, run, 6)
    assert error.startswith(f"checkpoint {run}/checkpoints/6 is damaged: sha256.json is missing; ")
    assert error.endswith(" 4")
    assert list(load(run, 4).generate(max_new_tokens=3))


def test_without_an_intact_checkpoint_nothing_is_changed(run):
    for step in (4, 6):
        (run / "checkpoints" / str(step) / "config.json").write_text("")
    before = contents(run)
    for _ in range(2):
        assert message(resume, run).startswith(f"every checkpoint in {run}/checkpoints is damaged")
    assert contents(run) == before


@pytest.mark.parametrize(
    "manifest", ["", "[]", "7", '{"format": "1"}', '{"format": 1, "files": []}', '{"format": null}']
)
def test_invalid_checksums(run, manifest):
    (run / "checkpoints" / "6" / MANIFEST).write_text(manifest)
    assert message(Checkpoints(run / "checkpoints").verify, 6) == (
        f"checkpoint {run}/checkpoints/6 is damaged: sha256.json is not a list of checksums"
    )


def test_a_checkpoint_without_a_format_is_read(run):
    manifest = run / "checkpoints" / "6" / MANIFEST
    manifest.write_text(json.dumps(json.loads(manifest.read_text())["files"]))
    Checkpoints(run / "checkpoints").verify(6)


def test_a_newer_format_is_refused_and_left_in_place(run):
    """Resuming from an older checkpoint instead would silently discard the newer ones."""
    (run / "checkpoints" / "6" / MANIFEST).write_text('{"format": 2, "new": "layout"}')
    error = message(resume, run)
    assert error.startswith(f"checkpoint {run}/checkpoints/6 cannot be used: format 2 is newer")
    assert message(load, run, "6") == error
    assert (run / "checkpoints" / "6").is_dir()


# ---------------------------------------------------------------------------------------------
# Damage to the small files of a run


def copy_of(run: Path, name: str) -> str:
    """The end of an error that offers an intact copy."""
    return f" copy is {run}/checkpoints/6/{name}"


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_a_damaged_small_file_is_named_with_a_copy(run, name):
    path = run / name
    good = path.read_text()
    path.write_text("{")
    said = message(Run, run)
    assert said.startswith(f"{path} is damaged: not JSON: ") and said.endswith(copy_of(run, name))
    path.unlink()
    said = message(Run, folders.find(str(run)))
    assert said.startswith(f"cannot read {path}: No such file or directory; ")
    assert said.endswith(copy_of(run, name))
    shutil.copy(run / "checkpoints" / "6" / name, path)
    assert path.read_text() == good and Run(run)


def test_a_bit_flip_in_a_small_file_is_never_silent(run):
    """Either an error that names a copy, or a changed setting, which resuming reports."""
    chance, changed = random.Random(1), 0
    for name in ("config.json", "tokenizer.json"):
        path = run / name
        good = path.read_bytes()
        before = Run(run)
        for _ in range(60 * OFFSETS):
            bad = bytearray(good)
            bad[chance.randrange(len(good))] ^= 1 << chance.randrange(8)
            path.write_bytes(bad)
            try:
                opened = Run(run)
            except Damaged as error:
                assert str(error).startswith(f"{path} is damaged: ")
                assert str(error).endswith(copy_of(run, name))
            else:
                assert name == "config.json"
                assert opened.changed or opened.config == before.config
                changed += bool(opened.changed)
        path.write_bytes(good)
    assert changed


def test_resuming_reports_a_changed_setting(run, capsys):
    config = run / "config.json"
    config.write_text(config.read_text().replace('"learning_rate": 0.01', '"learning_rate": 0.02'))
    train(Run(run).config, run, resume=True)
    out = capsys.readouterr().out
    assert re.search(r"changed: optim\.learning_rate\b.* 0\.01\b.* 0\.02\b", out)


def test_another_text_is_refused_but_the_same_may_move(run, finished, tmp_path):
    config = Run(run).config
    text = Path(config.data.text).read_text()
    (tmp_path / "moved.txt").write_text(text)
    (tmp_path / "edited.txt").write_text(text.replace("king", "kong", 1))
    shutil.rmtree(run / "checkpoints" / "6")
    (tmp_path / "strange.txt").write_text(text + "\N{SNOWMAN}")
    for name in ("strange", "edited", "moved"):
        other = replace(config.data, text=str(tmp_path / f"{name}.txt"))
        if name != "moved":
            error = message(resume, run, data=other)
            assert error.startswith(f"the text {other.text} is not the one that {run} was trained")
            assert "replace or skip" not in error
        else:
            resume(run, data=other)
    assert lines(run) == lines(finished)


def test_every_token_changes_the_fingerprint(monkeypatch):
    tokens = np.arange(1000, dtype=np.uint16)
    dataset = Dataset(ByteTokenizer(), ((tokens, 1.0),), tokens[:100], 100, {})
    first = fingerprint(dataset)
    for place in range(0, 1000, 7):
        other = tokens.copy()
        other[place] += 1
        assert fingerprint(dataset._replace(parts=((other, 1.0),))) != first
    monkeypatch.setattr(data, "SAMPLED", 256)  # as for a long text: evenly spaced pieces
    monkeypatch.setattr(data, "PIECES", 8)
    first, found = fingerprint(dataset), 0
    for place in range(1000):
        other = tokens.copy()
        other[place] += 1
        found += fingerprint(dataset._replace(parts=((other, 1.0),))) != first
    assert found == 256


# ---------------------------------------------------------------------------------------------
# Damage to the metrics


def test_a_truncated_last_line_is_normal_after_a_kill(run, finished, capsys):
    path = run / "metrics.jsonl"
    path.write_text(path.read_text()[:-9])
    train(Run(run).config, run, resume=True)
    assert "damaged" not in capsys.readouterr().out
    assert lines(run) == lines(finished)
    assert not list(run.glob("*.damaged-*"))


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda text: text.replace('"step": 2', '"step" 2'), "line 3: Expecting ':' delimiter"),
        (lambda text: text.replace('"step": 2', '"step": 1'), "line 3: step 1, expected 2"),
        (lambda text: text.replace('"loss": ', '"loss": 1'), "it does not match its checksum"),
    ],
)
def test_a_damaged_line_is_named_and_the_others_are_kept(run, finished, capsys, harm, said):
    path = run / "metrics.jsonl"
    damaged = harm(path.read_text())
    path.write_text(damaged)
    train(Run(run).config, run, resume=True)
    printed = " ".join(capsys.readouterr().out.split())
    assert f"{path} is damaged: {said}" in printed
    [aside] = run.glob("metrics.jsonl.damaged-*")
    assert aside.read_text() == damaged and f"kept as {aside.name}" in printed
    steps = [r["step"] for r in lines(run)]
    assert steps in ([0, 1, 3, 4, 5, 6], [0, 1, 2, 3, 4, 5, 6])


def test_without_metrics_possible_best_checkpoints_are_kept(run):
    (run / "metrics.jsonl").unlink()
    resume(run, steps=12)
    assert Checkpoints(run / "checkpoints").steps() == [4, 10, 12]  # step 6 was evaluated again


# ---------------------------------------------------------------------------------------------
# Full and read-only disks


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A separate file system of one megabyte, if this process may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no permission to mount a small disk")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_full_disk_loses_nothing(run, finished, small_disk):
    """Whichever write fails, the run resumes exactly once there is space again."""
    home = small_disk / "run"
    shutil.copytree(run, home)
    shutil.rmtree(home / "checkpoints" / "6")
    (small_disk / "rest").write_bytes(bytes(2 * 10**5))
    free = shutil.disk_usage(small_disk).free
    failures = set()
    for left in (0, 4096, 20_000, 60_000, free // 2):
        filler = small_disk / "filler"
        filler.write_bytes(bytes(max(0, shutil.disk_usage(small_disk).free - left)))
        try:
            resume(home)
        except UserError as error:
            assert len(str(error).splitlines()) == 1
            failures.add(str(error).split(" ")[0])
        filler.unlink()
        assert Checkpoints(home / "checkpoints").newest_sound() in (4, 6)
    resume(home)
    assert lines(home) == lines(finished)
    assert failures
    gc.collect()  # after a failed write, orbax leaves the others pending: collect them here


def test_a_read_only_disk(run, small_disk):
    home = small_disk / "run"
    shutil.copytree(run, home)
    remount = ["mount", "-o", "remount,ro", str(small_disk)]
    subprocess.run(remount, check=True)
    error = message(resume, home)
    assert error.startswith(f"cannot write the run's folder {home}: Read-only file system; ")
    assert list(load(home).generate(max_new_tokens=3))  # sampling only reads
    new = small_disk / "new"
    assert message(train, CONFIG, new).startswith(f"cannot write the run's folder {new}: ")


@pytest.mark.parametrize("name", ["metrics.jsonl", "config.json", "checkpoints"])
def test_permission_lost_during_training(run, monkeypatch, name):
    """Simulated by a patch, because root has every permission."""
    real = Path.open

    def refuse(path: Path, mode: str = "r", *args, **kwargs):
        if name in str(path) and mode != "r" and mode != "rb":
            raise PermissionError(13, "Permission denied")
        return real(path, mode, *args, **kwargs)

    shutil.rmtree(run / "checkpoints" / "6")
    monkeypatch.setattr(Path, "open", refuse)
    said = message(resume, run, keep_last=3)
    assert "Permission denied" in said and name in said
    monkeypatch.undo()
    assert resume(run)["step"] == 6


def test_a_file_without_read_permission_is_not_damaged(run, monkeypatch):
    def refuse(path: Path, sync: bool = True) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(files, "_digest", refuse)
    said = message(resume, run)
    assert said.startswith(f"checkpoint {run}/checkpoints/6 cannot be used: ")
    assert said.endswith(" cannot be read: Permission denied")
    assert not list(run.rglob("*.damaged-*"))


def test_an_unreadable_sector_is_damage(run, monkeypatch):
    def fail(path: Path, sync: bool = True) -> str:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(files, "_digest", fail)
    assert message(Checkpoints(run / "checkpoints").verify, 6).endswith(
        " cannot be read: Input/output error"
    )


# ---------------------------------------------------------------------------------------------
# Order


def test_a_checkpoint_is_flushed_before_it_is_renamed(run, monkeypatch):
    """So that it survives a power cut: fsync files and folders, rename, fsync the parent."""
    events: list[str] = []
    real_fsync, real_rename = os.fsync, Path.rename

    def fsync(descriptor: int) -> None:
        events.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        real_fsync(descriptor)

    def rename(path: Path, target: Path) -> Path:
        events.append(f"rename to {Path(target).name}")
        return real_rename(path, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "rename", rename)
    shutil.rmtree(run / "checkpoints" / "6")
    resume(run)
    at = events.index("rename to 6")
    whole = run / "checkpoints" / "6"
    for path in (whole, *whole.rglob("*")):
        name = str(path).replace("/6", "/6.unsealed", 1)
        name = f"{name}.tmp" if path.name == MANIFEST else name
        assert name in events[:at], name
    assert str(run / "checkpoints") in events[at:]
    assert str(run / "metrics.jsonl") in events[:at]


def test_a_run_killed_during_creation_frees_its_name(tmp_path, finished, monkeypatch):
    monkeypatch.chdir(tmp_path)
    half = Path("runs/half")
    half.mkdir(parents=True)
    for name in (".lock", "tokenizer.json", "config.json.tmp"):
        (half / name).write_text("{")
    assert folders.new_directory("half", "small") == half
    config = replace(Run(finished).config, steps=1)
    assert train(config, half, report=QUIET)["step"] == 1


def test_links_out_of_the_folder_are_refused(run, tmp_path):
    outside = tmp_path / "outside"
    outside.write_text("precious")
    for name in ("metrics.jsonl", "config.json.tmp", "checkpoints/6/params/link"):
        link = run / name
        link.unlink(missing_ok=True)
        link.symlink_to(outside)
        for action in (Run, resume):
            assert message(action, run).startswith(f"{link} is a link or a special file; ")
        link.unlink()
    assert outside.read_text() == "precious"


def test_a_named_pipe_is_refused_without_blocking(run):
    (run / "config.json").unlink()
    os.mkfifo(run / "config.json")
    assert "is a link or a special file" in message(Run, run)
    assert message(read_config, run).startswith(f"{run}/config.json is damaged: it is ")
