"""Where the front of a network lies: layers before which nothing trains, and parameters outside neurons there."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from neq_cli.freezing.model.trace import Trace


def front_of(trace: Trace, frozen: Collection[str]) -> frozenset[str]:
    """Return those of the ``frozen`` layers that no layer's output reaches but that of others of them.

    ``frozen``: layers none of whose weights trains, fixed ones included. Branches count by the trace: a layer belongs
    to the front once every branch into it does.
    """
    front = {name for name in frozen if name in trace.elements}
    after: dict[str, list[str]] = {}
    for name, sources in trace.before.items():
        for source in sources:
            after.setdefault(source, []).append(name)
    pending = [name for name in trace.elements if name not in front]
    while pending:
        for name in after.get(pending.pop(), ()):
            if name in front:
                front.remove(name)
                pending.append(name)
    return frozenset(front)


def outside_of(trace: Trace, outside: Iterable[str], front: Collection[str]) -> frozenset[str]:
    """Return the parameters ``outside`` neurons whose first use, in forward order, is by a layer of the ``front``.

    A transformer's class token and position table are such: while they train, errors go all the way down to them.
    Later layers have them, too, by the additions around each block; the first one tells where they lie.
    """
    first: dict[str, str] = {}
    for layer in trace.elements:
        for name in trace.parameters_before.get(layer, frozenset()) | trace.parameters_inside.get(layer, frozenset()):
            first.setdefault(name, layer)
    return frozenset(name for name in outside if first.get(name) in front)
