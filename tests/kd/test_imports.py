"""Who imports whom, read from the source without importing it."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
KD_MAY_IMPORT = {"kd", "torch", "einops", "jaxtyping"}
ABOVE_LEARNERS = ("cil.engine", "cil.data", "cil.checking", "cil.config", "cil.cli", "cil.report")
NEEDS_TORCH = ("torch", "torchvision", "timm", "kd")


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for package in ("kd", "cil") for path in sorted((ROOT / package).rglob("*.py"))}


def imported(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute here"
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imports(module: str) -> set[str]:
    return set(imported(ast.parse(MODULES[module].read_text())))


def top_level_imports(module: str) -> set[str]:
    """What importing the module imports: nothing inside functions, nothing for type checkers only."""
    tree = ast.parse(MODULES[module].read_text())
    body = [node for node in tree.body if not isinstance(node, ast.FunctionDef | ast.ClassDef | ast.If)]
    return set(imported(ast.Module(body, [])))


def reached(module: str) -> set[str]:
    """Everything that importing the module imports, directly or through this project, packages on the way included."""
    found: set[str] = set()
    todo = [module]
    while todo:
        name = todo.pop()
        parents = [name.rpartition(".")[0]] if "." in name else []
        for entry in [name, *parents]:
            if entry not in found:
                found.add(entry)
                if entry in MODULES:
                    todo += [*top_level_imports(entry), entry.rpartition(".")[0] or entry]
    return found


def within(name: str, packages: tuple[str, ...]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def modules_under(prefix: str) -> list[str]:
    return [name for name in MODULES if within(name, (prefix,))]


@pytest.mark.parametrize("module", modules_under("kd"))
def test_kd_imports_only_torch_einops_jaxtyping_and_itself(module):
    packages = {name.split(".")[0] for name in imports(module)}
    assert packages - KD_MAY_IMPORT - sys.stdlib_module_names == set()


def test_the_engine_imports_no_concrete_learner():
    assert "cil.engine" in MODULES
    found = {name for name in imports("cil.engine") if within(name, ("cil.learners",)) and name in MODULES}
    assert found <= {"cil.learners", "cil.learners.base"}


@pytest.mark.parametrize("module", modules_under("cil.learners"))
def test_learners_import_neither_engine_nor_data_nor_config(module):
    assert not [name for name in imports(module) if within(name, ABOVE_LEARNERS)]


@pytest.mark.parametrize("module", modules_under("cil.report"))
def test_the_report_needs_no_torch(module):
    assert not sorted(name for name in reached(module) if within(name, NEEDS_TORCH))


def test_a_forbidden_import_would_be_seen():
    tree = ast.parse("def late():\n    from cil.data import cifar\n    import timm.layers")
    assert set(imported(tree)) == {"cil.data", "cil.data.cifar", "timm.layers"}
    assert within("cil.data.cifar", ABOVE_LEARNERS)
    assert within("kd.base", NEEDS_TORCH)
    assert not within("kdtree", NEEDS_TORCH)
