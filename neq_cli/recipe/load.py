"""Reads a recipe from a path, or by the name of one that neq ships, and checks it; or tells all its problems at once.

Names that only torch knows are left to ``checks``, which the caller gives.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from neq_cli.errors import RecipeError, RecipeValueError, did_you_mean
from neq_cli.recipe.describe import shown
from neq_cli.recipe.document import Document, Located
from neq_cli.recipe.keys import CHANGES, Check, Recipe
from neq_cli.recipe.places import line, lines, located
from neq_cli.recipe.recorded import is_recorded
from neq_cli.recipe.validate import valid_parts, validate
from neq_cli.recipe.values import SURROUNDINGS
from neq_cli.recipe.yaml import YamlSyntaxError, read_yaml, write_yaml
from neq_cli.text import escaped

Completion = Callable[[Recipe], tuple[Recipe, Sequence[str]]]
"""What puts in what a recipe leaves to the model that it names, and says so, a line for each."""

LARGEST = 1_000_000  # bytes; far above any recipe, and quickly read


def shipped_directory() -> Path:
    """Return the folder of shipped recipes: in the installed package, or at the top of a checkout."""
    package = Path(__file__).resolve().parent.parent
    installed = package / "recipes"
    return installed if installed.is_dir() else package.parent / "recipes"


def shipped_names() -> list[str]:
    """Return the names of the shipped recipes, sorted."""
    return sorted(path.stem for path in shipped_directory().glob("[!.]*.yaml"))


def _refuse_recorded(document: Document, file: str) -> None:
    if is_recorded(document.values):
        mend = "run that loop, and to go on with it give its Recorder resume=True"
        raise RecipeError([f"{escaped(file)}: was recorded from a training loop that neq does not know; {mend}"])


def find_recipe(reference: str) -> Path:
    """Return the file that ``reference`` means; a path wins over a shipped name. Raise ``RecipeError``."""
    name, known = escaped(reference), shipped_names()
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
        mend = f"did you mean '{escaped(str(inside))}'?" if inside.is_file() else "give the recipe file in it"
        raise RecipeError([f"{name}: is a directory, not a recipe; {mend}"])
    suggestion = did_you_mean(path.stem, known)
    raise RecipeError([f"{name}: no such file, nor a recipe of that name; known: {', '.join(known)}{suggestion}"])


@dataclass(frozen=True)
class LoadedRecipe:
    """A valid recipe, and the file it was read from."""

    recipe: Recipe
    path: Path  # absolute
    file: str  # as the user named it
    document: Document
    notes: tuple[str, ...] = ()  # what it left to the model that it names

    @property
    def name(self) -> str:
        """The file's name without its suffix."""
        return self.path.stem

    @property
    def directory(self) -> Path:
        """Where the file lies, and with it the Python files that its entrypoints may name."""
        return self.path.parent

    def problem(self, key: str, message: str, others: Sequence[str] = ()) -> str:
        """Return the line that tells of a problem with ``key``, or with ``others``, and where that was written."""
        return line(located(self.document, key, message, others, self.recipe), self.file)

    def resolved_yaml(self) -> str:
        """Return the recipe with its overrides and defaults written out; see ``dump_recipe``."""
        return dump_recipe(self.recipe)


def dump_recipe(recipe: Recipe) -> str:
    """Return YAML that ``load_recipe`` reads as an equal recipe, with every default written out."""
    return write_yaml(recipe.model_dump())


def dump_portable(recipe: Recipe) -> str:
    """Return YAML of what was learnt and how, for weights that leave their machine: not where it was computed.

    Folders, devices and their kind are left at their defaults, but for the memory format, which decides on bits.
    """
    values = recipe.model_dump()
    for key, said in CHANGES.items():
        *sections, name = key.split(".")
        if said == SURROUNDINGS and key != "channels_last":
            section = values[sections[0]] if sections else values
            section.pop(name, None)
    return write_yaml(values)


def load_recipe(
    reference: str,
    overrides: Sequence[str] = (),
    checks: Sequence[Check] = (),
    complete: Completion | None = None,
) -> LoadedRecipe:
    """Read a recipe, apply ``KEY=VALUE`` overrides and check it.

    ``reference`` is a path, or the name of a shipped recipe. Every check is called with the name of each section that
    is valid by itself and that section, also where others are not; then, where nothing at all is wrong, with "" and
    the whole recipe. ``complete`` puts in what the recipe leaves out and its model has. Raise ``RecipeError`` with all
    problems, each located in the file or on the command line.
    """
    path, file, document = read_document(reference, overrides)
    return _load(document, path, file, checks, complete)


def load_text(
    text: str,
    path: Path,
    file: str,
    overrides: Sequence[str] = (),
    checks: Sequence[Check] = (),
    complete: Completion | None = None,
) -> LoadedRecipe:
    """Return the recipe in ``text``, which came from ``path``: all else is as for ``load_recipe``.

    ``file`` is what problems call it.
    """
    return _load(_document(text, file, overrides), path, file, checks, complete)


def _load(
    document: Document, path: Path, file: str, checks: Sequence[Check], complete: Completion | None
) -> LoadedRecipe:
    recipe, problems = _checked(document, checks)
    if recipe is None or problems:
        raise RecipeError(lines(problems, file))
    loaded = LoadedRecipe(recipe, path, file, document)
    if complete is None:
        return loaded
    try:
        completed, notes = complete(recipe)
    except RecipeValueError as error:
        raise RecipeError([loaded.problem(error.key, error.reason, error.others)]) from error
    return replace(loaded, recipe=completed, notes=tuple(notes))


def read_document(reference: str, overrides: Sequence[str] = ()) -> tuple[Path, str, Document]:
    """Return the file that ``reference`` means, what to call it, and what it says with overrides, unchecked."""
    path = find_recipe(reference)
    file = path.name if path.parent == shipped_directory() else reference
    return path, file, _document(_text_of(path, file), file, overrides)


def _document(text: str, file: str, overrides: Sequence[str]) -> Document:
    document = _read(text, file)
    _refuse_recorded(document, file)
    document.override(overrides)
    return document


def _text_of(path: Path, name: str) -> str:
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


def _read(text: str, file: str) -> Document:
    try:
        read = read_yaml(text)
    except YamlSyntaxError as error:
        raise RecipeError(lines([(error.line, (), error.message)], file)) from None
    if not isinstance(read.value, dict):
        what = "empty" if read.value is None else f"{shown(read.value)} is no recipe"
        message = f"{what}; write keys such as model, data, epochs and optimizer"
        raise RecipeError(lines([(read.lines.get((), 1), (), message)], file))
    return Document(read.value, dict(read.lines), list(read.problems))


def _checked(document: Document, checks: Sequence[Check]) -> tuple[Recipe | None, list[Located]]:
    recipe, wrong = validate(document.values)
    problems = list(document.problems)
    unread = {(place, path) for place, path, _ in problems}
    found = [(document.place(path, one.others), path, one.message) for path, one in wrong.items()]
    problems += [problem for problem in found if problem[:2] not in unread]
    for name, part in valid_parts(document.values).items():
        problems += _run(checks, name, part, document)
    if recipe is not None and not problems:
        problems += _run(checks, "", recipe, document)
    return recipe, problems


def _run(checks: Sequence[Check], name: str, part: Any, document: Document) -> list[Located]:
    return [
        located(document, problem.key, problem.message, problem.others)
        for check in checks
        for problem in check(name, part)
    ]
