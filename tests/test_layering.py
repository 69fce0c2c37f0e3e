"""Tests of the package's shape: imports go one way, and no file grows beyond one sitting."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "gptjax"
SOURCES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path.read_text(encoding="utf-8")
    for path in PACKAGE.rglob("*.py")
}
TREES = {name: ast.parse(text) for name, text in SOURCES.items()}

# From the bottom to the top. A module imports modules of its own layer and of those before it; a
# folder stands for its modules that have no layer of their own.
LAYERS = {
    "errors": "every module reports bad input in one form",
    "config presets": "a run is described by plain data",
    "text runs": "texts and a run's files need no jax, so that a command answers at once",
    "track": "trackers and warnings know a run by its files alone",
    "attention layers model lecture.models interop.gemma": "a network knows no training or devices",
    "parallel": "meshes, kernels and processes serve training and sampling alike",
    "plan.chips plan.hlo plan.estimate plan.room": "what a run takes, known before it is made",
    "batches loss optim step sampling": "pure functions, to be used without a run",
    "generation": "text from a model: streams in a batch",
    "assembly": "the one place where pure functions meet devices",
    "runs.arrays runs.checkpoint runs.parts runs.bad_steps runs.loaded": "a train state on disk",
    "interop": "weights of other tools, which a run can start from",
    "console loop training": "the training run",
    "tools plan lecture score serve pictures": "commands' work: nothing of the core needs them",
    "cli": "command lines; no library function takes one",
    "__init__ __main__": "the public API names everything",
}
# What `--help` needs is imported without these, each of which takes a second or more.
JAX = {"jax", "jaxlib", "flax", "optax", "orbax"}
WITHOUT_JAX = "errors config presets text runs track cli __init__ __main__".split()
MAX_LINES = 350
MAX_ROOT_MODULES = 15


def layer_of(name: str) -> int:
    """The layer of a module, or of the nearest folder that has one."""
    places = {entry: i for i, entries in enumerate(LAYERS) for entry in entries.split()}
    while name not in places:
        name = name.rpartition(".")[0]
        assert name, "a module without a layer; give it one"
    return places[name]


def imported(node: ast.AST) -> set[str]:
    """Dotted names that an import statement brings in; nothing for other nodes."""
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names}
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0, "relative imports hide what is imported"
        module = node.module or ""
        return {module} | {f"{module}.{alias.name}" for alias in node.names}
    return set()


def for_types_only(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def package_imports(name: str) -> set[str]:
    """The modules of gptjax that a module imports, in any function too."""
    dotted: set[str] = set()
    nodes: list[ast.AST] = [TREES[name]]
    while nodes:
        node = nodes.pop()
        dotted |= imported(node)
        nodes += [child for child in ast.iter_child_nodes(node) if not for_types_only(child)]
    inside = {d.removeprefix("gptjax.") for d in dotted if d.startswith("gptjax.")}
    return (inside | {d.rpartition(".")[0] for d in inside}) & SOURCES.keys()


def at_import(node: ast.AST) -> set[str]:
    """Top packages imported as soon as a module is: those outside of any function."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
        return set()
    if for_types_only(node):
        return set()
    found = {dotted.split(".")[0] for dotted in imported(node)}
    return found.union(*(at_import(child) for child in ast.iter_child_nodes(node)))


@pytest.mark.parametrize("name", SOURCES)
def test_imports_go_down(name: str):
    above = {other for other in package_imports(name) if layer_of(other) > layer_of(name)}
    assert not above, f"{name} imports modules of a higher layer"


def test_no_cycles():
    graph = {name: package_imports(name) for name in SOURCES if not name.endswith("__init__")}
    TopologicalSorter(graph).prepare()  # raises, naming a cycle


@pytest.mark.parametrize("name", SOURCES)
def test_help_needs_no_jax(name: str):
    # The cache's setting is jax's; commands import it once their arguments are understood.
    layers = {layer_of(entry) for entry in WITHOUT_JAX}
    if layer_of(name) in layers and name != "cli.compilation_cache":
        assert not at_import(TREES[name]) & JAX


def test_only_checkpoint_knows_orbax():
    everything = {name: set().union(*map(imported, ast.walk(t))) for name, t in TREES.items()}
    users = {name for name, names in everything.items() if any("orbax" in n for n in names)}
    assert users == {"runs.checkpoint"}


def test_the_root_folder_is_small():
    root = [name for name in SOURCES if "." not in name and not name.startswith("__")]
    assert len(root) <= MAX_ROOT_MODULES, sorted(root)


@pytest.mark.parametrize("name", SOURCES)
def test_no_module_is_too_long(name: str):
    assert len(SOURCES[name].splitlines()) <= MAX_LINES


@pytest.mark.parametrize("name", SOURCES)
def test_nothing_loads_code_from_data(name: str):
    """A run's folder may come from a stranger, so reading one must never execute anything."""
    everything = set().union(*(imported(node) for node in ast.walk(TREES[name])))
    assert not {d.split(".")[0] for d in everything} & {"pickle", "marshal", "shelve", "dill"}
    if name != "cli.recipe":  # which executes the file that the user names
        assert not {d.split(".")[0] for d in everything} & {"importlib.util", "runpy", "imp"}
    called = {
        node.func.id
        for node in ast.walk(TREES[name])
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    assert not called & {"eval", "exec", "compile", "__import__"}
    assert "allow_pickle" not in SOURCES[name]
