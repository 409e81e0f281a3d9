"""Lists the recipes that neq ships, and copies them to be changed; ``neq recipes`` and ``neq init`` call it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from neq_cli.errors import NeqError, did_you_mean
from neq_cli.recipe.keys import Recipe
from neq_cli.recipe.load import load_recipe, shipped_directory, shipped_names
from neq_cli.recipe.schema import schema_text
from neq_cli.recipe.schema_file import NAME, Found, refuse_foreign, with_first_line


@dataclass(frozen=True)
class ShippedRecipe:
    """A recipe that can be trained by its name."""

    name: str
    path: Path
    description: str  # one line


def list_recipes() -> list[ShippedRecipe]:
    """Return the shipped recipes, sorted by name."""
    loaded = [load_recipe(str(shipped_directory() / f"{name}.yaml")) for name in shipped_names()]
    return [ShippedRecipe(recipe.name, recipe.path, recipe.recipe.description) for recipe in loaded]


def copy_recipe(name: str, destination: Path | str, *, schema: bool = False) -> list[Path]:
    """Copy a shipped recipe, and the Python files its entrypoints name; return the paths written.

    ``destination`` is a folder, or what the copy is to be called where it ends in .yaml: see ``place_of``. Raise
    ``NeqError`` where ``name`` is unknown, and as ``write_recipe`` does.
    """
    known = shipped_names()
    if name not in known:
        raise NeqError(f"{name}: no recipe of that name; known: {', '.join(known)}{did_you_mean(name, known)}")
    recipe = shipped_directory() / f"{name}.yaml"
    beside = python_files(load_recipe(str(recipe)).recipe, recipe.parent)
    target = place_of(destination, recipe.name)
    return write_recipe(target, recipe.read_bytes(), {file.name: file.read_bytes() for file in beside}, schema=schema)


def place_of(destination: Path | str, name: str) -> Path:
    """Return the file that ``destination`` means: itself where it ends in .yaml or .yml, else ``name`` in it."""
    path = Path(destination).expanduser()
    try:
        return path if path.suffix in (".yaml", ".yml") and not path.is_dir() else path / name
    except OSError:  # no permission to look: writing there says so
        return path / name


def write_recipe(
    path: Path, content: bytes, beside: Mapping[str, bytes] | None = None, *, schema: bool = False
) -> list[Path]:
    """Write a recipe, and files ``beside`` it by their names; return the paths written.

    The folder is made where it is missing. With ``schema``, the schema of recipes is laid beside them, where none is
    yet, and the recipe's first line names it to editors. Raise ``NeqError`` where a file is there already, in which
    case nothing is written, or the disk refuses.
    """
    folder = path.parent
    files = {path: content, **{folder / name: other for name, other in (beside or {}).items()}}
    try:
        check_new(*files)
        if schema:
            files[path] = with_first_line(content)
            laid = folder / NAME
            if refuse_foreign(laid, "move it away, or give --no-schema") is Found.NOTHING:
                files[laid] = schema_text().encode()
        folder.mkdir(parents=True, exist_ok=True)
        for file, written in files.items():
            with file.open("xb") as opened:  # never over a file that came in between
                opened.write(written)
    except OSError as error:
        raise NeqError(
            f"{folder}: cannot be written to: {(error.strerror or str(error)).lower()}; choose another folder"
        ) from None
    return list(files)


def check_new(*files: Path) -> None:
    """Raise NeqError where one of the files is there already. OSError."""
    for file in files:
        if file.exists() or file.is_symlink():
            raise NeqError(f"{file}: is there already; move it away, or choose another name or folder")


def python_files(recipe: Recipe, directory: Path) -> list[Path]:
    """Return the files beside a recipe that its entrypoints are in; entrypoints from installed packages have none."""
    modules = dict.fromkeys(entrypoint.partition(":")[0] for entrypoint in entrypoints(recipe))
    files = [directory / f"{module.split('.')[0]}.py" for module in modules]
    return [file for file in files if file.is_file()]


def entrypoints(recipe: Recipe) -> list[str]:
    """Return every callable that a recipe names, as ``pkg.mod:callable``."""
    policy_entrypoint = getattr(recipe.policy, "entrypoint", None)
    task = recipe.task if recipe.task_is_own else None
    named = [recipe.model.entrypoint, recipe.data.entrypoint, task, policy_entrypoint]
    return [entrypoint for entrypoint in named if entrypoint]
