"""The order of the rooms in docs/architecture.md is that of the imports, without circles, not even for types."""

import ast
import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import ducat

PACKAGE = Path(ducat.__file__).parent
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path != PACKAGE / "__init__.py"
}


def order() -> list[str]:
    """Return the rooms as the page lists them."""
    page = (Path(__file__).parents[1] / "docs" / "architecture.md").read_text(encoding="utf-8")
    table = page.partition("<!-- order -->")[2].partition("<!-- end -->")[0]
    cells = [line.split("|")[1] for line in table.strip().splitlines()[2:]]
    return [room.rstrip("/").removesuffix(".py") for cell in cells for room in re.findall(r"`([^`]+)`", cell)]


def imported(tree: ast.AST) -> Iterator[str]:
    """Yield the modules of ours that a file imports, wherever in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.removeprefix("ducat.") for alias in node.names if alias.name.startswith("ducat."))
        if isinstance(node, ast.ImportFrom) and node.module is not None and node.module.split(".")[0] == "ducat":
            inside = node.module.removeprefix("ducat").removeprefix(".")
            for alias in node.names:
                longer = f"{inside}.{alias.name}".removeprefix(".")
                yield longer if longer in MODULES else inside or longer


IMPORTS = {name: set(imported(ast.parse(path.read_text(encoding="utf-8")))) for name, path in MODULES.items()}


def room(module: str) -> str:
    return module.split(".")[0]


def test_the_page_lists_every_room_once() -> None:
    assert sorted(order()) == sorted({room(module) for module in MODULES})


@pytest.mark.parametrize("module", MODULES)
def test_a_room_imports_only_rooms_above_it(module: str) -> None:
    rooms = order()
    below = [name for name in IMPORTS[module] if rooms.index(room(name)) > rooms.index(room(module))]
    assert below == []


def test_no_module_is_imported_in_a_circle() -> None:
    within = {
        module: {name for name in IMPORTS[module] if room(name) == room(module) and name != module}
        for module in MODULES
    }
    TopologicalSorter(within).prepare()


def test_a_climb_is_seen() -> None:
    tree = ast.parse("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ducat.training import Step\n")
    assert list(imported(tree)) == ["training"]
    assert list(imported(ast.parse("def f():\n    from ducat import methods, training\n"))) == ["methods", "training"]
