from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.models import segmentation

from neq_cli.freezing.anatomy import Anatomy, anatomy_of


def on_meta(build: Callable[..., nn.Module], size: int = 64, **arguments: Any) -> Anatomy:
    # RegNet reads its widths from tensors while it is built, which the meta device does not have.
    with torch.device("cpu" if build.__name__.startswith("regnet") else "meta"):
        model = build(weights=None, **arguments)
    return anatomy_of(model.to("meta"), torch.empty(2, 3, size, size, device="meta"))


# One model per torchvision family, with the layers that produce its outputs, auxiliary ones included: read off its
# source, not off a trace.
CLASSIFIERS: dict[str, tuple[set[str], int, dict[str, Any]]] = {
    "alexnet": ({"classifier.6"}, 64, {}),
    "convnext_tiny": ({"classifier.2"}, 32, {}),
    "densenet121": ({"classifier"}, 32, {}),
    "efficientnet_b0": ({"classifier.1"}, 32, {}),
    "efficientnet_v2_s": ({"classifier.1"}, 32, {}),
    "googlenet": ({"fc", "aux1.fc2", "aux2.fc2"}, 64, {"init_weights": False}),
    "inception_v3": ({"fc", "AuxLogits.fc"}, 299, {"init_weights": False}),
    "maxvit_t": ({"classifier.5"}, 224, {}),
    "mnasnet0_5": ({"classifier.1"}, 32, {}),
    "mobilenet_v2": ({"classifier.1"}, 32, {}),
    "mobilenet_v3_small": ({"classifier.3"}, 32, {}),
    "regnet_y_400mf": ({"fc"}, 32, {}),
    "resnet18": ({"fc"}, 32, {}),
    "shufflenet_v2_x0_5": ({"fc"}, 32, {}),
    "squeezenet1_1": ({"classifier.1"}, 64, {}),  # a convolution, then ReLU and pooling
    "swin_t": ({"head"}, 32, {}),
    "swin_v2_t": ({"head"}, 32, {}),
    "vgg11": ({"classifier.6"}, 32, {}),
    "vgg11_bn": ({"classifier.6"}, 32, {}),
    "vit_b_16": ({"heads.head"}, 32, {"image_size": 32}),
    "resnext50_32x4d": ({"fc"}, 32, {}),
    "wide_resnet50_2": ({"fc"}, 32, {}),
}


def test_every_family_of_classifiers_is_covered() -> None:
    modules = {
        torchvision.models.get_model_builder(name).__module__
        for name in torchvision.models.list_models(module=torchvision.models)
    }
    assert modules == {torchvision.models.get_model_builder(name).__module__ for name in CLASSIFIERS}


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_output_layers_of_torchvision_classifiers(name: str) -> None:
    outputs, size, arguments = CLASSIFIERS[name]
    anatomy = on_meta(torchvision.models.get_model_builder(name), size, **arguments)
    assert set(anatomy.trace.output_layers) == outputs
    auxiliary = {layer for layer in anatomy.neurons.layers if layer.lower().startswith("aux")}
    # Heads that only train are not reached by the probe; nothing else is missed by it.
    assert set(anatomy.neurons.layers) - anatomy.trace.reached == auxiliary
    assert set(anatomy.never_frozen) == outputs | auxiliary


@pytest.mark.parametrize("auxiliary", [False, True])
@pytest.mark.parametrize("name", ["deeplabv3_resnet50", "fcn_resnet50"])
def test_output_layers_of_segmentation_models(name: str, auxiliary: bool) -> None:
    anatomy = on_meta(
        getattr(segmentation, name), 65, weights_backbone=None, num_classes=21, aux_loss=auxiliary or None
    )
    assert anatomy.trace.output_layers == {"classifier.4", *(["aux_classifier.4"] if auxiliary else [])}
    assert anatomy.trace.reached == set(anatomy.neurons.layers)  # also in eval mode


def test_output_layers_of_lraspp_are_two_heads_summed() -> None:
    anatomy = on_meta(segmentation.lraspp_mobilenet_v3_large, 64, weights_backbone=None, num_classes=21)
    assert anatomy.trace.output_layers == {"classifier.low_classifier", "classifier.high_classifier"}


def test_models_may_build_without_auxiliary_heads() -> None:
    anatomy = on_meta(torchvision.models.googlenet, 64, init_weights=False, aux_logits=False)
    assert anatomy.trace.output_layers == {"fc"}
    assert set(anatomy.never_frozen) == {"fc"}


# Models of one's own.


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.norm = nn.Linear(4, 5), nn.LayerNorm(5)
        self.head, self.other = nn.Linear(5, 3), nn.Linear(5, 3)
        self.scale = nn.Parameter(torch.ones(3))

    def hidden(self, inputs: Tensor) -> Tensor:
        return self.norm(torch.relu(self.body(inputs)))


@dataclass
class Answer:
    logits: Tensor
    extra: dict[str, Any]


class Pair(NamedTuple):
    first: Tensor
    second: Tensor


class Opaque:
    def __init__(self, value: Tensor) -> None:
        self.value = value


Forward = Callable[[Base, Tensor], Any]
FORMS: dict[str, tuple[Forward, set[str]]] = {
    "dictionary": (lambda net, x: {"out": net.head(net.hidden(x)), "loss": 0.0, "none": None}, {"head"}),
    "dataclass": (
        lambda net, x: Answer(net.head(net.hidden(x)), {"more": [net.other(net.hidden(x))]}),
        {"head", "other"},
    ),
    "named tuple": (lambda net, x: Pair(net.head(net.hidden(x)), net.other(net.hidden(x))), {"head", "other"}),
    "list": (lambda net, x: [net.head(net.hidden(x))], {"head"}),
    "features too": (lambda net, x: (net.head(hidden := net.hidden(x)), hidden), {"head", "norm"}),
    "argmax too": (lambda net, x: (net.head(net.hidden(x)), net.head(net.hidden(x)).argmax(1)), {"head"}),
    "sum of two heads": (lambda net, x: net.head(hidden := net.hidden(x)) + net.other(hidden), {"head", "other"}),
    "scaled": (lambda net, x: (net.head(net.hidden(x)) * net.scale).softmax(-1), {"head", "scale"}),
    "in place": (lambda net, x: net.head(net.hidden(x)).relu_().sigmoid_(), {"head"}),
    "written into": (
        lambda net, x: torch.zeros(len(x), 3).index_copy_(1, torch.arange(3), net.head(net.hidden(x))),
        {"head"},
    ),
    "head twice": (lambda net, x: net.head(net.hidden(x)) + net.head(net.hidden(-x)), {"head"}),
    "keyword": (lambda net, x: net.head(input=net.hidden(x)), {"head"}),
    "functional head": (lambda net, x: nn.functional.linear(net.hidden(x), net.head.weight, net.head.bias), {"head"}),
    # A linear layer's output on tokens may be a view.
    "overwritten": (lambda net, x: net.head(net.hidden(x[:, None])).sigmoid_(), {"head"}),
    "no gradients": (lambda net, x: torch.no_grad()(lambda: net.head(net.hidden(x)))(), {"head"}),
    "no gradients for the body": (lambda net, x: net.head(torch.no_grad()(net.hidden)(x)), {"head"}),
    "detached": (lambda net, x: net.head(net.hidden(x)).detach(), {"head"}),
    "opaque": (lambda net, x: Opaque(net.head(net.hidden(x))), {"head"}),
    "checkpointed head": (lambda net, x: checkpoint(net.head, net.hidden(x), use_reentrant=True), {"head"}),
    "checkpointed body": (lambda net, x: net.head(checkpoint(net.hidden, x, use_reentrant=True)), {"head"}),
    "new checkpoint": (
        lambda net, x: checkpoint(lambda h: net.head(net.norm(h)), net.body(x), use_reentrant=False),
        {"head"},
    ),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_output_layers_of_other_models(form: str) -> None:
    forward, outputs = FORMS[form]
    net = type("Net", (Base,), {"forward": forward})()
    assert set(anatomy_of(net, torch.randn(2, 4)).trace.output_layers) == outputs


def test_modes_with_outputs_of_their_own() -> None:
    class Modes(Base):
        def forward(self, inputs: Tensor) -> Any:
            hidden = self.hidden(inputs)
            return (self.head(hidden), self.other(hidden)) if self.training else self.head(hidden)

    anatomy = anatomy_of(Modes(), torch.randn(2, 4))
    assert anatomy.trace.output_layers == {"head", "other"}
    assert anatomy.trace.reached == {"body", "norm", "head"}


def test_a_model_whose_training_mode_wants_targets_is_traced_in_eval_mode() -> None:
    class Targets(Base):
        def forward(self, inputs: Tensor, targets: Tensor | None = None) -> Tensor:
            logits = self.head(self.hidden(inputs))
            return nn.functional.cross_entropy(logits, targets) if self.training else logits

    anatomy = anatomy_of(Targets(), torch.randn(2, 4))
    assert anatomy.trace.output_layers == {"head"}
    assert anatomy.trace.order == ["body", "norm", "head"]


def test_a_model_that_takes_several_inputs_in_a_dictionary() -> None:
    class Two(Base):
        def forward(self, inputs: dict[str, Tensor]) -> Tensor:
            return self.head(self.hidden(inputs["a"] + inputs["b"]))

    anatomy = anatomy_of(Two(), {"a": torch.randn(2, 4), "b": torch.randn(2, 4)})
    assert anatomy.trace.output_layers == {"head"}


def test_layers_come_in_forward_order() -> None:
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unused, self.last, self.middle, self.first = (nn.Linear(3, 3) for _ in range(4))

        def forward(self, inputs: Tensor) -> Tensor:
            return self.last(self.middle(self.first(inputs)))

    assert list(anatomy_of(Backwards(), torch.randn(2, 3)).neurons.layers) == ["first", "middle", "last", "unused"]


def test_what_is_overwritten_still_comes_from_its_layer() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 2))
    trace = anatomy_of(net, torch.randn(2, 5, 4)).trace
    assert trace.before == {"0": frozenset(), "2": {"0"}, "4": {"2"}}


def test_norms_that_need_more_than_one_sample_and_dropout_do_not_disturb() -> None:
    class Delicate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.norm, self.head = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)

        def forward(self, inputs: Tensor) -> Tensor:
            return self.head(nn.functional.dropout(self.norm(self.body(inputs)), 0.5, self.training))

    net = Delicate()
    state, statistics = torch.get_rng_state(), net.norm.running_mean.clone()
    anatomy = anatomy_of(net, torch.randn(2, 3, generator=torch.Generator().manual_seed(1)))
    assert anatomy.trace.output_layers == {"head"}
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(statistics, net.norm.running_mean)
    assert net.training


# Where an input gradient is needed.


def test_input_gradients_start_behind_the_first_parameter_that_trains() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Linear(4, 2))
    assert anatomy_of(net, torch.randn(1, 4)).trace.input_gradient == {"0": False, "2": True, "3": True}
    net[0].requires_grad_(False)
    assert anatomy_of(net, torch.randn(1, 4)).trace.input_gradient == {"0": False, "2": False, "3": True}


# Which layers come before which, and where a weight is used.


class Wired(nn.Module):
    """A residual connection, a token from outside neurons, attention, and one weight that is used in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.token, self.norm = nn.Parameter(torch.zeros(4)), nn.LayerNorm(4)
        self.attention, self.lent, self.head = nn.MultiheadAttention(4, 2), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.stem(inputs)
        hidden = hidden + self.two(torch.tanh(self.one(hidden)))
        hidden = self.norm(hidden + self.token)
        hidden = self.attention(hidden, hidden, hidden)[0]
        hidden = nn.functional.linear(torch.tanh(self.lent(hidden)), self.lent.weight)
        return self.head(hidden)


def test_sources_and_users_of_layers() -> None:
    trace = anatomy_of(Wired(), torch.randn(1, 3, 4)).trace
    assert {name: set(sources) for name, sources in trace.before.items()} == {
        "stem": set(),
        "one": {"stem"},
        "two": {"one"},
        "norm": {"stem", "two"},
        "attention.in_proj": {"norm"},
        "attention.out_proj": {"attention.in_proj"},
        "lent": {"attention.out_proj", "lent"},
        "head": {"lent"},
    }
    assert trace.after_outside == {"norm"}
    assert {name: set(users) for name, users in trace.users.items()} == {
        **{name: {name} for name in ("stem", "one", "two", "norm", "head")},
        "attention.in_proj": {"attention"},
        "attention.out_proj": {"attention"},
        "lent": {"lent", ""},
    }


def test_functional_weights_and_layers_that_cannot_be_sliced() -> None:
    anatomy = anatomy_of(Wired(), torch.randn(1, 3, 4))
    assert anatomy.functional == {"attention.in_proj": "attention", "attention.out_proj": "attention"}
    assert set(anatomy.dense_because) == {"norm"}
    functional_only = type("Net", (Base,), {"forward": FORMS["functional head"][0]})()
    assert anatomy_of(functional_only, torch.randn(2, 4)).functional == {"head": ""}


def test_products_without_a_layer_are_counted_with_the_layer_called_before() -> None:
    class Products(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.head = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2)
            self.table = nn.Parameter(torch.ones(4, 4))

        def forward(self, inputs: Tensor) -> Tensor:
            hidden = self.first(inputs @ self.table.cumsum(0))  # [5, 4] by [4, 4]: the table's gradient only
            hidden = self.second(hidden)
            return self.head(hidden @ (hidden.transpose(-1, -2) @ hidden))  # two products, with both gradients each

    trace = anatomy_of(Products(), torch.randn(1, 5, 4)).trace
    assert trace.products == {"": 5 * 4 * 4, "second": 2 * (6 * 5 * 6) + 2 * (5 * 6 * 6)}
