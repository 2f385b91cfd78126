"""The shape of the package: imports point one way, the core knows no method's name."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from trainless.patchers import known

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "trainless"
# From the bottom to the top; a unit may import units of earlier lines only. A unit is a file or a folder of the
# package. The walk of a call: hosts → engine → cache; of a patch: patch, over hosts; of a batch: batch.
ORDER = [
    {"errors", "tables"},
    {"kernels", "seams"},
    {"edits", "cache", "patchers"},
    {"engine", "recipes"},
    {"hosts"},
    {"patch", "verify"},
    {"preview", "models"},
    {"batch"},
    {"calibrators", "bench"},
    {"__init__"},
    {"cli"},
    {"__main__"},
]
# A patch verifies itself when it is asked to.
TOGETHER = {frozenset({"patch", "verify"})}
# A method sees the vocabulary and the kernels, and nothing of the machinery that runs it.
METHODS_MAY_IMPORT = {"errors", "seams", "kernels"}
LEVEL = {unit: level for level, units in enumerate(ORDER) for unit in units}

FILES = sorted(PACKAGE.rglob("*.py"))


def unit_of(parts: tuple[str, ...]) -> str:
    """The unit of a module given as its path inside the package."""
    return parts[0] if parts else "__init__"


def imports(file: Path) -> set[str]:
    """The units that ``file`` imports, wherever in the file it does so, its own left out."""
    own = file.relative_to(PACKAGE).with_suffix("").parts
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            paths = [tuple(alias.name.split(".")) for alias in node.names]
            targets = [path[1:] for path in paths if path[0] == "trainless"]
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                base = own[: len(own) - node.level]
            elif (node.module or "").split(".")[0] == "trainless":
                base = ()
            else:
                continue
            module = tuple((node.module or "").split(".")) if node.module else ()
            base += module[1:] if not node.level else module
            # `from ..hosts import base` names a module, not something inside one.
            targets = [
                (*base, alias.name) if len(base) < 2 and is_module((*base, alias.name)) else base
                for alias in node.names
            ]
        else:
            continue
        found |= {unit_of(target) for target in targets}
    return found - {unit_of(own)}


def is_module(parts: tuple[str, ...]) -> bool:
    place = PACKAGE.joinpath(*parts)
    return place.with_suffix(".py").is_file() or (place / "__init__.py").is_file()


def faults_of(file: Path) -> list[str]:
    """What ``file`` imports and must not."""
    own = unit_of(file.relative_to(PACKAGE).with_suffix("").parts)
    if own not in LEVEL:
        return [f"{own} has no place in ORDER: say where it belongs"]
    found = []
    for target in imports(file):
        if target not in LEVEL:
            found.append(f"{file}: {target} has no place in ORDER")
        elif frozenset({own, target}) not in TOGETHER and LEVEL[target] >= LEVEL[own]:
            found.append(f"{file}: imports {target}, which stands beside or above it")
    return found


def test_imports_point_one_way() -> None:
    assert len(FILES) > 200
    assert not [fault for file in FILES for fault in faults_of(file)]


def test_methods_see_only_the_vocabulary() -> None:
    methods = [file for file in FILES if file.parent.name == "patchers"]
    assert methods
    assert not {
        file.name: more for file in methods if (more := imports(file) - METHODS_MAY_IMPORT - {"patchers"})
    }


def test_an_import_upwards_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{__name__}.PACKAGE", tmp_path)
    (tmp_path / "hosts").mkdir()
    for name in ("base", "__init__"):
        (tmp_path / "hosts" / f"{name}.py").write_text("")
    file = tmp_path / "kernels.py"
    file.write_text(
        "import trainless\nfrom .seams import Lease\nfrom .hosts import base\nfrom .hosts.base import Host\n"
        "def f():\n    from trainless.cli.shared import say\n    from . import errors\n    import torch\n"
    )
    assert imports(file) == {"__init__", "hosts", "seams", "cli"}
    (tmp_path / "errors.py").write_text("")
    assert "errors" in imports(file)


def names() -> set[str]:
    return {*known(aliases=True)}


def names_in(source: str) -> set[str]:
    """Names of methods that code depends on: whole strings, and modules imported. Prose may give examples."""
    tree = ast.parse(source)
    prose = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
            found |= {node.value} & names()
        if isinstance(node, ast.ImportFrom):
            path = (node.module or "").split(".")
            found |= (
                {path[-1], *(alias.name for alias in node.names)} & names() if "patchers" in path else set()
            )
    return found


def test_a_name_in_code_is_seen() -> None:
    name = sorted(known())[0]
    assert names_in(f"if method.name == {name!r}: pass") == {name}
    assert names_in(f"from ..patchers.{name} import Thing") == {name}
    assert names_in(f'"""Such as {name}."""\n') == set()


def test_the_core_knows_no_method() -> None:
    strangers = {}
    for file in FILES:
        # A method's own file and the measurement that is made for it may name it.
        own = {file.stem} if file.parent.name in ("patchers", "calibrators") else set()
        module = ".".join(("trainless", *file.relative_to(PACKAGE).with_suffix("").parts))
        classes = {cls.name for cls in known().values() if cls.__module__ == module}
        aliases = {alias for cls in known().values() if cls.name in classes for alias in cls.aliases}
        if more := names_in(file.read_text(encoding="utf-8")) - own - classes - aliases:
            strangers[file.name] = more
    assert not strangers


def test_the_name_of_a_class_has_one_meaning():
    named: dict[str, list[str]] = {}
    for file in FILES:
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef):
                named.setdefault(node.name, []).append(str(file.relative_to(PACKAGE)))
    twice = {name: files for name, files in named.items() if len(files) > 1}
    assert not twice
