"""Reads and writes YAML as recipes use it: plain values and the line of every key; no aliases, tags or repeated keys.

On PyYAML's nodes and marks, not ruamel.yaml: by its YAML 1.2, ``yes`` and ``on`` in recipes of today would become text,
and the plain sentences for what is no YAML would have to be written all the same.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import yaml

KeyPath = tuple[str | int, ...]

_PREFIX = "tag:yaml.org,2002:"
_DEEPEST = 30
# Unlike PyYAML: `1e-3` is a number, dates are text, and `010` or `1:30`, which YAML 1.1 reads as 8 and 90, are text.
_PLAIN_SCALARS = (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"yes|Yes|YES|no|No|NO|true|True|TRUE|false|False|FALSE|on|On|ON|off|Off|OFF", list("yYnNtTfFoO")),
    ("int", r"[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F_]+)", list("-+0123456789")),
    (
        "float",
        r"[-+]?(?:(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?|[0-9][0-9_]*[eE][-+]?[0-9]+|\.(?:inf|Inf|INF))"
        r"|\.(?:nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
)


class YamlSyntaxError(Exception):
    """Text that is not YAML at all, or YAML that recipes refuse: ``line`` from 1 and a message of one line."""

    def __init__(self, line: int, message: str) -> None:
        self.line = line
        self.message = message
        super().__init__(f"{line}: {message}")


@dataclass
class YamlText:
    """What a text says: plain values, the line (from 1) of every key and list entry, and what is wrong in between."""

    value: Any = None
    lines: dict[KeyPath, int] = field(default_factory=dict)
    problems: list[tuple[int, KeyPath, str]] = field(default_factory=list)


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012
    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        if event.anchor is not None:
            problem = "scanning an alias" if isinstance(event, yaml.AliasEvent) else "scanning an anchor"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)
        if self.depth >= _DEEPEST:
            raise yaml.MarkedYAMLError(problem="nested too deeply", problem_mark=event.start_mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_sequence(self, tag: str, sequence: Any, flow_style: bool | None = None) -> yaml.SequenceNode:
        return super().represent_sequence(tag, sequence, flow_style=True)

    def represent_str(self, data: str) -> yaml.ScalarNode:
        # Left to itself, PyYAML writes some keys with unusual line breaks in a way that it reads as blanks.
        return self.represent_scalar(_PREFIX + "str", data, style=None if data.isprintable() else '"')


_Dumper.add_representer(str, _Dumper.represent_str)


for _name, _pattern, _first in _PLAIN_SCALARS:
    _Loader.add_implicit_resolver(_PREFIX + _name, re.compile(rf"^(?:{_pattern})$"), _first)
    # The writer quotes text that either reading of YAML, PyYAML's or ours, would take for something else.
    _Dumper.add_implicit_resolver(_PREFIX + _name, re.compile(rf"^(?:{_pattern})$"), _first)


def read_yaml(text: str) -> YamlText:
    """Read one YAML document; an empty one has the value None and no lines. Raise ``YamlSyntaxError``."""
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise YamlSyntaxError(line, f"the character U+{error.character:04X} is not allowed; remove it") from None
    except yaml.MarkedYAMLError as error:
        raise _plain_error(error, text) from None
    read = YamlText()
    if node is not None:
        read.lines[()] = node.start_mark.line + 1
        read.value = _value(node, (), read, loader)
    return read


def write_yaml(value: Any) -> str:
    """Return YAML, its lists in one line each, that ``read_yaml`` and PyYAML's safe loader read as an equal value."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, default_flow_style=False, allow_unicode=True, width=4096)


def _value(node: yaml.Node, path: KeyPath, read: YamlText, loader: _Loader) -> Any:
    if isinstance(node, yaml.MappingNode) and node.tag == _PREFIX + "map":
        return {key: _value(child, (*path, key), read, loader) for key, child in _entries(node, path, read)}
    if isinstance(node, yaml.SequenceNode) and node.tag == _PREFIX + "seq":
        for index, child in enumerate(node.value):
            child_path = (*path, index)
            read.lines[child_path] = child.start_mark.line + 1
        return [_value(child, (*path, index), read, loader) for index, child in enumerate(node.value)]
    line = read.lines[path]
    if not isinstance(node, yaml.ScalarNode) or node.tag not in _SCALARS:
        tag = node.tag.replace(_PREFIX, "!!")
        read.problems.append((line, path, f"the tag {tag} is not allowed; write the value without it"))
        return None
    try:
        return _SCALARS[node.tag](loader, node)
    except (ValueError, KeyError):  # `!!int abc`, or more digits than Python reads
        kind = node.tag.removeprefix(_PREFIX)
        read.problems.append((line, path, f"cannot be read as {kind}; write a plain, shorter value"))
        return None


_SCALARS: dict[str, Callable[[_Loader, Any], Any]] = {
    _PREFIX + "null": _Loader.construct_yaml_null,
    _PREFIX + "bool": _Loader.construct_yaml_bool,
    _PREFIX + "int": _Loader.construct_yaml_int,
    _PREFIX + "float": _Loader.construct_yaml_float,
    _PREFIX + "str": _Loader.construct_yaml_str,
}


def _entries(node: yaml.MappingNode, path: KeyPath, read: YamlText) -> Iterator[tuple[str, yaml.Node]]:
    """Yield the keys of a section with their values, noting keys that are not text or are given twice."""
    for key_node, child in node.value:
        line = key_node.start_mark.line + 1
        if key_node.tag != _PREFIX + "str" or not isinstance(key_node, yaml.ScalarNode):
            shown = (
                f"key {key_node.value}" if isinstance(key_node, yaml.ScalarNode) else "a key that is a list or section"
            )
            read.problems.append((line, path, f"{shown} is not text; put it in quotes"))
            continue
        key_path = (*path, key_node.value)
        if key_path in read.lines:
            message = f"given twice, first in line {read.lines[key_path]}; remove one"
            read.problems.append((line, key_path, message))
            continue
        read.lines[key_path] = line
        yield key_node.value, child


def _plain_error(error: yaml.MarkedYAMLError, text: str) -> YamlSyntaxError:
    """Say in plain words what PyYAML says in its parser's; the line is the one to mend."""
    problem, context = error.problem or "", error.context or ""
    mark = error.problem_mark
    if "quoted scalar" in context or "flow" in context:
        mark = error.context_mark or mark  # where the quote or bracket opens, not where the text ends
    lines = text.splitlines()
    line = min(mark.line + 1, max(1, len(lines))) if mark is not None else 1
    here = lines[line - 1] if line <= len(lines) else ""
    indent = here[: len(here) - len(here.lstrip())]
    if "\t" in indent:
        return YamlSyntaxError(line, "a tab in the indentation; use spaces")
    for part, message in _SYNTAX:
        if part in problem or part in context:
            return YamlSyntaxError(line, message)
    return YamlSyntaxError(line, f"not valid YAML: {problem or context}")


# Parts of PyYAML's messages, the first that fits counts, and what the user has to know.
_SYNTAX = (
    ("scanning an alias", "*name is not allowed; put text that begins with * in quotes: '*.bias'"),
    ("scanning an anchor", "&name is not allowed; put text that begins with & in quotes"),
    ("nested too deeply", f"nested more than {_DEEPEST} levels deep; flatten it"),
    ("another document", "a second document; remove everything from the line ---"),
    ("expected a single document", "a second document; remove everything from the line ---"),
    ("<document start>", "text after the end of the document; remove it"),
    (
        "mapping values are not allowed",
        "a ':' that does not fit here; mend the indentation, or put text with ': ' in quotes",
    ),
    ("could not find expected ':'", "a line that is not KEY: VALUE; add the ':' or mend the indentation"),
    ("escape character", "a backslash in double quotes; use single quotes"),
    ("quoted scalar", "a quote that is not closed; close it"),
    ("flow sequence", "a [ that is not closed; close it with ]"),
    ("flow mapping", "a { that is not closed; close it with }"),
    ("<block end>", "indentation that does not fit the lines above; align it with its section"),
    ("but found '<stream end>'", "a [ or { that is not closed; close it"),
    ("expected the node content", "a value that begins with a reserved character; put it in quotes"),
    ("cannot start any token", "a value that begins with a reserved character; put it in quotes"),
)
