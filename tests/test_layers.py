"""The architecture as a test: which layer may import which, and how long a file and a function may be."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "lit_posttrain"
# A module imports its own line and the lines above it, never one below.
LAYERS = [
    ["functional", "types", "randomness", "allocator"],
    ["batching"],
    ["layout"],
    ["kept_prompts"],
    ["cascade"],
    ["attention"],
    ["precision"],
    ["sharding", "schedules"],
    ["stash"],
    ["blocks"],
    ["dropout"],
    ["model_files"],
    ["scoring"],
    ["policy"],
    ["gathering"],
    ["beside"],
    ["durable", "position", "checkpoint"],
    ["reference"],
    ["reference_cache"],
    ["export_scores"],
    ["scalar_heads"],
    ["critic"],
    ["objective"],
    ["ppo_objective"],
    ["data"],
    ["sandbox"],
    ["rewards"],
    ["judges"],
    ["gates"],
    ["rollout"],
    ["metrics"],
    ["progress"],
    ["algorithms"],
    ["callbacks"],
    ["report"],
    ["pipeline"],
    ["export"],
    ["cli"],
    ["__main__"],
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
FUNCTIONAL_MAY_IMPORT = {"__future__", "collections", "dataclasses", "jaxtyping", "math", "torch", "typing"}
# Forbidden although the list above would allow them: (importing layer, imported layer, why).
FORBIDDEN = [
    ("data", "policy", "data must be readable, and its masks testable, without a network"),
    ("data", "scalar_heads", "data must be readable, and its masks testable, without a network"),
]
MAX_FILE_LINES = 350
MAX_FUNCTION_LINES = 60

FILES = sorted(PACKAGE.rglob("*.py"))
TREES = {path: ast.parse(path.read_text()) for path in FILES}


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path, tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Yield (absolute dotted name, line) of every import, those inside functions included."""
    package = module_name(path).split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            # `from lit_posttrain import policy` names a module in the alias; elsewhere it may be a class, harmless
            yield from ((f"{source}.{alias.name}", node.lineno) for alias in node.names)


def layer(name: str) -> str | None:
    """The layer of a dotted name of this package; None for the package itself, cli_* files count as cli."""
    parts = name.split(".")
    if len(parts) < 2 or parts[1].startswith("__version"):
        return None
    return "cli" if parts[1].startswith("cli") else parts[1]


def edges() -> Iterator[tuple[str, str, str, str]]:
    """Yield (place, importing module, its layer, imported name) for imports inside the package."""
    for path, tree in TREES.items():
        here = module_name(path)
        if (level := layer(here)) is None:
            continue
        for name, line in imports(path, tree):
            if name.split(".")[0] == "lit_posttrain" and layer(name) is not None:
                yield f"{path.relative_to(PACKAGE.parent)}:{line}", here, level, name


def test_every_module_has_a_layer() -> None:
    unknown = sorted({level for path in FILES if (level := layer(module_name(path))) not in LEVEL and level})
    assert not unknown, f"add {unknown} to LAYERS, at the place their imports allow"


def test_imports_point_up() -> None:
    wrong = []
    for place, _, source, name in edges():
        target = layer(name) or ""
        if LEVEL.get(target, 0) > LEVEL.get(source, 0):
            wrong.append(f"{place}: {source} imports {name}, a layer below it")
        wrong += [f"{place} imports {name}: {why}" for a, b, why in FORBIDDEN if (source, target) == (a, b)]
    assert not wrong, "\n" + "\n".join(wrong)


def test_algorithms_do_not_import_each_other() -> None:
    shared = {"base", "evaluation", "generations", "measures", "offline", "online", "preference", "reporting"}
    shared |= {"averaging", "pretraining", "samples", "sampling", "structure", "watching"}
    wrong = [
        f"{place} imports {name}"
        for place, here, source, name in edges()
        if source == "algorithms" and layer(name) == "algorithms" and here != "lit_posttrain.algorithms"
        # A name that is no file is a class that the package re-exports: which hides where it comes from.
        if name.split(".")[2:3] and name.split(".")[2] not in shared | {here.split(".")[2]}
    ]
    assert not wrong, "move what two algorithms share down into what all may share:\n" + "\n".join(wrong)


def test_sandbox_stands_alone() -> None:
    wrong = [f"{place} imports {name}" for place, _, source, name in edges() if source == "sandbox" != layer(name)]
    assert not wrong, wrong


def test_functional_is_pure_torch() -> None:
    wrong = []
    for path, tree in TREES.items():
        if path.parent.name != "functional":
            continue
        for name, line in imports(path, tree):
            if name.split(".")[0] not in FUNCTIONAL_MAY_IMPORT and not name.startswith("lit_posttrain.functional"):
                wrong.append(f"{path.name}:{line} imports {name}")
            if name.startswith("torch.distributed"):
                wrong.append(f"{path.name}:{line} imports {name}: no collectives in functional")
    assert not wrong, wrong


@pytest.mark.parametrize("stranger", ["trl", "tests", "pytest", "hypothesis", "beartype"])
def test_package_never_imports(stranger: str) -> None:
    wrong = [
        f"{path.relative_to(PACKAGE.parent)}:{line}"
        for path, tree in TREES.items()
        for name, line in imports(path, tree)
        if name.split(".")[0] == stranger
    ]
    assert not wrong, wrong


def test_files_are_short() -> None:
    lengths = {str(path.relative_to(PACKAGE.parent)): len(path.read_text().splitlines()) for path in FILES}
    long = {name: length for name, length in lengths.items() if length > MAX_FILE_LINES}
    assert not long, f"files over {MAX_FILE_LINES} lines: {long}"


def code_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Length without the docstring: shapes, units and sources are asked for, and must not be traded for brevity."""
    first = function.body[0]
    docstring = (first.end_lineno or 0) - first.lineno + 1 if ast.get_docstring(function) else 0
    return (function.end_lineno or 0) - function.lineno + 1 - docstring


def test_functions_are_short() -> None:
    long = {
        f"{path.relative_to(PACKAGE.parent)}:{node.lineno} {node.name}": length
        for path, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (length := code_lines(node)) > MAX_FUNCTION_LINES
    }
    assert not long, f"functions over {MAX_FUNCTION_LINES} lines: {long}"


def test_the_scan_sees_every_import_form(tmp_path: Path) -> None:
    source = (
        "import a.b\nfrom lit_posttrain import policy\ndef f():\n    from .base import X\n    from .. import data\n"
    )
    path = PACKAGE / "rewards" / "example.py"
    found = {name for name, _ in imports(path, ast.parse(source))}
    assert found == {"a.b", "lit_posttrain.policy", "lit_posttrain.rewards.base.X", "lit_posttrain.data"}
