"""The wheel, installed where no checkout is near, does what the README promises."""

import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from gptjax import __version__

ROOT = Path(__file__).resolve().parents[1]


def run(*argv: object, cwd: Path, **environment: str) -> str:
    """What a command prints; it must end with 0."""
    # Without what pytest and an outer virtual environment set; the caches of compiled programs and
    # XLA's flags of conftest.py stay.
    left_out = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    env = {k: v for k, v in os.environ.items() if k not in left_out} | environment
    done = subprocess.run([str(a) for a in argv], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"{argv}: {done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "-w",
        str(folder),
        str(ROOT),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode and re.search("No matching distribution|Connection|timed out", done.stderr):
        pytest.skip("no package index answers, from which the build backend would come")
    assert done.returncode == 0, done.stderr
    [wheel] = folder.glob("gptjax-*.whl")
    return wheel


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The commands of a new virtual environment that has the wheel.

    Its dependencies are those of the environment that runs the tests, by a path alone: an editable
    gptjax there is a .pth file, which is read in an environment's own folder only.
    """
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder)
    python = folder / "bin" / "python"
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(run(python, "-c", code, cwd=folder).strip())
    (site / "dependencies.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "-q")
    run(*pip, "--no-deps", "--no-index", wheel, cwd=folder)
    return folder / "bin"


@pytest.mark.network  # the build backend comes from a package index
def test_the_wheel_works_away_from_the_checkout(installed: Path, tmp_path: Path, play: str):
    home = {"HOME": str(tmp_path / "home"), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    (here := tmp_path / "here").mkdir()

    def gptjax(*argv: str) -> str:
        return run(installed / "gptjax", *argv, cwd=here, **home)

    code = "import gptjax; from gptjax.text import corpora; print(gptjax.__file__, corpora.names())"
    place = run(installed / "python", "-c", code, cwd=here, **home)
    assert place.startswith(str(installed.parent)) and "'tiny_shakespeare'" in place
    assert (Path(place.split()[0]).parent / "py.typed").exists()

    (here / "play.txt").write_text(play)
    assert gptjax("--version") == f"gptjax {__version__}\n"
    assert "tiny" in gptjax("presets")
    assert "complete" in gptjax("completion", "bash")
    short = "--config tiny --steps 10 --warmup_steps 1 --data.text play.txt --mesh.data 1"
    trained = gptjax("train", *short.split())
    assert "next: python sample.py --run tiny" in trained
    assert len(gptjax("sample", "--max-new-tokens", "20")) >= 20
    assert gptjax("plot") == "runs/tiny/loss.png\n"
    assert "WRONG" not in gptjax("verify")
    assert "GPT2LMHeadModel" in gptjax("export", "tiny", "folder")
    assert "runs/again" in gptjax("import", "folder", "--run", "again")
    assert sorted(path.name for path in here.iterdir()) == ["folder", "play.txt", "runs"]
