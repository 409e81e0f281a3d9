"""The recipe's keys as a JSON Schema, draft 2020-12, by which editors complete and check; looser than neq's own check.

By hand and not by pydantic, whose schema of the same models differs from version to version: the file beside a recipe
would, too. What the schema cannot say is left to ``neq validate``: names that only torch knows, most of what two keys
say together, and that 3.0 is no whole number. Editors read YAML 1.2, where `yes`, `on` and `1_000` are text.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from neq_cli import __version__
from neq_cli.recipe.describe import POLICY_MEANING, UNIONS, choices, examples_of, limit, meaning, unwrapped
from neq_cli.recipe.keys import Recipe
from neq_cli.recipe.policy_keys import DEFAULT_POLICY_KIND, POLICIES
from neq_cli.recipe.values import Section

IDENTIFIER = "urn:neq:recipe:"
"""What the `$id` of every version's schema begins with; the version follows."""

_TYPES = {int: "integer", float: "number", str: "string", bool: "boolean", type(None): "null"}
_LIMITS = {"gt": "exclusiveMinimum", "ge": "minimum", "lt": "exclusiveMaximum", "le": "maximum"}


def recipe_schema() -> dict[str, Any]:
    """Return the schema as JSON has it. No part refers to another, for some editors lose their way there."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": f"{IDENTIFIER}{__version__}",
        "title": f"Recipe of neq {__version__}",
        **_section(Recipe),
    }


def schema_text() -> str:
    """Return the schema as the text of a file: of one version of neq always the same."""
    return json.dumps(recipe_schema(), indent=2, ensure_ascii=False) + "\n"


def is_schema(text: str) -> bool:
    """Return whether a file's text is a recipe's schema, of this version of neq or another."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) and str(value.get("$id")).startswith(IDENTIFIER)


def _section(model: type[Section]) -> dict[str, Any]:
    fields = model.model_fields
    others = model.model_config.get("extra") == "allow"
    found: dict[str, Any] = {
        "type": "object",
        "description": meaning(model),
        "properties": {
            name: _policy(field) if name == "policy" else _property(field) for name, field in fields.items()
        },
        "required": [name for name, field in fields.items() if field.is_required()],
        "additionalProperties": others,
    }
    if others:  # a class's arguments, which stand beside its name
        found["properties"]["kwargs"] = False
    if {"name", "entrypoint"} <= fields.keys():  # one of them; the other one may be null
        found["oneOf"] = [
            {"required": [source], "properties": {source: {"type": "string"}}} for source in ("name", "entrypoint")
        ]
    return found


def _policy(field: FieldInfo) -> dict[str, Any]:
    """Choose by kind which keys there are, so that an editor complains of those of the kind that is written."""
    kinds = " ".join(f"{kind}: {meaning(model)}" for kind, model in POLICIES.items())
    return {
        "type": "object",
        "description": POLICY_MEANING,
        "properties": {"kind": {"enum": list(POLICIES), "description": kinds, "default": DEFAULT_POLICY_KIND}},
        "allOf": [
            {
                # Without a kind, "properties" has nothing to find wrong: the default's condition holds.
                "if": {
                    "properties": {"kind": {"const": kind}},
                    "required": [] if kind == DEFAULT_POLICY_KIND else ["kind"],
                },
                "then": _section(model),
            }
            for kind, model in POLICIES.items()
        ],
        "examples": examples_of(field),
    }


def _property(field: FieldInfo) -> dict[str, Any]:
    found = _value(field.annotation, field.metadata)
    if field.description:
        found["description"] = field.description
    default = None if field.is_required() else field.get_default(call_default_factory=True)
    if not field.is_required() and not isinstance(default, Section):  # whose keys have their own
        found["default"] = default
    examples = examples_of(field) or ([] if "enum" in found else list(choices(field.annotation, field.metadata)))
    if examples:
        found["examples"] = examples
    return found


def _value(annotation: Any, metadata: Sequence[Any]) -> dict[str, Any]:
    annotation, metadata = unwrapped(annotation, metadata)
    origin = get_origin(annotation)
    if origin in UNIONS:
        return {"anyOf": [_value(member, ()) for member in get_args(annotation)]}
    if origin is Literal:
        return {"enum": list(get_args(annotation))}
    if origin is dict:
        return {"type": "object"}
    if origin is list:
        found: dict[str, Any] = {"type": "array", "items": _value(get_args(annotation)[0], ())}
        lengths = {"minItems": limit(metadata, "min_length"), "maxItems": limit(metadata, "max_length")}
        return found | {name: length for name, length in lengths.items() if length is not None}
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return _section(annotation)
    found = {"type": _TYPES[annotation]}  # KeyError: a type that no key had before
    found |= {name: limit(metadata, ours) for ours, name in _LIMITS.items() if limit(metadata, ours) is not None}
    pattern = limit(metadata, "pattern")
    if pattern is not None:
        # Editors are written in JavaScript, whose \w has no letters beyond ASCII; ours has all.
        found["pattern"] = pattern.replace(r"\w", r"[\w\u0080-\uffff]")
    return found
