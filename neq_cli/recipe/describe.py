"""Says in plain words what each key of a recipe takes, as the models tell: for problems and for the reference table."""

from __future__ import annotations

import json
import types
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from neq_cli.recipe.keys import Recipe
from neq_cli.recipe.policy_keys import POLICIES, policy_kind
from neq_cli.recipe.values import Section, Words
from neq_cli.recipe.yaml import read_yaml

UNIONS = (Union, types.UnionType)
POLICY_MEANING = "What chooses the trainable neurons of every epoch."


class Slot(NamedTuple):
    """A place in a recipe that takes a value: its type, the type's limits and, for a key, the key's field."""

    annotation: Any
    metadata: tuple[Any, ...]
    field: FieldInfo | None


def slot_at(path: Sequence[str | int], values: Any) -> Slot | None:
    """Return what may stand at ``path``, None if nothing; the recipe's ``values`` tell which kind of policy it has."""
    slot: Slot | None = Slot(Recipe, (), None)
    for depth, key in enumerate(path):
        model = section_at(path[:depth], values, slot)
        if model is not None:
            field = model.model_fields.get(str(key))
            slot = Slot(field.annotation, tuple(field.metadata), field) if field is not None else None
        else:
            slot = _item(slot)
    return slot


def section_at(path: Sequence[str | int], values: Any, slot: Slot | None = None) -> type[Section] | None:
    """Return the model of the section at ``path``, None where there is no section or its policy kind is unknown."""
    if tuple(path) == ("policy",):
        kind = policy_kind(values.get("policy")) if isinstance(values, Mapping) else None
        return POLICIES.get(kind) if isinstance(kind, str) else None
    slot = slot or slot_at(path, values)
    annotation = slot.annotation if slot is not None else None
    return annotation if isinstance(annotation, type) and issubclass(annotation, Section) else None


def expected(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    """Return what a value of this type is: "a whole number above 0", "true or false", "text, or null"."""
    annotation, metadata = unwrapped(annotation, metadata)
    words = [item.text for item in metadata if isinstance(item, Words)]
    if words:
        return words[0]
    if get_origin(annotation) in UNIONS:
        return _either(get_args(annotation))
    if get_origin(annotation) is Literal:
        return _one_of(get_args(annotation))
    if get_origin(annotation) is list:
        items = expected(get_args(annotation)[0])
        for single, plural in (("a number", "numbers"), ("text", "texts"), ("a section", "sections")):
            items = items.replace(single, plural)
        return ("a list of one or more " if limit(metadata, "min_length") else "a list of ") + items
    if annotation in (int, float):
        return ("a whole number" if annotation is int else "a number") + _range(metadata)
    if annotation is bool:
        return "true or false"
    return "text" if annotation is str else "a section"


def choices(annotation: Any, metadata: Sequence[Any] = ()) -> tuple[str, ...]:
    """Return the words that a key takes and a misspelt value may have meant."""
    annotation, metadata = unwrapped(annotation, metadata)
    found = [choice for item in metadata if isinstance(item, Words) for choice in item.choices]
    if get_origin(annotation) is Literal:
        found += [word for word in get_args(annotation) if isinstance(word, str)]
    if get_origin(annotation) in UNIONS:
        found += [choice for member in get_args(annotation) for choice in choices(member)]
    return tuple(found)


def examples_of(field: FieldInfo) -> list[Any]:
    """Return a key's examples, which are written as in a recipe, as values."""
    return [read_yaml(example).value if isinstance(example, str) else example for example in field.examples or ()]


def takes_bool(annotation: Any) -> bool:
    """Return whether a key takes true and false, perhaps among other values."""
    annotation, _ = unwrapped(annotation, ())
    return annotation is bool or (get_origin(annotation) in UNIONS and any(map(takes_bool, get_args(annotation))))


def shown(value: Any) -> str:
    """Return a value as a recipe would show it, cut where it is long: 'ten', true, [1, 2]."""
    text = repr(value) if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


def meaning(model: type[Section]) -> str:
    """Return what a section is, in one line."""
    return " ".join((model.__doc__ or "").split())


def _item(slot: Slot | None) -> Slot | None:
    """Return what the entries of a list are, looking through "or null"."""
    if slot is None:
        return None
    annotation, _ = unwrapped(slot.annotation, ())
    members = get_args(annotation) if get_origin(annotation) in UNIONS else (annotation,)
    for member in members:
        listed, _ = unwrapped(member, ())
        if get_origin(listed) is list:
            return Slot(get_args(listed)[0], (), None)
    return None


def unwrapped(annotation: Any, metadata: Sequence[Any]) -> tuple[Any, tuple[Any, ...]]:
    """Take the limits out of ``Annotated[type, Field(...), ...]``."""
    found = list(metadata)
    if get_origin(annotation) is Annotated:
        annotation, *extras = get_args(annotation)
        for extra in extras:
            found += extra.metadata if isinstance(extra, FieldInfo) else [extra]
    return annotation, tuple(found)


def _either(members: Sequence[Any]) -> str:
    present = [member for member in members if member is not type(None)]
    if bool in present and any(get_origin(member) is Literal for member in present):
        texts = [_one_of(["true", "false", *(choice for member in present for choice in choices(member))])]
    else:
        texts = list(dict.fromkeys(expected(member) for member in present))
    return ", or ".join(texts + ["null"] * (len(present) < len(members)))


def _one_of(words: Sequence[Any]) -> str:
    return f"one of {', '.join(map(str, words))}" if len(words) > 1 else str(words[0])


def _range(metadata: Sequence[Any]) -> str:
    above, least = limit(metadata, "gt"), limit(metadata, "ge")
    below, most = limit(metadata, "lt"), limit(metadata, "le")
    low = f"above {above:g}" if above is not None else f"from {least:g}" if least is not None else ""
    to = "at most " if above is not None else ""
    high = f"below {below}" if below is not None else f"{to}{most}" if most is not None else ""
    if not high:
        return f" {low}".rstrip() if above is not None else f" of at least {least:g}" if least is not None else ""
    return f" {low} {'and' if above is not None else 'to'} {high}"


def limit(metadata: Sequence[Any], name: str) -> Any:
    """Return a limit of a type by pydantic's name for it, such as "gt" or "pattern"; None where there is none."""
    return next((getattr(item, name) for item in metadata if getattr(item, name, None) is not None), None)
