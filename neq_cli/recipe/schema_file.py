"""The schema as a file beside recipes: what may be there already, and the line that names it to editors."""

from __future__ import annotations

from enum import Enum
from pathlib import Path

from neq_cli.errors import NeqError
from neq_cli.recipe.schema import is_schema, schema_text

NAME = "neq.schema.json"
FIRST_LINE = f"# yaml-language-server: $schema={NAME}\n"
"""What the language server for YAML, which most editors ask, goes by: the path is from the recipe's folder."""

_LARGEST = 1_000_000  # bytes; far above any schema


class Found(Enum):
    """What is at the path of a schema."""

    NOTHING = "nothing"
    SAME = "the schema of this version"
    OTHER = "a schema of recipes, of another version or changed"
    FOREIGN = "something else"


def found_at(path: Path) -> Found:
    """Return what is at ``path``; OSError where the disk does not tell."""
    if not path.exists():
        return Found.FOREIGN if path.is_symlink() else Found.NOTHING
    if not path.is_file():
        return Found.FOREIGN
    with path.open("rb") as file:
        text = file.read(_LARGEST).decode(errors="replace")
    if text == schema_text():
        return Found.SAME
    return Found.OTHER if is_schema(text) else Found.FOREIGN


def refuse_foreign(path: Path, mend: str) -> Found:
    """Return what is at ``path``; NeqError, which says the ``mend``, where it is no schema of recipes."""
    found = found_at(path)
    if found is Found.FOREIGN:
        raise NeqError(f"{path}: is there already, and no schema of neq's; {mend}")
    return found


def with_first_line(recipe: bytes) -> bytes:
    """Return a recipe's text with ``FIRST_LINE`` above it, unless it names a schema itself."""
    first = recipe.partition(b"\n")[0]
    return recipe if b"yaml-language-server:" in first else FIRST_LINE.encode() + recipe
