"""Holds a recipe as written: its values, and where each stands in the file or on the command line; validates nothing.

By hand, for the place of a value must survive overrides, which no YAML library's marks know of.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

from neq_cli.recipe.optimizer_keys import SchedulerSection
from neq_cli.recipe.policy_keys import POLICIES
from neq_cli.recipe.yaml import KeyPath, YamlSyntaxError, read_yaml


class Given(str):
    """``KEY=VALUE`` that was ``written`` in another way, such as "--device cuda"."""

    __slots__ = ("written",)
    written: str

    def __new__(cls, text: str, written: str) -> Given:
        """Return ``text``, which knows how it was written."""
        given = super().__new__(cls, text)
        given.written = written
        return given

    def __reduce__(self) -> tuple[type[Given], tuple[str, str]]:  # jobs of a cluster are pickled
        return type(self), (str(self), self.written)


@dataclass(frozen=True, eq=False)
class Override:
    """``KEY=VALUE`` from the command line: where it was written as ``text``, and which one it is, from 0."""

    text: str
    order: int
    path: KeyPath = ()
    value: Any = None


Place = int | Override  # a line of the file, from 1, or what took its place
Located = tuple[Place, KeyPath, str]  # a problem: where, with which key, and the sentence
_NOWHERE = object()


@dataclass
class Document:
    """The values of a recipe, where each was written, and what reading and overriding found wrong."""

    values: dict[str, Any] = field(default_factory=dict)
    places: dict[KeyPath, Place] = field(default_factory=dict)
    problems: list[Located] = field(default_factory=list)

    def place(self, path: KeyPath, others: Iterable[KeyPath] = ()) -> Place:
        """Return where ``path`` was written; for a key that was not, where the section that misses it was.

        Of a section the part that was changed on the command line is to blame, though the rest stands in the file: of
        several such changes all. So it is with ``others``, where the problem is with these keys, one beside the other;
        where none of them was changed there, the first that is written.
        """
        keys = [self.written(key) for key in others] or [self.written(path)]
        below = (place for written, place in self.places.items() if any(_is_in(written, key) for key in keys))
        changes = sorted({place for place in below if isinstance(place, Override)}, key=lambda change: change.order)
        if changes:
            texts = " ".join(change.text for change in changes)
            return Override(texts, changes[0].order) if len(changes) > 1 else changes[0]
        known = [key for key in keys if key in self.places] or [self.written(path)]
        return next((self.places[part] for part in _upward(known[0]) if part in self.places), 1)

    def written(self, path: KeyPath) -> KeyPath:
        """Return ``path`` as its keys are written: an entry of a list by its number."""
        found: KeyPath = ()
        value: Any = self.values
        for key in path:
            key = int(key) if isinstance(value, list) and str(key).isdecimal() else key
            value = _inside(value, key)
            found = (*found, key)
        return found

    def has(self, path: KeyPath) -> bool:
        """Whether ``path`` is written anywhere, be it as null."""
        value: Any = self.values
        for key in self.written(path):
            value = _inside(value, key)
        return value is not _NOWHERE

    def override(self, texts: Iterable[str]) -> None:
        """Put the values of ``KEY=VALUE`` texts in place, in their order: the last of several for one key counts."""
        overrides = [override for order, text in enumerate(texts) if (override := self._read(text, order)) is not None]
        for earlier, later in combinations(overrides, 2):
            if earlier.path != later.path and earlier.path[: len(later.path)] == later.path:
                key = ".".join(map(str, later.path))
                self.problems.append((earlier, earlier.path, f"is replaced by the {key}=... after it; write it last"))
        for override in {override.path: override for override in overrides}.values():
            self._make_room(override)
        for override in overrides:
            self._set(override)

    def _read(self, text: str, order: int) -> Override | None:
        place = text.written if isinstance(text, Given) else text
        key, equals, written = text.partition("=")
        path = tuple(key.split("."))
        if not equals or not all(path):
            self.problems.append((Override(place, order, path), path, "not KEY=VALUE, such as policy.epsilon=0.005"))
            return None
        try:
            read = read_yaml(written)
        except YamlSyntaxError as error:
            self.problems.append((Override(place, order, path), path, error.message))
            return None
        override = Override(place, order, path, read.value)
        self.problems += [(override, (*path, *below), message) for _, below, message in read.problems]
        return override

    def _make_room(self, override: Override) -> None:
        """Drop those keys of the file that mean nothing beside ``override``, as whoever writes it expects.

        Another policy kind drops the former kind's keys, another scheduler its arguments, and an entrypoint the name
        in its place, or the reverse. An optimiser's arguments stay: most hold for others too, and a weight decay
        that goes in silence makes another experiment.
        """
        section, key = override.path[0], override.path[-1]
        written = self.values.get(str(section))
        if not isinstance(written, dict) or len(override.path) != 2 or key not in ("name", "kind", "entrypoint"):
            return
        dropped: set[str] = set()
        if override.path == ("policy", "kind") and override.value in list(POLICIES):
            known = {name for model in POLICIES.values() for name in model.model_fields}
            dropped = known - set(POLICIES[override.value].model_fields)
        elif override.path == ("scheduler", "name") and override.value != written.get("name"):
            dropped = set(written) - set(SchedulerSection.model_fields)
        elif section in ("model", "data") and override.value is not None:
            dropped = {"name", "entrypoint"} - {str(key)}
        for name in dropped & set(written):
            del written[name]
            self._forget((section, name))
        self.places[(section,)] = override  # what the section now misses, it misses because of this

    def _set(self, override: Override) -> None:
        container: Any = self.values
        path: KeyPath = ()
        for name in override.path:
            indices = {str(index): index for index in range(len(container))} if isinstance(container, list) else {}
            if not isinstance(container, dict) and name not in indices:
                what = f"a list of {len(container)}, counted from 0" if isinstance(container, list) else "not a section"
                self.problems.append((override, override.path, f"{'.'.join(map(str, path))} is {what}"))
                return
            key = indices.get(str(name), name)
            path = (*path, key)
            if len(path) == len(override.path):
                container[key] = override.value
                self._forget(path)
                self.places[path] = override
            elif isinstance(container, dict) and container.get(key) is None:
                container[key] = {}
                self.places[path] = override
            container = container[key]

    def _forget(self, path: KeyPath) -> None:
        self.places = {other: place for other, place in self.places.items() if other[: len(path)] != path}


def _upward(path: KeyPath) -> Iterator[KeyPath]:
    """Yield ``path`` and the sections that it lies in, the nearest first."""
    return (path[:length] for length in range(len(path), -1, -1))


def _is_in(path: KeyPath, section: KeyPath) -> bool:
    """Whether ``path`` is ``section``, or a key in it; all that there is, the whole recipe, is no section."""
    return bool(section) and path[: len(section)] == section


def _inside(value: Any, key: str | int) -> Any:
    there = key in value if isinstance(value, dict) else isinstance(value, list) and key in range(len(value))
    return value[key] if there else _NOWHERE
