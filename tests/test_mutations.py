"""The list of planted faults is kept alive: every entry still applies to the source and names tests that exist."""

import ast
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("mutate", ROOT / "scripts" / "mutate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["mutate"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


mutate = load_script()
MUTATIONS = mutate.read_mutations()


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_entry_can_be_planted(mutation) -> None:
    assert mutation.defect() is None
    assert mutation.why
    # Compared as syntax trees, so that a changed comment or docstring does not pass for a fault.
    before, after = (strip_docstrings(ast.parse(text)) for text in (mutation.source(), mutation.mutated()))
    assert ast.dump(before) != ast.dump(after)


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_named_tests_exist(mutation) -> None:
    paths = [test for test in mutation.tests if not test.startswith("-k ")]
    assert paths, "name at least one file, or every test would run"
    for test in paths:
        path, *names = test.split("::")
        assert (ROOT / path).is_file(), path
        functions = {node.name for node in ast.walk(ast.parse((ROOT / path).read_text())) if hasattr(node, "name")}
        assert {name.split("[")[0] for name in names} <= functions, test


def test_the_list_is_long_and_its_names_are_unique() -> None:
    names = [mutation.name for mutation in MUTATIONS]
    assert len(names) >= 30
    assert len(names) == len(set(names))
    planted = [(mutation.file, mutation.mutated()) for mutation in MUTATIONS]
    assert len(planted) == len(set(planted)), "two entries plant the same fault"


def strip_docstrings(tree: ast.AST) -> ast.AST:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
            node.body = node.body[1:]
    return tree


@pytest.fixture
def tiny_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path / "tiny"
    for folder in ("lit_posttrain", "tests", ".venv"):
        (root / folder).mkdir(parents=True)
    (root / "lit_posttrain" / "__init__.py").write_text("")
    (root / "lit_posttrain" / "sums.py").write_text("def add(a, b):\n    return a + b\n\n\ndef zero():\n    return 0\n")
    (root / "tests" / "test_sums.py").write_text(
        "from lit_posttrain.sums import add, zero\n\n\ndef test_add():\n    assert add(2, 3) == 5\n\n\n"
        "def test_zero():\n    assert zero() < 1\n"
    )
    monkeypatch.setattr(mutate, "ROOT", root)
    monkeypatch.setattr(mutate, "PRELOADED", ())
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # the tiny repository needs none, and they load slowly
    return root


def planted(find: str, replace: str):
    return mutate.Mutation("m", "lit_posttrain/sums.py", find, replace, ("tests/test_sums.py",), "why")


def test_outcomes_are_told_apart(tiny_repository: Path) -> None:
    """A fault that a test notices, one that none notices, one that cannot even be imported: three outcomes."""
    killed, survived, broken = mutate.run(
        [planted("a + b", "a - b"), planted("return 0", "return -1"), planted("def add", "def plus")], jobs=1
    )
    assert (killed.status, killed.detail) == ("killed", "test_add")
    assert survived.status == "SURVIVED"
    assert broken.status == "BROKEN"
    assert killed.mutation.place() == "lit_posttrain/sums.py:2"
    assert "a + b" in (tiny_repository / "lit_posttrain" / "sums.py").read_text()


def test_nothing_counts_if_the_tests_fail_anyway(tiny_repository: Path) -> None:
    (tiny_repository / "tests" / "test_sums.py").write_text("def test_always_fails():\n    assert False\n")
    assert mutate.run([planted("a + b", "a - b")], jobs=1) == []


def test_stale_entry_is_named(tiny_repository: Path) -> None:
    assert "0 times" in planted("a * b", "a - b").defect()
    assert "2 times" in planted("return", "yield").defect()
