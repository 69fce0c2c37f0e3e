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

# Which modules of gptjax a module may import. Each stands on those above it only: a new import
# that needs an entry here is worth a second thought, one that needs another order is a cycle.
MAY_IMPORT: dict[str, set[str]] = {
    "__init__": set(),
    "text.__init__": set(),
    "weights.__init__": set(),
    "scale.__init__": set(),
    "store.__init__": set(),
    "errors": set(),
    "limits": {"errors"},
    "config": {"errors", "limits"},
    "config_json": {"config", "errors"},
    "text.subwords": {"errors"},
    "text.tokenizer": {"errors", "text.subwords"},
    "text.corpora": {"errors"},
    "text.texts": {"text.corpora", "errors", "text.subwords"},
    "cache": set(),
    "scale.hlo": set(),
    "scale.chips": {"errors"},
    "scale.processes": {"errors"},
    "stopping": set(),
    "profile": set(),
    "store.files": {"errors"},
    "store.records": {"errors", "store.files"},
    "store.folders": {"errors", "store.files"},
    "store.runs": {
        "config",
        "config_json",
        "errors",
        "store.files",
        "store.folders",
        "store.records",
        "text.tokenizer",
    },
    "presets": {"config"},
    "cli": {"config", "errors", "presets", "store.runs", "text.tokenizer"},
    "plot": {"cli", "errors", "store.runs"},
    "report": {"config", "store.records"},
    "text.splits": {"errors", "text.texts"},
    "text.tokenfile": {"errors", "store.files", "text.splits", "text.tokenizer"},
    "text.vocabulary": {"config", "errors", "store.files", "text.subwords", "text.tokenizer"},
    "weights.hf_config": {"config", "errors"},
    "weights.hf": {"config", "errors", "weights.hf_config", "text.tokenizer"},
    "weights.hf_tokenizer": {
        "errors",
        "store.files",
        "text.subwords",
        "text.tokenizer",
        "text.vocabulary",
    },
    "weights.gguf_file": {"errors", "weights.hf", "weights.hf_config", "text.subwords"},
    "weights.nanogpt": {"config", "errors", "weights.hf"},
    "text.data": {
        *(
            "config",
            "text.corpora",
            "errors",
            "report",
            "text.splits",
            "text.texts",
            "text.tokenfile",
            "text.tokenizer",
        ),
        "text.vocabulary",
    },
    "layers": {"config"},
    "attention": set(),
    "model": {"attention", "config", "errors", "layers"},
    "lecture": {"attention", "errors", "layers", "model"},
    "scale.kernels": {"attention", "config", "errors"},
    "build": {"attention", "config", "errors", "lecture", "model"},
    "optim": {"config"},
    "weights.finetune": {"config", "errors", "optim"},
    "scale.sharding": {"config", "errors"},
    "metrics": {"config"},
    "generate": {"model"},
    "step": {"config", "text.data", "errors", "weights.finetune", "optim"},
    "store.checkpoint": {"errors", "store.files", "scale.processes", "store.records"},
    "feed": {"config", "text.data", "step", "text.subwords"},
    "weights.pretrained": {
        *(
            "build",
            "store.checkpoint",
            "config",
            "errors",
            "store.files",
            "weights.gguf_file",
            "weights.hf",
            "weights.hf_config",
        ),
        *(
            "weights.hf_tokenizer",
            "weights.nanogpt",
            "store.runs",
            "scale.sharding",
            "text.subwords",
            "text.tokenizer",
            "text.vocabulary",
        ),
    },
    "programs": {
        *(
            "build",
            "store.checkpoint",
            "config",
            "text.data",
            "errors",
            "feed",
            "weights.finetune",
            "scale.kernels",
        ),
        *("optim", "scale.sharding", "step"),
    },
    "replay": {
        *(
            "store.checkpoint",
            "text.data",
            "errors",
            "feed",
            "store.files",
            "weights.pretrained",
            "scale.processes",
        ),
        *("programs", "report", "store.runs", "step"),
    },
    "summary": {
        "store.checkpoint",
        "text.data",
        "weights.finetune",
        "metrics",
        "programs",
        "store.records",
        "store.runs",
    },
    "train": {
        *(
            "store.checkpoint",
            "config",
            "text.data",
            "errors",
            "store.files",
            "weights.finetune",
            "generate",
            "metrics",
        ),
        *(
            "weights.pretrained",
            "scale.processes",
            "profile",
            "programs",
            "store.records",
            "replay",
            "report",
            "store.runs",
        ),
        *("step", "stopping", "summary"),
    },
    "sample": {
        *(
            "build",
            "store.checkpoint",
            "cli",
            "errors",
            "generate",
            "weights.pretrained",
            "store.runs",
            "scale.sharding",
        ),
        "text.tokenizer",
    },
    "adopt": {
        *(
            "store.checkpoint",
            "cli",
            "errors",
            "presets",
            "weights.pretrained",
            "programs",
            "store.runs",
            "text.texts",
        ),
        "text.tokenizer",
    },
    "export": {
        *(
            "build",
            "store.checkpoint",
            "cli",
            "errors",
            "store.files",
            "weights.hf",
            "weights.hf_config",
            "weights.hf_tokenizer",
        ),
        *("weights.pretrained", "store.runs"),
    },
    "meshes": {"cache", "cli", "config", "errors", "scale.hlo", "programs", "step"},
    "verify": {
        *(
            "cache",
            "store.checkpoint",
            "cli",
            "config",
            "text.data",
            "errors",
            "programs",
            "store.records",
            "store.runs",
        ),
    },
    "scale.estimate": {"scale.chips", "config", "errors", "scale.hlo", "metrics", "scale.sharding"},
    "scale.aot": {"scale.chips", "config", "errors", "scale.hlo", "programs"},
    "scale.plan": {
        *(
            "scale.aot",
            "scale.chips",
            "config",
            "text.data",
            "errors",
            "scale.estimate",
            "metrics",
            "programs",
        ),
        *("report", "scale.sharding"),
    },
    "notes": {"attention", "cli", "config", "errors", "model"},
    "ladder": {
        *(
            "build",
            "cli",
            "config",
            "text.data",
            "errors",
            "store.files",
            "lecture",
            "metrics",
            "presets",
        ),
        *("store.records", "report", "store.runs", "train"),
    },
}
WITHOUT_JAX = (
    "__init__",
    "errors",
    "limits",
    "config",
    "config_json",
    "text.subwords",
    "text.tokenizer",
    "text.corpora",
    "store.files",
    "store.folders",
    "store.records",
    "store.runs",
    "presets",
    "cli",
    "plot",
    "scale.hlo",
    "scale.chips",
)
JAX = {"jax", "jaxlib", "flax", "optax", "orbax"}  # importing any of these takes a second or more
MAX_LINES = 350
MAX_MODEL_LINES = 320


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
    inside = {d.removeprefix("gptjax.") for d in dotted if d.startswith("gptjax.")}
    return (inside | {d.rpartition(".")[0] for d in inside}) & SOURCES.keys()


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
    assert users == {"store.checkpoint"}


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
