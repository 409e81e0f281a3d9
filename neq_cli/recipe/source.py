"""Where a recipe's text comes from: a path, or the name of a recipe that neq ships; UTF-8, up to 1 MB."""

from __future__ import annotations

from pathlib import Path

from neq_cli.errors import RecipeError, did_you_mean
from neq_cli.recipe.describe import one_line

LARGEST = 1_000_000  # bytes; far above any recipe, and quickly read


def shipped_directory() -> Path:
    """Return the folder of shipped recipes: in the installed package, or at the top of a checkout."""
    package = Path(__file__).resolve().parent.parent
    installed = package / "recipes"
    return installed if installed.is_dir() else package.parent / "recipes"


def shipped_names() -> list[str]:
    """Return the names of the shipped recipes, sorted."""
    return sorted(path.stem for path in shipped_directory().glob("[!.]*.yaml"))


def find_recipe(reference: str) -> Path:
    """Return the file that ``reference`` means; a path wins over a shipped name. Raise ``RecipeError``."""
    name, known = one_line(reference), shipped_names()
    if not reference:
        raise RecipeError([f"no recipe given; give a file or one of {', '.join(known)}"])
    try:
        path = Path(reference).expanduser()
        is_directory, exists = path.is_dir(), path.exists()
    except PermissionError:
        raise RecipeError([f"{name}: cannot be read: permission denied"]) from None
    except (OSError, ValueError, RuntimeError) as error:  # too long a name, a null character, an unknown ~user
        reason = getattr(error, "strerror", None) or str(error)
        raise RecipeError([f"{name}: is no path: {reason.rstrip('.').lower()}"]) from None
    if exists and not is_directory:
        return path.absolute()
    if reference in known:
        return shipped_directory() / f"{reference}.yaml"
    if is_directory:
        inside = path / "recipe.yaml"
        mend = f"did you mean '{one_line(str(inside))}'?" if inside.is_file() else "give the recipe file in it"
        raise RecipeError([f"{name}: is a directory, not a recipe; {mend}"])
    suggestion = did_you_mean(path.stem, known)
    raise RecipeError([f"{name}: no such file, nor a recipe of that name; known: {', '.join(known)}{suggestion}"])


def read_text(path: Path, name: str) -> str:
    """Return a recipe's text; ``name`` is what problems call the file. Raise ``RecipeError``."""
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST + 1)
    except OSError as error:
        raise RecipeError([f"{name}: cannot be read: {(error.strerror or str(error)).lower()}"]) from None
    if len(content) > LARGEST:
        raise RecipeError([f"{name}: is larger than 1 MB, so not a recipe; give a YAML file"])
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise RecipeError([f"{name}:{line}: is not UTF-8 text; save it as UTF-8"]) from None
