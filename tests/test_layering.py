"""Tests of the package's shape: imports go one way, and no file grows beyond one sitting."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "gptjax"
SOURCES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path.read_text(encoding="utf-8")
    for path in PACKAGE.rglob("*.py")
}
TREES = {name: ast.parse(text) for name, text in SOURCES.items()}

# From the bottom to the top: a module imports only modules of lower layers, or of its own. A
# layer is a list of modules and folders ("text" is gptjax/text/*), and the reason is why it is
# where it is.
LAYERS: tuple[tuple[str, str], ...] = (
    ("errors", "everything reports errors in one form"),
    ("limits config presets", "a run is described by plain data: no jax, no files"),
)
JAX = {"jax", "jaxlib", "flax", "optax", "orbax"}  # importing any of these takes a second or more
MAX_LINES = 350


def imported(node: ast.AST) -> set[str]:
    """Dotted names that an import statement brings in; nothing for other nodes."""
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names}
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0, "relative imports hide what is imported"
        module = node.module or ""
        return {module} | {f"{module}.{alias.name}" for alias in node.names}
    return set()


@pytest.mark.parametrize("name", SOURCES)
def test_no_module_is_too_long(name):
    assert len(SOURCES[name].splitlines()) <= MAX_LINES


@pytest.mark.parametrize("name", SOURCES)
def test_nothing_loads_code_from_data(name):
    """A run's folder may come from a stranger, so reading one must never execute anything."""
    everything = set().union(*(imported(node) for node in ast.walk(TREES[name])))
    assert not {d.split(".")[0] for d in everything} & {"pickle", "marshal", "shelve", "dill"}
    called = {
        node.func.id
        for node in ast.walk(TREES[name])
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    assert not called & {"eval", "exec", "compile", "__import__"}
    assert "allow_pickle" not in SOURCES[name]
