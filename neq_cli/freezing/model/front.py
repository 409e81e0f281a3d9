"""Where the front of a network lies: layers before which nothing trains, and parameters outside neurons there."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from torch import nn

from neq_cli.freezing.model.layers import BATCH_NORMS, CONVOLUTIONS, Layer
from neq_cli.freezing.model.trace import Trace


def front_of(trace: Trace, frozen: Collection[str]) -> frozenset[str]:
    """Return those of the ``frozen`` layers that no layer's output reaches but that of others of them.

    ``frozen``: layers none of whose weights trains, fixed ones included. Branches count by the trace: a layer belongs
    to the front once every branch into it does.
    """
    front = {name for name in frozen if name in trace.elements}
    after = trace.after()
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


@dataclass(frozen=True)
class Rest:
    """What of a model runs as at inference: ``modules`` with all that is in them, none of them in another.

    ``folds``: batch normalisations, by the convolution that alone passes its output to them.
    """

    modules: tuple[nn.Module, ...] = ()
    folds: Mapping[nn.Module, nn.Module] | None = None


NO_REST = Rest()


def rest_of(
    model: nn.Module, layers: Mapping[str, Layer], trace: Trace, front: Collection[str], moving: Collection[str]
) -> Rest:
    """Return what may run as at inference where the ``front`` of these ``layers`` lies before all else.

    ``layers``: all of the model, fixed ones too. ``moving``: parameters outside neurons that train. Modules that hold
    nothing else rest, and those without parameters, such as dropout, that nothing else comes before.
    """
    modules = dict(model.named_modules())
    names = {module: name for name, module in modules.items()}
    rests: dict[str, bool] = {}  # modules with layers or moving parameters of their own; all of it is in the front
    for name, layer in layers.items():
        owner = names[layer.module]
        rests[owner] = rests.get(owner, True) and name in front
    rests |= {name.rpartition(".")[0]: False for name in moving}
    # What acts on the model's inputs lies before all layers that come first.
    first = {name for name in trace.elements if not trace.before.get(name)}
    resting: list[str] = []
    for name in modules:
        if resting and _within(name, resting[-1]):  # modules come in the order of a walk, what is inside after it
            continue
        inside = [all_of_it for owner, all_of_it in rests.items() if _within(owner, name)]
        before, parameters = trace.before_bare.get(name, (frozenset(), frozenset()))
        bare = name in trace.before_bare and (before or first) <= set(front) and not parameters & set(moving)
        if bare or (inside and all(inside)):
            resting.append(name)
    return Rest(tuple(modules[name] for name in resting), _folds(layers, trace, front))


def _within(name: str, other: str) -> bool:
    return name == other or not other or name.startswith(f"{other}.")


def _folds(layers: Mapping[str, Layer], trace: Trace, front: Collection[str]) -> dict[nn.Module, nn.Module]:
    after, found = trace.after(), {}
    for name, before in trace.direct.items():
        norm, convolution = layers[name].module, layers[before].module
        alone = after.get(before) == {name} and before not in trace.output_layers
        if {name, before} <= set(front) and alone and _folds_into(convolution, norm):
            found[convolution] = norm
    return found


def _folds_into(convolution: nn.Module, norm: nn.Module) -> bool:
    """Whether both compute what their stock classes do, and nobody looks in between."""
    hooked = any(one._forward_hooks or one._forward_pre_hooks for one in (convolution, norm))
    return (
        not hooked
        and type(convolution) in CONVOLUTIONS
        and type(norm) in BATCH_NORMS
        and getattr(norm, "running_var", None) is not None
    )
