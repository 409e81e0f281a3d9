"""The error is followed back through a traced model: which layers it reaches and which pass it on."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from neq_cli.freezing.model.trace import Trace


@dataclass(frozen=True)
class Propagation:
    """``reached``: layers whose output gets a gradient; ``passes_on``: those of them whose input needs one too."""

    reached: frozenset[str]
    passes_on: frozenset[str]


def propagate(
    trace: Trace, shares: Mapping[str, float], blocking: Collection[str] = (), still: Collection[str] = ()
) -> Propagation:
    """Follow the error from the output layers down to the trainable parameter nearest the input.

    ``shares`` are those of each layer's trainable neurons; layers in ``blocking`` pass no error on, and their outputs
    need none. Parameters outside neurons train but for those in ``still``. A layer called several times counts as one,
    which needs what any of its calls needs.
    """
    needed = _needing_gradients(trace, shares, blocking, still)  # layers whose input depends on something that trains
    worthwhile = needed | {name for name, share in shares.items() if share > 0}
    reached: set[str] = set()
    pending = [name for name in trace.output_layers if name in worthwhile]
    while pending:
        name = pending.pop()
        if name not in reached and name not in blocking:
            reached.add(name)
            pending.extend(source for source in trace.before.get(name, ()) if source in worthwhile)
    return Propagation(frozenset(reached), frozenset(reached & needed))


def parameters_reached(trace: Trace, blocking: Collection[str]) -> frozenset[str]:
    """Return the parameters, in layers or not, that an error reaches where layers in ``blocking`` pass none on."""
    reached = set(trace.parameters_after)
    pending, seen = list(trace.output_layers), set[str]()
    while pending:
        name = pending.pop()
        if name in seen:
            continue
        seen.add(name)
        reached |= trace.parameters_inside.get(name, frozenset())
        if name not in blocking:
            reached |= trace.parameters_before.get(name, frozenset())
            pending.extend(trace.before.get(name, ()))
    return frozenset(reached)


def _needing_gradients(
    trace: Trace, shares: Mapping[str, float], blocking: Collection[str], still: Collection[str]
) -> set[str]:
    needed = {
        name
        for name in trace.after_outside
        if not (parameters := trace.parameters_before.get(name)) or not parameters <= set(still)
    }
    after = trace.after()
    pending = [*needed, *(name for name, share in shares.items() if share > 0)]
    seen: set[str] = set()
    while pending:
        name = pending.pop()
        if name not in seen and name not in blocking:
            seen.add(name)
            needed.update(after.get(name, ()))
            pending.extend(after.get(name, ()))
    return needed
