from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from neq_cli import Freezer
from neq_cli.freezing.anatomy import anatomy_of
from neq_cli.freezing.backward.sliced import BackwardMode
from neq_cli.freezing.model.propagation import propagate
from neq_cli.freezing.model.trace import Trace

# Layers by the layers whose outputs reach them; the last one is the output layer.
CHAIN = {"a": "", "b": "a", "c": "b", "head": "c"}
RESIDUAL = {"stem": "", "one": "stem", "two": "one", "head": "stem two"}  # head(stem + two(one(stem)))
BRANCH = {"stem": "", "left": "stem", "right": "stem", "head": "left right"}
TWO_INPUTS = {"left": "", "right": "", "head": "left right"}
TWICE = {"shared": "shared", "head": "shared"}  # head(shared(shared(x)))


def trace_of(graph: dict[str, str], after_outside: str = "", outputs: str = "head") -> Trace:
    trace = Trace(order=list(graph))
    trace.before = {name: frozenset(sources.split()) for name, sources in graph.items()}
    trace.after_outside = frozenset(after_outside.split())
    trace.output_layers = frozenset(outputs.split())
    return trace


def follow(graph: dict[str, str], frozen: str = "", blocking: str = "", **trace: str) -> tuple[str, str]:
    """Return, as text in the order of ``graph``, the layers that the error reaches and those that pass it on."""
    shares = {name: 0.0 if name in frozen.split() else 0.5 for name in graph}
    found = propagate(trace_of(graph, **trace), shares, blocking.split())
    assert found.passes_on <= found.reached <= set(graph)
    return tuple(" ".join(name for name in graph if name in part) for part in (found.reached, found.passes_on))


@pytest.mark.parametrize(
    ("graph", "frozen", "reached", "passes_on"),
    [
        (CHAIN, "", "a b c head", "b c head"),  # nothing needs the input's own gradient
        (CHAIN, "a", "b c head", "c head"),  # a prefix: nothing is propagated below b
        (CHAIN, "a b c", "head", ""),
        (CHAIN, "b", "a b c head", "b c head"),  # frozen in the middle: only passes on
        (CHAIN, "b c", "a b c head", "b c head"),
        (RESIDUAL, "", "stem one two head", "one two head"),
        (RESIDUAL, "one two", "stem one two head", "one two head"),  # the stem lies below them
        (RESIDUAL, "stem", "one two head", "two head"),
        (RESIDUAL, "stem one", "two head", "head"),
        (RESIDUAL, "stem one two", "head", ""),
        (BRANCH, "stem left", "right head", "head"),  # nothing below the left branch: no error in it either
        (BRANCH, "left", "stem left right head", "left right head"),
        (TWO_INPUTS, "left", "right head", "head"),
        (TWICE, "", "shared head", "shared head"),
        (TWICE, "shared", "head", ""),
    ],
)
def test_how_far_the_error_travels(graph: dict[str, str], frozen: str, reached: str, passes_on: str) -> None:
    assert follow(graph, frozen) == (reached, passes_on)


@pytest.mark.parametrize(
    ("graph", "frozen", "outside", "reached", "passes_on"),
    [
        # A class token or position table before a: the whole chain has to pass the error on to it.
        (CHAIN, "a b c", "a", "a b c head", "a b c head"),
        (CHAIN, "a b c", "c", "c head", "c head"),
        (CHAIN, "a b c", "head", "head", "head"),  # nothing trains between it and the head
        (RESIDUAL, "stem one two", "two", "two head", "two head"),
        (BRANCH, "stem left right", "right", "right head", "right head"),
    ],
)
def test_parameters_outside_neurons_want_their_error(
    graph: dict[str, str], frozen: str, outside: str, reached: str, passes_on: str
) -> None:
    assert follow(graph, frozen, after_outside=outside) == (reached, passes_on)


@pytest.mark.parametrize(
    ("graph", "frozen", "outside", "reached", "passes_on"),
    [
        (CHAIN, "c", "", "head", ""),  # what it puts out needs no gradient, whatever trains below
        (CHAIN, "b", "", "c head", "head"),
        (CHAIN, "a b", "", "c head", "head"),
        (CHAIN, "b", "c", "c head", "c head"),  # a parameter between b and c does need one
        (RESIDUAL, "two", "", "stem head", "head"),  # past the blocked branch
        (RESIDUAL, "one two", "", "stem head", "head"),
        (RESIDUAL, "one", "", "stem two head", "head"),
        (BRANCH, "left", "", "stem right head", "right head"),
        (BRANCH, "left right", "", "head", ""),
    ],
)
def test_blocked_layers_pass_nothing_on(
    graph: dict[str, str], frozen: str, outside: str, reached: str, passes_on: str
) -> None:
    assert follow(graph, frozen, frozen, after_outside=outside) == (reached, passes_on)


def test_several_output_layers_and_layers_that_nothing_reaches() -> None:
    graph = {"body": "", "head": "body", "aux": "body", "spare": ""}
    assert follow(graph, outputs="head aux") == ("body head aux", "head aux")
    assert follow(graph, "body", outputs="head aux") == ("head aux", "")
    assert follow(graph, "head", outputs="head aux") == ("body head aux", "head aux")


# The same from a model, where autograd itself tells which outputs get a gradient and which inputs do.


class Graph(nn.Module):
    """All the shapes above in one: a residual block, a parameter outside neurons, two branches, a layer used twice."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("stem", "one", "two", "left", "right", "shared", "head"):
            self.add_module(name, nn.Linear(4, 4))
        self.token = nn.Parameter(torch.zeros(4))

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = torch.tanh(self.stem(inputs))
        hidden = hidden + self.two(torch.tanh(self.one(hidden)))
        hidden = self.left(hidden) * self.right(hidden + self.token)
        return self.head(torch.tanh(self.shared(torch.tanh(self.shared(hidden)))))


def observed(model: nn.Module) -> tuple[set[str], set[str]]:
    """Return the layers whose output gets a gradient in a backward pass, and those that give their input one."""
    reached, passes_on = set(), set()
    handles = []

    def watch(tensor: Tensor, name: str, found: set[str]) -> None:
        if tensor.requires_grad:
            tensor.register_hook(lambda _: found.add(name))

    def before(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
            own = inputs[0].clone()  # others may give the same tensor its gradient
            watch(own, name, passes_on)
            return (own,)

        return hook

    for name, layer in model.named_children():
        handles.append(layer.register_forward_pre_hook(before(name)))
        handles.append(layer.register_forward_hook(lambda _, __, output, name=name: watch(output, name, reached)))
    model(torch.randn(2, 4)).sum().backward()
    for handle in handles:
        handle.remove()
    return reached, passes_on


@pytest.mark.parametrize("token", [True, False])
@pytest.mark.parametrize(
    "frozen", ["", "stem", "stem one two", "one two", "left", "right shared", "stem one two left right shared"]
)
def test_what_autograd_does(frozen: str, token: bool) -> None:
    model = Graph()
    model.token.requires_grad_(token)
    anatomy = anatomy_of(model, torch.randn(2, 4))
    shares = {name: float(name not in frozen.split()) for name in anatomy.neurons.layers}
    found = propagate(anatomy.trace, shares)
    for name, layer in model.named_children():
        layer.requires_grad_(bool(shares[name]))
    assert (set(found.reached), set(found.passes_on)) == observed(model)


class Fixed:
    """A policy that freezes whole layers."""

    def __init__(self, frozen: str) -> None:
        self.frozen = frozen.split()

    def choose(self, observations: Any, epoch: int) -> dict[str, Tensor]:
        return {name: torch.zeros_like(observations[name].trainable) for name in self.frozen}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Any) -> None:
        pass


@pytest.mark.parametrize("mode", ["exact", "truncated"])
@pytest.mark.parametrize("frozen", ["stem", "one two", "two", "left", "right shared", "stem one two left right shared"])
def test_what_a_model_with_frozen_layers_does(frozen: str, mode: BackwardMode) -> None:
    model = Graph()
    freezer = Freezer(
        model, torch.optim.SGD(model.parameters(), lr=0.1), [torch.randn(2, 4)], Fixed(frozen), backward=mode
    )
    freezer.step()
    shares = {name: float(rows.any()) for name, rows in freezer.trainable.items()}
    found = propagate(freezer.anatomy.trace, shares, frozen.split() if mode == "truncated" else ())
    reached, passes_on = observed(model)
    assert (set(found.reached), set(found.passes_on)) == (reached, passes_on)
    assert freezer.anatomy.reached(freezer.trainable, mode) == reached
