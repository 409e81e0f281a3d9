"""The house stays as it is drawn: who may import whom, a sentence for every room, and the tree of files on its page."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

from pages import ROOT, check_generated, spans

PACKAGE = ROOT / "neq_cli"
PAGE = "neq_cli/README.md"

GROUND = ("errors", "text", "events", "complaints", "signals", "freed_memory")
"""Modules at the top that any room may use, but `freezing`, which is usable alone; they use `errors` at most."""
MAY_IMPORT = {
    **dict.fromkeys(GROUND, ("errors",)),
    "recipe": GROUND,
    "freezing": ("errors",),
    "training": (*GROUND, "recipe", "freezing"),
    "runs": (*GROUND, "recipe"),
    "jobs": (*GROUND, "recipe", "freezing", "training", "runs"),
    "integrations": (*GROUND, "freezing", "training", "runs", "jobs"),
    "commands": (*GROUND, "recipe", "training", "runs", "jobs"),
    "cli": (*GROUND, "commands"),
    "__main__": ("cli",),
    "": ("freezing", "freed_memory", "jobs", "runs"),  # the names that users import
}
WITHOUT_TORCH = (*GROUND, "recipe", "runs", "commands", "cli")
"""Rooms that never import torch by themselves, so that `neq --help` is quick and runs are read where there is none."""
EXCEPTIONS = {
    ("neq_cli.jobs.sweep.child", "cli"): "a run of a sweep is `neq` in a process of its own",
}
NO_MODULES = {
    "py.typed": "the package is typed",
    "digits.safetensors": "the digits themselves",
    "page.css": "how the page looks, in light, dark and print",
}


@cache
def modules() -> dict[str, Path]:
    """Return every module and package by its dotted name."""
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in sorted(PACKAGE.rglob("*.py"))
    }


@cache
def tree_of(name: str) -> ast.Module:
    return ast.parse(modules()[name].read_text(encoding="utf-8"))


def imported(statements: Iterable[ast.AST], *, at_import: bool = False) -> Iterator[str]:
    """Yield the dotted names that are imported, ``at_import`` only those that importing the module itself imports."""
    for statement in statements:
        if isinstance(statement, ast.Import):
            yield from (name.name for name in statement.names)
        elif isinstance(statement, ast.ImportFrom):
            assert statement.level == 0, "imports are absolute"
            yield from (f"{statement.module}.{name.name}" for name in statement.names)
        elif at_import and isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        elif at_import and isinstance(statement, ast.If) and "TYPE_CHECKING" in ast.unparse(statement.test):
            yield from imported(statement.orelse, at_import=True)
        else:
            yield from imported(ast.iter_child_nodes(statement), at_import=at_import)


def own(name: str) -> str | None:
    """Return the module of ours that a dotted name is, or is in; None for what others wrote."""
    while name and name not in modules():
        name = name.rpartition(".")[0]
    return name or None


def room(module: str) -> str:
    """Return the folder or module at the top that a module is in, "" for the package itself."""
    return f"{module}.".split(".")[1]


def links() -> Iterator[tuple[str, str]]:
    """Yield every module with each module of ours that it imports, wherever in it."""
    for name in modules():
        for module in dict.fromkeys(own(found) for found in imported(tree_of(name).body)):
            if module is not None and room(module) and room(name) != room(module):
                yield name, module


def test_every_room_has_its_rule() -> None:
    unknown = {name for name in modules() if room(name)} - {name for name in modules() if room(name) in MAY_IMPORT}
    assert not unknown, f"new at the top; say in MAY_IMPORT what it may import: {unknown}"


def test_imports_run_downward() -> None:
    upward = [
        f"{name} imports {module}"
        for name, module in links()
        if room(module) not in MAY_IMPORT.get(room(name), ()) and (name, room(module)) not in EXCEPTIONS
    ]
    assert not upward, "\n".join(upward)


def test_exceptions_are_needed() -> None:
    found = {(name, room(module)) for name, module in links()}
    assert not EXCEPTIONS.keys() - found, "these hold no longer: take them out of EXCEPTIONS"


def test_no_module_waits_for_one_that_waits_for_it() -> None:
    graph = {
        name: {module for found in imported(tree_of(name).body, at_import=True) if (module := own(found))} - {name}
        for name in modules()
    }
    list(TopologicalSorter(graph).static_order())  # CycleError names the modules of a cycle


def test_no_torch_is_imported_by_rooms_without() -> None:
    torch = {"torch", "torchvision"}
    wrong = [
        name
        for name in modules()
        if room(name) in WITHOUT_TORCH and torch & {found.split(".")[0] for found in imported(tree_of(name).body)}
    ]
    assert not wrong


def test_importing_them_imports_no_torch() -> None:
    names = [name for name in modules() if room(name) in WITHOUT_TORCH]
    code = f"import sys\nfor name in {names}:\n    __import__(name)\nsys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def idea(name: str) -> str:
    """Return the first sentence of a module's docstring, without its full stop; "" where there is none."""
    paragraph = (ast.get_docstring(tree_of(name)) or "").split("\n\n")[0]
    sentence = re.split(r"(?<=\.)\s+(?=[A-Z`'\"])", " ".join(paragraph.split()))[0]
    return sentence.removesuffix(".") if sentence.endswith(".") else ""


def test_every_module_and_folder_says_its_idea() -> None:
    without = [name for name in modules() if len(idea(name).split()) < 3]
    assert not without, "their docstrings do not begin with a sentence"


def rooms() -> str:
    """Return the table of rooms: each with its idea, and what it may import."""
    rows = ["| room | what it is | may import |", "| --- | --- | --- |"]
    for name in (name for name in reversed(MAY_IMPORT) if name not in (*GROUND, "__main__", "")):
        allowed = [f"`{other}`" for other in MAY_IMPORT[name] if other not in GROUND]
        ground = ["the ground"] if set(GROUND) <= set(MAY_IMPORT[name]) else ["`errors`"]
        folder = "/" if (PACKAGE / name).is_dir() else ".py"
        rows.append(f"| `{name}{folder}` | {idea(f'neq_cli.{name}')} | {', '.join([*allowed, *ground])} |")
    return "\n".join(rows)


def test_the_page_tells_the_same_rules() -> None:
    check_generated(PAGE, "a test reads them all.\n\n", "\nThe ground is", rooms())


def test_every_folder_is_a_package() -> None:
    assert {path.parent for path in PACKAGE.rglob("*.py")} == {path.parent for path in PACKAGE.rglob("__init__.py")}


def test_tests_mirror_the_folders() -> None:
    folders = {path.parent.relative_to(ROOT / "tests") for path in (ROOT / "tests").rglob("test_*.py")}
    assert not {str(folder) for folder in folders if not (PACKAGE / folder).is_dir()}


def file_tree() -> str:
    """Return every folder and file of the package with its idea, folders after the files beside them."""
    rows = list(_rows(PACKAGE, "neq_cli", 0))
    width = max(len(left) for left, _ in rows) + 2
    return "\n".join(f"{left:<{width}}{right}" for left, right in rows)


def _rows(folder: Path, package: str, depth: int) -> Iterator[tuple[str, str]]:
    yield f"{'  ' * depth}{folder.name}/", idea(package)
    inside = [path for path in sorted(folder.iterdir()) if not path.name.startswith((".", "__pycache__"))]
    for path in inside:
        if path.suffix == ".py" and path.stem != "__init__":
            yield f"{'  ' * (depth + 1)}{path.name}", idea(f"{package}.{path.stem}")
        elif path.name in NO_MODULES:
            yield f"{'  ' * (depth + 1)}{path.name}", NO_MODULES[path.name]
    for path in inside:
        if (path / "__init__.py").is_file():
            yield from _rows(path, f"{package}.{path.name}", depth + 1)


def test_the_file_tree_is_the_one_on_disk() -> None:
    begin, end = "<!-- generated: tests/test_architecture.py: file_tree() -->\n", "<!-- end of the file tree -->"
    check_generated(PAGE, begin, end, f"```text\n{file_tree()}\n```")


def defined(path: Path) -> set[str]:
    """Return the names of what a Python file defines, within classes too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
    return found


def test_what_the_page_names_is_there() -> None:
    """`folder/module.py` and `folder/module.py::name`, from the package or the top; files and names exist."""
    places = [
        span for span in dict.fromkeys(spans(PAGE)) if re.fullmatch(r"[\w/.-]+\.(py|css|yaml|toml|md)(::\w+)?", span)
    ]
    assert len(places) > 40, "the test is worth nothing where the page is not understood"
    lacking = []
    for place in places:
        path, _, name = place.partition("::")
        found = [folder / path for folder in (PACKAGE, ROOT) if (folder / path).is_file()]
        if not found or (name and name not in defined(found[0])):
            lacking.append(place)
    assert not lacking, f"{PAGE} names what is not there"
