"""The documents are true: their commands run, their lists match the code."""

import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from gptjax import cli, training
from gptjax.config import DataConfig
from gptjax.console import Report
from gptjax.errors import UserError
from gptjax.presets import PRESETS

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def commands(page: str = README) -> list[str]:
    """The indented command lines of a page, without their comments."""
    return [re.sub(r"\s+#.*", "", m) for m in re.findall(r"^    (\S.*)$", page, re.MULTILINE)]


def test_the_two_commands_of_a_newcomer_stand_in_the_readme():
    assert "pip install -e . && python train.py --config small" in commands()
    assert "pip install -e '.[test]' && pytest" in commands()


@pytest.mark.parametrize(("page", "at_least"), [("README.md", 8), ("docs/weights.md", 7)])
def test_every_command_of_a_page_is_understood(page, at_least, monkeypatch, tmp_path):
    text = (ROOT / page).read_text()
    monkeypatch.chdir(tmp_path)
    seen = 0
    for command in commands(text):
        words = shlex.split(command)
        if words[:2] == ["python", "train.py"] and "--help" not in words:
            if "--resume" in words:  # of a run that is not here
                with pytest.raises(UserError, match="is not a run's folder"):
                    cli.parse_train(words[2:])
            else:
                cli.parse_train(words[2:])
            seen += 1
        if words[:2] == ["python", "sample.py"]:
            cli.parse_sample(words[2:])
            seen += 1
        if words[0] == "gptjax":
            seen += 1
        if words[:2] == ["python", "-m"]:
            assert (ROOT / (words[2].replace(".", "/") + ".py")).is_file()
            seen += 1
    assert seen >= at_least


def test_the_extension_of_the_readme_trains(play, monkeypatch, tmp_path):
    """As it stands there, on another text and quietly."""
    [code] = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    (tmp_path / "play.txt").write_text(play)
    monkeypatch.chdir(tmp_path)
    text = DataConfig(text=str(tmp_path / "play.txt"))
    monkeypatch.setitem(PRESETS, "tiny", replace(PRESETS["tiny"], steps=6, data=text))
    real = training.train
    monkeypatch.setattr(
        training, "train", lambda *args, **kwargs: real(*args, report=Report(quiet=True), **kwargs)
    )
    exec(compile(code, "README.md", "exec"), {})
    assert (tmp_path / "runs" / "looped" / "checkpoints" / "6").is_dir()
    # The class line to the last method: what one writes for a model of one's own.
    assert len([line for line in code.split("config =")[0].split("class ")[1].splitlines()]) <= 12


def test_the_readme_names_every_preset():
    section = README[README.index("Presets:") : README.index("Ctrl-C")]
    for name in PRESETS:
        if not name.startswith("lecture/"):
            assert f"`{name}`" in section


def test_links_lead_somewhere():
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), ROOT / "data" / "README.md"]
    for page in pages:
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_architecture_page_has_every_room():
    page = (ROOT / "docs" / "architecture.md").read_text()
    for path in (ROOT / "gptjax").rglob("*.py"):
        if path.name != "__init__.py":
            assert f"`{path.name}`" in page


def test_every_dependency_has_its_reason():
    project = (ROOT / "pyproject.toml").read_text()
    [listed] = re.findall(r"^dependencies = \[(.*?)^\]", project, re.DOTALL | re.MULTILINE)
    page = (ROOT / "docs" / "architecture.md").read_text()
    reasons = page[page.index("## Dependencies") :]
    for name in re.findall(r'"([a-z-]+)[>\[]', listed):
        assert name in reasons
