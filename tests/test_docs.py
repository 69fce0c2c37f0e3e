"""The documents are true: their commands run, their lists match the code."""

import inspect
import os
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest

import gptjax
from gptjax.cli.main import COMMANDS
from gptjax.cli.sample import parse_sample
from gptjax.cli.train import parse_train
from gptjax.config import DataConfig
from gptjax.errors import UserError
from gptjax.presets import PRESETS

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
API = ROOT / "docs" / "api.md"


def commands(page: str = README) -> list[str]:
    """The indented command lines of a page, without their comments."""
    return [re.sub(r"\s+#.*", "", m) for m in re.findall(r"^    (\S.*)$", page, re.MULTILINE)]


def test_a_newcomers_two_commands():
    assert "pip install -e . && python train.py --config small" in commands()
    assert "pip install -e '.[test]' && pytest" in commands()


PAGES = {"README.md": 12, "docs/weights.md": 7, "docs/sample.md": 6, "docs/serve.md": 1}


@pytest.mark.parametrize(("page", "at_least"), PAGES.items())
def test_every_command_is_understood(page: str, at_least: int, monkeypatch):
    text = (ROOT / page).read_text()
    monkeypatch.chdir(ROOT)  # config files are named from here
    seen = 0
    for command in commands(text):
        words = shlex.split(command.rpartition(" | ")[2])
        if words[:2] == ["python", "train.py"] and "--help" not in words:
            if "--resume" in words:  # of a run that does not exist
                with pytest.raises(UserError, match="is not a run's folder"):
                    parse_train(words[2:])
            else:
                parse_train(words[2:])
            seen += 1
        if words[:2] == ["python", "sample.py"]:
            parse_sample(words[2:])
            seen += 1
        if words[0] == "gptjax":
            assert words[1] in COMMANDS or words[1].startswith("-")
            seen += 1
    assert seen >= at_least


def test_the_code_of_the_readme_runs(play, monkeypatch, tmp_path):
    """In order of dependence: train the tiny preset as `small`, use it, then the own attention."""
    use, own = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    (tmp_path / "play.txt").write_text(play.replace("\n", " the king KING\n", 3))
    monkeypatch.chdir(tmp_path)
    text = DataConfig(text=str(tmp_path / "play.txt"))
    tiny = replace(PRESETS["tiny"], steps=6, save_every=6, eval_every=6, data=text)
    monkeypatch.setitem(PRESETS, "tiny", tiny)
    gptjax.train(tiny, "runs/small")
    found: dict = {}
    exec(compile(use, "README.md", "exec"), found)
    assert found["logits"].shape == (8, found["run"].tokenizer.vocab_size)
    assert len(found["text"]) == 200 and found["loss"] > 0
    exec(compile(own, "README.md", "exec"), found)
    assert (tmp_path / "runs" / "alibi" / "checkpoints" / "6").is_dir()
    # The class line to the last method: what an attention of one's own takes.
    lines = own.split("config =")[0].split("class ")[1].strip().splitlines()
    assert len(lines) <= 6


def test_the_readme_names_every_preset():
    section = README[README.index("Presets:") : README.index("Ctrl-C")]
    for name in PRESETS:
        if not name.startswith("lecture/"):
            assert f"`{name}`" in section


def test_the_number_of_tests_in_the_readme():
    """Rounded down to hundreds of test functions, so that a new one changes nothing."""
    count = sum(
        len(re.findall(r"^def test_", path.read_text(), re.MULTILINE))
        for path in (ROOT / "tests").glob("test_*.py")
    )
    assert f"| tests | over {count // 100 * 100} |" in README


def test_links_lead_somewhere():
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), ROOT / "data" / "README.md"]
    for page in pages:
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_architecture_page_has_every_module_and_folder():
    page = (ROOT / "docs" / "architecture.md").read_text()
    for path in (ROOT / "gptjax").iterdir():
        if path.suffix == ".py" and not path.name.startswith("__"):
            assert f"`{path.name}`" in page
        if path.is_dir() and (path / "__init__.py").exists():
            assert f"`{path.name}/`" in page


def test_every_dependency_has_its_reason():
    project = (ROOT / "pyproject.toml").read_text()
    [listed] = re.findall(r"^dependencies = \[(.*?)^\]", project, re.DOTALL | re.MULTILINE)
    page = (ROOT / "docs" / "architecture.md").read_text()
    reasons = page[page.index("## Dependencies") :]
    for name in re.findall(r'"([a-z-]+)[>\[]', listed):
        assert name in reasons


def api_page() -> str:
    """The public names with their signatures and the first sentences of their docstrings."""
    lines = [
        "# Public API",
        "",
        "`import gptjax`; names are loaded when they are first used. This page is made from the "
        "docstrings, where each name has its arguments, shapes and errors:",
        "`GPTJAX_WRITE_DOCS=1 pytest tests/test_docs.py -k api`.",
    ]
    for module, names in gptjax._PUBLIC.items():
        lines += ["", f"## `{module}`", "", "| name | |", "| --- | --- |"]
        for name in names:
            thing = getattr(gptjax, name)
            text = inspect.getdoc(thing) or ""
            sentence = " ".join(text.split("\n\n")[0].split())
            if name == "PRESETS":
                sentence = "The configs with names: a dict from name to `Config`."
            lines.append(f"| `{name}` | {sentence.replace('|', '/')} |")
    return "\n".join(lines) + "\n"


def test_the_api_page_is_that_of_the_docstrings():
    if "GPTJAX_WRITE_DOCS" in os.environ:
        API.write_text(api_page())
    assert API.read_text() == api_page()
