"""The package's layers: imports go down or sideways, never in a circle, and no private name crosses modules."""

import ast
import graphlib
from pathlib import Path

import purified_opsd_trl


ROOT = Path(purified_opsd_trl.__file__).parent
LAYERS = (
    {
        "errors",
        "extras",
        "env",
        "arguments",
        "markers",
        "backbone",
        "images",
        "multimodal",
        "offload",
    },
    {"head", "purification", "targets"},
    {"estimate", "memory", "packing"},
    {"kernels"},
    {"config", "config_checks", "contexts", "scores", "rows", "dataset", "loading", "references"},
    {"collator", "loss", "parts", "deviations"},
    {"self_teacher", "rollout"},
    {"scoring"},
    {"monitoring"},
    {"run_identity", "shutdown"},
    {"reading", "vision", "checkpoints", "distilling", "self_check", "model_card", "plan"},
    {"accumulating"},
    {"trainer"},
    {"train", "evaluate", "bench"},
    {"diagnose", "check"},
    {"cli"},
)


def imports(file: Path) -> list[tuple[str, str]]:
    """`(module below the package, name)` of every import from the package, type-checking ones included."""
    found = []
    parts = file.relative_to(ROOT).parts
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = list(parts[: len(parts) - node.level])
            path = [*base, *(node.module or "").split(".")] if node.module else base
            found += [(path[0] if path else alias.name, alias.name) for alias in node.names]
    return found


def test_modules_import_downwards_only() -> None:
    rank = {name: i for i, layer in enumerate(LAYERS) for name in layer}
    modules = {path.stem for path in ROOT.iterdir()} - {"__pycache__", "__init__", "py"}
    assert modules <= rank.keys(), f"without a layer: {modules - rank.keys()}"
    graph: dict[str, set[str]] = {}
    for file in ROOT.rglob("*.py"):
        own = file.relative_to(ROOT).parts[0].removesuffix(".py")
        if own == "__init__":
            continue
        for module, name in imports(file):
            assert rank[module] <= rank[own], f"{file.relative_to(ROOT)} imports {module} from a higher layer"
            assert not name.startswith("_"), f"{file.relative_to(ROOT)} imports the private name {name}"
            graph.setdefault(own, set()).update({module} - {own})
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError for a circle
