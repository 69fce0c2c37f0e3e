"""Tests of the package's shape: imports go one way, and no file grows beyond one sitting."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "gptjax"
SOURCES = {path.stem: path.read_text(encoding="utf-8") for path in PACKAGE.glob("*.py")}
TREES = {name: ast.parse(text) for name, text in SOURCES.items()}

# Which modules of gptjax a module may import. Each stands on those above it only: a new import
# that needs an entry here is worth a second thought, one that needs another order is a cycle.
MAY_IMPORT: dict[str, set[str]] = {
    "__init__": set(),
    "errors": set(),
    "limits": {"errors"},
    "config": {"errors", "limits"},
    "config_json": {"config", "errors"},
    "subwords": {"errors"},
    "tokenizer": {"errors", "subwords"},
    "corpora": {"errors"},
    "texts": {"corpora", "errors", "subwords"},
    "cache": set(),
    "hlo": set(),
    "chips": {"errors"},
    "processes": {"errors"},
    "stopping": set(),
    "profile": set(),
    "files": {"errors"},
    "records": {"errors", "files"},
    "folders": {"errors", "files"},
    "runs": {"config", "config_json", "errors", "files", "folders", "records", "tokenizer"},
    "presets": {"config"},
    "cli": {"config", "errors", "presets", "runs", "tokenizer"},
    "plot": {"cli", "errors", "runs"},
    "report": {"config", "records"},
    "splits": {"errors", "texts"},
    "tokenfile": {"errors", "files", "splits", "tokenizer"},
    "vocabulary": {"config", "errors", "files", "subwords", "tokenizer"},
    "hf_config": {"config", "errors"},
    "hf": {"config", "errors", "hf_config", "tokenizer"},
    "hf_tokenizer": {"errors", "files", "subwords", "tokenizer", "vocabulary"},
    "gguf_file": {"errors", "hf", "hf_config", "subwords"},
    "nanogpt": {"config", "errors", "hf"},
    "data": {
        *("config", "corpora", "errors", "report", "splits", "texts", "tokenfile", "tokenizer"),
        "vocabulary",
    },
    "layers": {"config"},
    "model": {"config", "errors", "layers"},
    "lecture": {"errors", "layers", "model"},
    "kernels": {"config", "errors", "model"},
    "build": {"config", "errors", "lecture", "model"},
    "optim": {"config"},
    "finetune": {"config", "errors", "optim"},
    "sharding": {"config", "errors"},
    "metrics": {"config"},
    "generate": set(),
    "step": {"config", "data", "errors", "finetune", "optim"},
    "checkpoint": {"errors", "files", "processes", "records"},
    "feed": {"config", "data", "step", "subwords"},
    "pretrained": {
        *("build", "checkpoint", "config", "errors", "files", "gguf_file", "hf", "hf_config"),
        *("hf_tokenizer", "nanogpt", "runs", "sharding", "subwords", "tokenizer", "vocabulary"),
    },
    "programs": {
        *("build", "checkpoint", "config", "data", "errors", "feed", "finetune", "kernels"),
        *("optim", "sharding", "step"),
    },
    "replay": {
        *("checkpoint", "data", "errors", "feed", "files", "pretrained", "processes"),
        *("programs", "report", "runs", "step"),
    },
    "summary": {"checkpoint", "data", "finetune", "metrics", "programs", "records", "runs"},
    "train": {
        *("checkpoint", "config", "data", "errors", "files", "finetune", "generate", "metrics"),
        *("pretrained", "processes", "profile", "programs", "records", "replay", "report", "runs"),
        *("step", "stopping", "summary"),
    },
    "sample": {
        *("build", "checkpoint", "cli", "errors", "generate", "pretrained", "runs", "sharding"),
        "tokenizer",
    },
    "adopt": {
        *("checkpoint", "cli", "errors", "presets", "pretrained", "programs", "runs", "texts"),
        "tokenizer",
    },
    "export": {
        *("build", "checkpoint", "cli", "errors", "files", "hf", "hf_config", "hf_tokenizer"),
        *("pretrained", "runs"),
    },
    "meshes": {"cache", "cli", "config", "errors", "hlo", "programs", "step"},
    "verify": {
        *("cache", "checkpoint", "cli", "config", "data", "errors", "programs", "records", "runs"),
    },
    "estimate": {"chips", "config", "errors", "hlo", "metrics", "sharding"},
    "aot": {"chips", "config", "errors", "hlo", "programs"},
    "plan": {
        *("aot", "chips", "config", "data", "errors", "estimate", "metrics", "programs"),
        *("report", "sharding"),
    },
    "notes": {"cli", "config", "errors", "model"},
    "ladder": {
        *("build", "cli", "config", "data", "errors", "files", "lecture", "metrics", "presets"),
        *("records", "report", "runs", "train"),
    },
}
WITHOUT_JAX = (
    *(
        "__init__",
        "errors",
        "limits",
        "config",
        "config_json",
        "subwords",
        "tokenizer",
        "corpora",
        "files",
        "folders",
        "records",
        "runs",
        "presets",
        "cli",
        "plot",
        "hlo",
        "chips",
    ),
)
JAX = {"jax", "jaxlib", "flax", "optax", "orbax"}  # importing any of these takes a second or more
MAX_LINES = 350
MAX_MODEL_LINES = 319


def imported(node: ast.AST) -> set[str]:
    """Dotted names that an import statement brings in; nothing for other nodes."""
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names}
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0, "relative imports hide what is imported"
        module = node.module or ""
        return {module} | {f"{module}.{alias.name}" for alias in node.names}
    return set()


def package_imports(name: str) -> set[str]:
    """The modules of gptjax that a module imports, anywhere in its text."""
    dotted = set().union(*(imported(node) for node in ast.walk(TREES[name])))
    inside = {d.removeprefix("gptjax.").split(".")[0] for d in dotted if d.startswith("gptjax.")}
    return inside & SOURCES.keys()


def at_import(node: ast.AST) -> set[str]:
    """Top packages imported as soon as a module is: those outside of any function."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
        return set()
    found = {dotted.split(".")[0] for dotted in imported(node)}
    return found.union(*(at_import(child) for child in ast.iter_child_nodes(node)))


def test_the_table_lists_every_module():
    assert set(MAY_IMPORT) == set(SOURCES)


@pytest.mark.parametrize("name", SOURCES)
def test_imports_are_those_of_the_table(name):
    assert package_imports(name) == MAY_IMPORT[name]


def test_no_cycles():
    above: set[str] = set()
    for name, needs in MAY_IMPORT.items():
        assert needs <= above, f"{name} imports what stands below it: {needs - above}"
        above.add(name)


@pytest.mark.parametrize("name", WITHOUT_JAX)
def test_what_help_needs_is_imported_without_jax(name):
    assert not at_import(TREES[name]) & JAX
    assert package_imports(name) <= set(WITHOUT_JAX)


def test_only_checkpoint_knows_orbax():
    everything = {name: set().union(*map(imported, ast.walk(t))) for name, t in TREES.items()}
    users = {name for name, names in everything.items() if any("orbax" in n for n in names)}
    assert users == {"checkpoint"}


@pytest.mark.parametrize("name", SOURCES)
def test_no_module_is_too_long(name):
    limit = MAX_MODEL_LINES if name == "model" else MAX_LINES
    assert len(SOURCES[name].splitlines()) <= limit


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
