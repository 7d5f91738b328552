"""Structure of the package: names of modules, imports between them, and imports of other packages."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import posthoc_ema

PACKAGE = Path(posthoc_ema.__file__).parent
MODULES = {path.stem: ast.parse(path.read_text()) for path in PACKAGE.glob("*.py*") if path.suffix in (".py", ".pyi")}
# The modules that users of pytorch-posthoc-ema import, and the package itself.
PUBLIC = {"__init__", "karras_ema", "posthoc_ema", "utils", "visualization"}


def imports_between(tree: ast.Module) -> set[str]:
    """Returns the modules of the package that a module imports anywhere, for types only or in a function too."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1, ast.unparse(node)
            if node.module is not None:
                found.add(node.module.partition(".")[0])
            else:
                found |= {alias.name if alias.name in MODULES else "__init__" for alias in node.names}
    return found


def imports_of_others(nodes: list[ast.stmt]) -> Iterator[str]:
    """Yields the names of other packages that are imported anywhere in statements, except for types only."""
    for statement in nodes:
        if isinstance(statement, ast.If) and ast.unparse(statement.test) == "TYPE_CHECKING":
            continue
        for node in ast.walk(statement):
            if isinstance(node, ast.Import):
                yield from (alias.name.partition(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and not node.level:
                yield str(node.module).partition(".")[0]


def test_modules_do_not_import_each_other() -> None:
    assert "_native" in MODULES and len(MODULES) > 20
    graph = {name: imports_between(tree) for name, tree in MODULES.items()}
    assert graph["__init__"] >= {"posthoc_ema", "visualization"}
    # Raises a CycleError that names the circle.
    TopologicalSorter(graph).prepare()


def test_modules_import_the_package_by_relative_names() -> None:
    assert [name for name, tree in MODULES.items() if "posthoc_ema" in imports_of_others(tree.body)] == []


def test_private_modules_have_an_underscore() -> None:
    assert {name for name in MODULES if name == "__init__" or not name.startswith("_")} == PUBLIC


def test_class_names_are_unique() -> None:
    classes = Counter(
        node.name for tree in MODULES.values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)
    )
    assert len(classes) > 20
    assert {name: count for name, count in classes.items() if count > 1} == {}


def test_only_one_module_draws() -> None:
    others = {name: set(imports_of_others(tree.body)) for name, tree in MODULES.items()}
    assert {name for name, imported in others.items() if "PIL" in imported} == {"_draw"}
    assert not any("matplotlib" in imported for imported in others.values())


def test_import_loads_no_other_packages() -> None:
    others = {"torch", "matplotlib", "PIL", "tqdm", "lightning", "pytorch_lightning", "transformers", "accelerate"}
    program = f"import sys, posthoc_ema.integrations; print(sorted({others} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_exported_names_exist() -> None:
    assert posthoc_ema.__all__ == sorted(posthoc_ema.__all__)
    assert all(hasattr(posthoc_ema, name) for name in posthoc_ema.__all__)
