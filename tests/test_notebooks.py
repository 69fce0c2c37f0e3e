"""Tests of the notebooks: committed without outputs, and executable from top to bottom."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gptjax.text import corpora

REPO = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((REPO / "notebooks").glob("*.ipynb"))
NAMES = [path.stem for path in NOTEBOOKS]
MAX_LINES = 30  # per cell, so that it fits on a screen
TIMEOUT = 300  # seconds for one cell
PICTURES = {"lets_build_gpt": 12, "extend_gptjax": 1}
LECTURE = (  # steps of the lecture that the notebook prints
    "x, first row: [24, 43, 58, 5, 57, 1, 46, 43]\n",
    "\n[[0]] ",
    "raw triangle:\n[[1. 0. 0.]\n [1. 1. 0.]\n [1. 1. 1.]]\n",
    "average of 3: [[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [0.333, 0.333, 0.333]]\n",
    "wei (8, 8) @ x (4, 8, 2) -> (4, 8, 2)\n",
    "scores:\n[[  0. -inf -inf -inf -inf -inf -inf -inf]\n",
    " [0.125 0.125 0.125 0.125 0.125 0.125 0.125 0.125]]\n",
    "tok_emb  (4, 8, 32)\npos_emb  (8, 32)\nsum      (4, 8, 32)\nlogits: (4, 8, 65)\n",
)

each = pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)


@pytest.fixture(autouse=True)
def jupyter_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep Jupyter's files in a folder of the test, isolated from the user's settings."""
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")  # without it jupyter_core warns
    for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))


def read(path: Path) -> Any:
    nbformat = pytest.importorskip("nbformat", reason="needs nbformat (extra test)")
    return nbformat.read(path, as_version=nbformat.NO_CONVERT)


def execute(path: Path, cwd: Path, **environment: str) -> Any:
    """Run a notebook in fast mode, in a new kernel; returns it with its outputs.

    Raises:
        CellExecutionError: a cell failed.
    """
    for package in ("nbclient", "ipykernel"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs {package} (extra test)")
    from nbclient import NotebookClient

    env = os.environ | {"GPTJAX_FAST": "1"} | environment
    env.pop("MPLBACKEND", None)  # plots go into the notebook
    notebook = read(path)
    NotebookClient(notebook, timeout=TIMEOUT, kernel_name="python3").execute(cwd=str(cwd), env=env)
    return notebook


@pytest.fixture
def other_text(play: str, tmp_path: Path) -> Path:
    path = tmp_path / "play.txt"
    path.write_text(play * 10)
    return path


def outputs(notebook: Any) -> list[Any]:
    return [output for cell in notebook.cells for output in cell.get("outputs", ())]


def printed(notebook: Any, name: str = "stdout") -> str:
    """Output of all cells on one stream."""
    return "".join(output.text for output in outputs(notebook) if output.get("name") == name)


def pictures(notebook: Any) -> int:
    return sum("image/png" in output.get("data", {}) for output in outputs(notebook))


def test_both_notebooks_exist():
    assert NAMES == sorted(PICTURES)


@each
def test_format(path: Path):
    notebook = read(path)
    nbformat = sys.modules["nbformat"]
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    ids = [cell.id for cell in notebook.cells]
    assert len(set(ids)) == len(ids)
    assert notebook.metadata.kernelspec.name == "python3"
    assert notebook.metadata.language_info == {"name": "python"}, "a version would go stale"


@each
def test_outputs_are_stripped(path: Path):
    for cell in read(path).cells:
        assert not cell.metadata, cell.id
        if cell.cell_type == "code":
            assert not cell.outputs and cell.execution_count is None, cell.id


@each
def test_cells_are_short(path: Path):
    for cell in read(path).cells:
        assert cell.source.strip() and cell.source.count("\n") < MAX_LINES, cell.id


@each
@pytest.mark.parametrize("command", (["check"], ["format", "--check"]), ids=" ".join)
def test_ruff(path: Path, command: list[str], tmp_path: Path):
    places = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    ruff = shutil.which("ruff", path=places)
    if ruff is None:
        pytest.skip("needs ruff (extra dev)")
    # A file given explicitly is checked even if pyproject.toml excludes its folder.
    argv = [ruff, *command, "--cache-dir", str(tmp_path), str(path)]
    done = subprocess.run(argv, cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def check_run(path: Path, cwd: Path, **environment: str) -> str:
    """Run a notebook, check its plots, and return what it printed."""
    notebook = execute(path, cwd, **environment)
    assert printed(notebook, "stderr") == ""
    assert pictures(notebook) == PICTURES[path.stem]
    return printed(notebook)


@pytest.mark.shared
def test_lets_build_gpt(shakespeare: str):
    """As a reader runs it, in its own folder, asserting the lecture's exact figures."""
    local = corpora.local_copy("tiny_shakespeare")  # where the notebook looks first
    if not local.exists():
        local.parent.mkdir(parents=True, exist_ok=True)
        local.write_bytes(shakespeare.encode("ascii"))
    output = check_run(REPO / "notebooks" / "lets_build_gpt.ipynb", REPO / "notebooks")
    assert "characters: 1115394\n" in output
    assert "(another text" not in output
    for shown in LECTURE:
        assert shown in output, shown


@pytest.mark.slow
def test_lets_build_gpt_on_another_text(other_text: Path, tmp_path: Path):
    path = REPO / "notebooks" / "lets_build_gpt.ipynb"
    assert "(another text" in check_run(path, tmp_path, GPTJAX_TEXT=str(other_text))


def test_extend_gptjax(other_text: Path, tmp_path: Path):
    """In another folder, on another text; its runs are deleted with its temporary folder."""
    (tmp_path / "tmp").mkdir()
    environment = {"GPTJAX_TEXT": str(other_text), "TMPDIR": str(tmp_path / "tmp")}
    check_run(REPO / "notebooks" / "extend_gptjax.ipynb", tmp_path, **environment)
    assert not list((tmp_path / "tmp").rglob("checkpoints"))
