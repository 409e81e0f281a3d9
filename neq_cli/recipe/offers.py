"""Which keys a recipe may have, and values that they take, as a shell offers them; of those only torch knows, a few."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from pydantic.fields import FieldInfo

from neq_cli.recipe.describe import choices, examples_of, takes_bool
from neq_cli.recipe.keys import Recipe
from neq_cli.recipe.policy_keys import POLICIES, policy_kind
from neq_cli.recipe.values import Section

_PLAIN = re.compile(r"[\w.,+/~-]+|\[\]|\{\}")
"""What no shell reads as more than text; other values are not offered."""


class Offer(NamedTuple):
    """A key of a recipe by its dotted name, values that it takes as they are written, and what it means."""

    key: str
    values: tuple[str, ...]
    meaning: str


def offers(recipe: Mapping[str, Any]) -> list[Offer]:
    """Return all that may be written into a recipe that has these values, which nobody has checked.

    The keys of a policy are those of its kind, of all kinds where that is unknown. Arguments that are no key of neq's,
    such as an optimiser's momentum, are offered where the recipe has them.
    """
    written = dict(_written(recipe, ()))
    found = {offer.key: offer for offer in _of_section(Recipe, recipe, written, "")}
    others = [Offer(key, _words([value]), "") for key, value in written.items() if key not in found]
    return [*found.values(), *(other for other in others if _is_argument(other.key))]


def _is_argument(key: str) -> bool:
    section, *below = key.split(".")
    return (section in ("optimizer", "scheduler") and len(below) == 1) or "kwargs" in below[:-1]


def _written(value: Any, path: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key, below in value.items():
            yield from _written(below, (*path, str(key)))
    elif path:
        yield ".".join(path), value


def _of_section(
    model: type[Section], recipe: Mapping[str, Any], written: Mapping[str, Any], prefix: str
) -> Iterator[Offer]:
    for name, field in model.model_fields.items():
        key = f"{prefix}{name}"
        if key == "policy":
            kind = policy_kind(recipe.get("policy"))
            for policy in [POLICIES[kind]] if kind in list(POLICIES) else POLICIES.values():
                yield from _of_section(policy, recipe, written, "policy.")
        elif key == "policy.kind":
            yield Offer(key, tuple(POLICIES), "which policy chooses the trainable neurons")
        elif isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from _of_section(field.annotation, recipe, written, f"{key}.")
        else:
            yield Offer(key, _values(field, written.get(key)), field.description or "")


def _values(field: FieldInfo, written: Any) -> tuple[str, ...]:
    """Return the words that a key takes; where it takes others, what is written, the default and the examples."""
    words = choices(field.annotation, field.metadata)
    if takes_bool(field.annotation):
        words = ("true", "false", *words)
    if words:
        return words
    default = [] if field.is_required() else [field.get_default(call_default_factory=True)]
    return _words([*([] if written is None else [written]), *default, *examples_of(field)])


def _words(values: list[Any]) -> tuple[str, ...]:
    words = [value if isinstance(value, str) else json.dumps(value, default=str) for value in values]
    return tuple(dict.fromkeys(word for word in words if _PLAIN.fullmatch(word)))
