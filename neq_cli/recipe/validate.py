"""Finds every problem of a recipe's values at once, each in one plain sentence; load.py adds where it was written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, NamedTuple

from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from neq_cli.errors import did_you_mean
from neq_cli.recipe.describe import Slot, choices, expected, section_at, shown, slot_at
from neq_cli.recipe.keys import Recipe
from neq_cli.recipe.policy_keys import POLICIES, PolicySection, policy_kind
from neq_cli.recipe.values import AtOdds, Device, Section
from neq_cli.recipe.yaml import KeyPath, YamlSyntaxError, read_yaml


class Wrong(NamedTuple):
    """What is wrong with a key, in a sentence, and the keys whose values it is about where that is a section's."""

    message: str
    others: tuple[KeyPath, ...] = ()


def validate(values: Mapping[str, Any]) -> tuple[Recipe | None, dict[KeyPath, Wrong]]:
    """Return the recipe, None if any value is wrong, and what is wrong with each key that is."""
    try:
        return Recipe.model_validate(values), {}
    except ValidationError as error:
        problems: dict[KeyPath, Wrong] = {}
        # A key that takes one of several types has an error for each of them; the sentence names them all.
        for detail in error.errors(include_url=False):
            path = _path(detail, values)
            cause = detail.get("ctx", {}).get("error")
            keys = tuple((*path, key) for key in cause.keys) if isinstance(cause, AtOdds) else ()
            problems.setdefault(path, Wrong(_sentence(detail, path, values), keys))
        return None, problems


def valid_parts(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the valid ones of the sections and the device, whatever is wrong elsewhere; defaults where left out."""
    parts = {}
    for name, adapter in _part_adapters().items():
        field = Recipe.model_fields[name]
        try:
            if name in values:
                parts[name] = adapter.validate_python(values[name], strict=True)
            elif not field.is_required():
                parts[name] = field.get_default(call_default_factory=True)
        except ValidationError:
            continue
    return parts


def _part_adapters() -> dict[str, TypeAdapter[Any]]:
    adapters: dict[str, TypeAdapter[Any]] = {}
    for name, field in Recipe.model_fields.items():
        if name == "policy":
            adapters[name] = TypeAdapter(PolicySection)
        elif isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            adapters[name] = TypeAdapter(field.annotation)
    return {**adapters, "device": TypeAdapter(Device)}


def unknown_key(path: KeyPath, values: Mapping[str, Any]) -> str:
    """Return the sentence for a key that its section does not know, with the key that was probably meant."""
    key = str(path[-1])
    kinds = [kind for kind, model in POLICIES.items() if path[0] == "policy" and key in model.model_fields]
    if kinds:
        return f"policy {policy_kind(values['policy'])} has no such key; policy {' and '.join(kinds)} has"
    known = _keys(path[:-1], values)
    first, dot, rest = key.partition(".")
    suggestion = f"; write {rest} under {first}" if dot and first in known else did_you_mean(key, known)
    if not suggestion:
        elsewhere = [f"{name}.{key}" for name, model in _section_models() if key in model.model_fields]
        if len(path) > 1:
            elsewhere = [key] if key in Recipe.model_fields else []
        suggestion = f"; did you mean '{elsewhere[0]}'?" if elsewhere else f"; known: {', '.join(known)}"
    return "unknown key" + suggestion


def _keys(path: KeyPath, values: Mapping[str, Any]) -> list[str]:
    section = section_at(path, values)
    return list(section.model_fields) if section is not None else []


def _section_models() -> list[tuple[str, type[Section]]]:
    models = [(name, field.annotation) for name, field in Recipe.model_fields.items()]
    models += [("policy", model) for model in POLICIES.values()]
    return [(name, model) for name, model in models if isinstance(model, type) and issubclass(model, Section)]


def _path(detail: ErrorDetails, values: Mapping[str, Any]) -> KeyPath:
    """Return the path of the key, without the names that pydantic puts in for the members of a union."""
    if detail["type"] == "union_tag_invalid":
        return ("policy", "kind")
    location = list(detail["loc"])
    if location[0] == "policy":
        del location[1:2]
    path: KeyPath = ()
    for key in location:
        if slot_at((*path, key), values) is None and detail["type"] != "extra_forbidden":
            break
        path = (*path, key)
    return path


def _sentence(detail: ErrorDetails, path: KeyPath, values: Mapping[str, Any]) -> str:
    if detail["type"] == "missing":
        return f"missing; write {path[-1]}: {_example(path, values)}"
    if detail["type"] == "extra_forbidden":
        return unknown_key(path, values)
    if detail["type"] == "value_error":
        return str(detail["ctx"]["error"])
    if path == ("policy", "kind"):
        kind = policy_kind(values["policy"])
        return f"{shown(kind)} is not one of {', '.join(POLICIES)}{did_you_mean(str(kind), POLICIES)}"
    value: Any = values
    for key in path:
        value = value[key]
    return _wrong_value(value, path, values)


def _wrong_value(value: Any, path: KeyPath, values: Mapping[str, Any]) -> str:
    slot = slot_at(path, values)
    assert slot is not None  # pydantic found fault with a key that the models have
    wanted = expected(slot.annotation, slot.metadata)
    words = choices(slot.annotation, slot.metadata)
    mend = did_you_mean(value, words) if isinstance(value, str) else ""
    if not mend and isinstance(value, str) and _is_quoted_number(value, slot):
        mend = "; remove the quotes"
    if not mend and "text" in wanted.split() and isinstance(value, (bool, int, float)):
        mend = f"; put it in quotes: '{shown(value)}'"
    if not mend and isinstance(value, str) and "name" in _keys(path, values):
        mend = f"; write {{name: {value}}}"
    if not mend and isinstance(value, str) and path == ("policy",):
        mend = f"; write {{kind: {value}}}"
    if not mend and "a list" in wanted and isinstance(value, (str, int, float)):
        mend = f"; write [{shown(value)}]"
    if not mend and not (words or "true or false" in wanted):
        example = _example(path, values)
        mend = f"; write one such as {example}" if example else ""
    return f"{shown(value)} is not {wanted}{mend}"


def _is_quoted_number(text: str, slot: Slot) -> bool:
    """Whether ``text`` is a number that the key would take."""
    try:
        value = read_yaml(text).value
        kind: Any = Annotated
        parts = (slot.annotation, "", *slot.metadata)
        TypeAdapter(kind[parts]).validate_python(value)
    except (YamlSyntaxError, ValidationError):
        return False
    return isinstance(value, (int, float))


def _example(path: KeyPath, values: Mapping[str, Any]) -> str:
    """Return a value that ``path`` would take, an empty string where the models name none."""
    slot = slot_at(path, values)
    field = slot.field if slot is not None else None
    if field is None:
        return ""
    if field.examples:
        return str(field.examples[0])
    return "" if field.default is None or field.is_required() or field.default_factory else str(field.default)
