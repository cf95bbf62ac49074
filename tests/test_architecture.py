"""What ARCHITECTURE.md says of the tree: imports point one way, and importing is lean."""

import ast
import doctest
import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import batchnorm

SOURCE = Path(batchnorm.__file__).parent
# Who may import whom; "*" is everything. What is not listed uses nothing of ours.
MAY_USE = {
    "nn": {"functional", "validation", "ops", "kernels"},
    "functional": {"validation", "ops", "kernels"},
    "validation": {"ops"},
    "ops": {"kernels"},
    "kernels": set(),
    "transforms": {"nn", "functional", "ops", "kernels"},
    "probes": {"transforms", "nn", "functional", "ops", "kernels", "records"},
    "diagnosis": {"transforms", "probes", "nn", "functional", "ops", "kernels", "records"},
    # A study declares its claims and its figures; the report that shows them knows of no study.
    "studies": {
        *("transforms", "probes", "nn", "functional", "ops", "kernels"),
        *("records", "verdicts", "report"),
    },
    "report": {"records", "verdicts"},
    "verdicts": {"records"},
    "lab": {"records"},
    "records": set(),
    "export": {"records"},
    "cli": {"*"},
    "__main__": {"cli"},
}
# Small modules that stand alone and that any part may use.
LEAVES = {"extras", "weights"}


def modules():
    for path in sorted(SOURCE.rglob("*.py")):
        names = path.relative_to(SOURCE).with_suffix("").parts
        yield path, names[:-1] if names[-1] == "__init__" else names


def parts_imported(tree):
    """Yield the first name after ``batchnorm`` of every import, and its line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import, line {node.lineno}"
            targets = (
                [f"batchnorm.{alias.name}" for alias in node.names]
                if node.module == "batchnorm"
                else [node.module]
            )
        else:
            continue
        for target in targets:
            names = target.split(".")
            if names[0] == "batchnorm" and len(names) > 1:
                yield names[1], node.lineno


def test_imports_point_one_way():
    wrong = []
    for path, names in modules():
        if not names:
            continue  # the package itself names what it offers
        allowed = MAY_USE.get(names[0], set())
        for used, line in parts_imported(ast.parse(path.read_text())):
            if used not in {names[0], *allowed, *LEAVES, "__version__"} and "*" not in allowed:
                wrong.append(f"{path.relative_to(SOURCE)}:{line} imports batchnorm.{used}")
    assert not wrong, "\n".join(wrong)


def test_the_direction_has_no_circle():
    order = list(MAY_USE)
    for part, uses in MAY_USE.items():
        for used in uses - {"*"}:
            assert part not in MAY_USE[used], f"{part} and {used} use each other"
        assert uses <= {*order, "*"}


@pytest.mark.parametrize("module", ["batchnorm", "batchnorm.records", "batchnorm.verdicts"])
def test_import_is_lean(module):
    """A command line starts, and a reader of records reads, without torch or numpy."""
    code = f"import sys, {module}; print([m for m in ('torch', 'numpy') if m in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


def test_importing_the_layer_imports_no_extra():
    code = """
import sys, torch
before = set(sys.modules)
import batchnorm
batchnorm.BatchNorm2d
print(*sorted({m.split('.')[0] for m in set(sys.modules) - before} - sys.stdlib_module_names))
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert set(result.stdout.split()) <= {"batchnorm", "torch"}


def public():
    for name in batchnorm.__all__:
        value = getattr(batchnorm, name)
        yield f"batchnorm.{name}", value
        for inner in getattr(value, "__all__", ()) if inspect.ismodule(value) else ():
            yield f"batchnorm.{name}.{inner}", getattr(value, inner)


@pytest.mark.parametrize("name", [name for name, value in public() if callable(value)])
def test_every_public_name_is_documented(name):
    text = inspect.getdoc(dict(public())[name])
    assert text
    assert text.split("\n")[0].endswith("."), "the first line is a sentence"


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="has no attribute 'BatchNorm4d'"):
        batchnorm.BatchNorm4d  # noqa: B018
    assert set(batchnorm.__all__) <= set(dir(batchnorm))


WITH_EXAMPLES = [
    ".".join(("batchnorm", *names)) for path, names in modules() if ">>> " in path.read_text()
]


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_examples_in_docstrings_are_true(name, request):
    """As pytest's own collection would, but importing no module without an example."""
    module = importlib.import_module(name)
    results = doctest.testmod(module, extraglobs={"getfixture": request.getfixturevalue})
    assert results.attempted
    assert not results.failed
