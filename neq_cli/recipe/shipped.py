"""Lists the recipes that neq ships, and copies them to be changed; ``neq recipes`` and ``neq init`` call it."""

from __future__ import annotations

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


def copy_recipe(name: str, destination_directory: Path | str, *, schema: bool = False) -> list[Path]:
    """Copy a shipped recipe, and the Python files its entrypoints name, into a folder; return the paths written.

    The folder is made where it is missing. With ``schema``, the schema of recipes is laid beside them, where none is
    yet, and the recipe's first line names it to editors. Raise ``NeqError`` where ``name`` is unknown or a file is
    there already, in which case nothing is written.
    """
    known = shipped_names()
    if name not in known:
        raise NeqError(f"{name}: no recipe of that name; known: {', '.join(known)}{did_you_mean(name, known)}")
    recipe = shipped_directory() / f"{name}.yaml"
    sources = [recipe, *python_files(load_recipe(str(recipe)).recipe, recipe.parent)]
    destination = Path(destination_directory).expanduser()
    try:
        copies = {destination / source.name: source.read_bytes() for source in sources}
        for copy in copies:
            if copy.exists() or copy.is_symlink():
                raise NeqError(f"{copy}: is there already; move it away, or copy to another folder")
        if schema:
            copies[destination / recipe.name] = with_first_line(recipe.read_bytes())
            laid = destination / NAME
            if refuse_foreign(laid, "move it away, or give --no-schema") is Found.NOTHING:
                copies[laid] = schema_text().encode()
        destination.mkdir(parents=True, exist_ok=True)
        for copy, content in copies.items():
            with copy.open("xb") as file:  # never over a file that came in between
                file.write(content)
    except OSError as error:
        raise NeqError(
            f"{destination}: cannot be written to: {(error.strerror or str(error)).lower()}; choose another folder"
        ) from None
    return list(copies)


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
