from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from neq_cli.freezing.anatomy import Anatomy, study
from neq_cli.freezing.propagation import propagate
from neq_cli.freezing.trace import Trace

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
    ("graph", "frozen", "blocking", "reached", "passes_on"),
    [
        (CHAIN, "c", "c", "head", "head"),  # the head computes an input gradient, which c takes no notice of
        (CHAIN, "b", "b", "c head", "c head"),
        (CHAIN, "a b", "a b", "c head", "head"),  # nothing trains below c
        (RESIDUAL, "two", "two", "stem head", "head"),  # past the blocked branch
        (RESIDUAL, "one two", "one two", "stem head", "head"),
        (BRANCH, "left", "left", "stem right head", "right head"),
        (BRANCH, "left right", "left right", "head", "head"),
    ],
)
def test_blocked_layers_pass_nothing_on(
    graph: dict[str, str], frozen: str, blocking: str, reached: str, passes_on: str
) -> None:
    # Autograd does as much: an input gradient is computed wherever something trains below, were it only behind a
    # blocked layer. There it knows that nothing does, since that layer's output needs no gradient.
    found = follow(graph, frozen, blocking)
    assert found[0] == reached


def test_several_output_layers_and_layers_that_nothing_reaches() -> None:
    graph = {"body": "", "head": "body", "aux": "body", "spare": ""}
    assert follow(graph, outputs="head aux") == ("body head aux", "head aux")
    assert follow(graph, "body", outputs="head aux") == ("head aux", "")
    assert follow(graph, "head", outputs="head aux") == ("body head aux", "head aux")


# The same from models, where autograd itself tells which outputs get a gradient and which layers pass one on.


class Graph(nn.Module):
    """All the shapes above in one: a class token, a residual block, two branches, one layer used twice."""

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


FROZEN_IN_GRAPH = ["", "stem", "stem one two", "one two", "left", "right shared", "stem one two left right shared"]


def observed(model: nn.Module, anatomy: Anatomy, frozen: set[str]) -> tuple[set[str], set[str]]:
    """Return the layers whose output gets a gradient and whose input does, by hooks, with weights of ``frozen`` fixed."""
    reached, passes_on = set(), set()
    handles = []
    for name, layer in anatomy.neurons.layers.items():
        layer.module.requires_grad_(name not in frozen)

        def note(module: nn.Module, inputs: Any, output: Tensor, name: str = name) -> None:
            if inputs[0].requires_grad:
                passes_on.add(name)
            if output.requires_grad:
                output.register_hook(lambda _: reached.add(name))

        handles.append(layer.module.register_forward_hook(note))
    model(torch.randn(2, 4)).sum().backward()
    for handle in handles:
        handle.remove()
    model.requires_grad_(True)
    return reached, passes_on & reached


@pytest.mark.parametrize("frozen", FROZEN_IN_GRAPH)
@pytest.mark.parametrize("token", [True, False])
def test_what_autograd_does(frozen: str, token: bool) -> None:
    model = Graph()
    if not token:
        model.token.requires_grad_(False)
    anatomy = study(model, torch.randn(2, 4))
    shares = {name: float(name not in frozen.split()) for name in anatomy.neurons.layers}
    found = propagate(anatomy.trace, shares)
    model.requires_grad_(True)
    names = set(frozen.split())
    # The token stays as it is: only layers are fixed and freed in between.
    model.token.requires_grad_(token)
    model_hooks = observed_without_token(model, anatomy, names, token)
    assert (set(found.reached), set(found.passes_on)) == model_hooks


def observed_without_token(
    model: Graph, anatomy: Anatomy, frozen: set[str], token: bool
) -> tuple[set[str], set[str]]:
    model.token.requires_grad_(token)
    return observed(model, anatomy, frozen)
