"""Writes the Markdown table of every key of a recipe, as the models tell; only the documentation and its test call it.

Apart from describe.py, whose sentences users see whenever a recipe is wrong: the table changes for other reasons.
"""

from __future__ import annotations

from collections.abc import Iterator

from pydantic.fields import FieldInfo

from neq_cli.recipe.describe import POLICY_MEANING, expected, meaning, shown
from neq_cli.recipe.keys import Recipe
from neq_cli.recipe.optimizer_keys import ParameterGroup
from neq_cli.recipe.policy_keys import DEFAULT_POLICY_KIND, POLICIES
from neq_cli.recipe.values import Section

Row = tuple[str, str, str, str]


def recipe_reference() -> str:
    """Return a Markdown table of all keys: key, type, default, meaning."""
    rows = [("key", "type", "default", "meaning"), ("---",) * 4, *_rows()]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |\n" for row in rows)


def _rows() -> Iterator[Row]:
    for name, field in Recipe.model_fields.items():
        if name == "policy":
            yield from _policy_rows()
        elif isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield (
                f"`{name}`",
                "section",
                "required" if field.is_required() else "its defaults",
                meaning(field.annotation),
            )
            yield from _section_rows(name, field.annotation)
        else:
            yield _row(name, field)


def _section_rows(prefix: str, model: type[Section]) -> Iterator[Row]:
    for name, field in model.model_fields.items():
        yield _row(f"{prefix}.{name}", field)
        if field.annotation == list[ParameterGroup]:
            yield from _section_rows(f"{prefix}.{name}.N", ParameterGroup)


def _policy_rows() -> Iterator[Row]:
    yield "`policy`", "section", "its defaults", POLICY_MEANING
    kinds = " ".join(f"{kind}: {meaning(model)}" for kind, model in POLICIES.items())
    yield "`policy.kind`", f"one of {', '.join(POLICIES)}", f"`{DEFAULT_POLICY_KIND}`", kinds
    for kind, model in POLICIES.items():
        for name, field in model.model_fields.items():
            if name != "kind":
                yield _row(f"policy.{name}", field, of=f"({kind}) ")


def _row(key: str, field: FieldInfo, of: str = "") -> Row:
    kind = expected(field.annotation, field.metadata).removeprefix("a ")
    return f"`{key}`", kind, _default(field), of + (field.description or "")


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    default = field.get_default(call_default_factory=True)
    return f"`{default or shown(default)}`" if isinstance(default, str) else f"`{shown(default)}`"
