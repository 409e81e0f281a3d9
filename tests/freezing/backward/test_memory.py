"""What autograd keeps for the backward pass, and how far the graph reaches, while neurons are frozen."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.vision_transformer import VisionTransformer

from neq_cli import Freezer
from neq_cli.freezing.backward.dispatch import Dispatch, Kernel, KernelChoice
from neq_cli.freezing.backward.sliced import BackwardMode


class Frozen:
    """A policy that freezes whole layers, chosen by name."""

    def __init__(self, chosen: Callable[[str], bool]) -> None:
        self.chosen = chosen

    def choose(self, observations: Mapping[str, Any], epoch: int) -> Mapping[str, Tensor]:
        return {name: torch.zeros_like(seen.trainable) for name, seen in observations.items() if self.chosen(name)}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Any) -> None:
        pass


class Sliced(Dispatch):
    def choose(self, kind: str, kernels: Sequence[Kernel], run: Callable[[Kernel], object], *_: Any) -> KernelChoice:
        return KernelChoice("sliced", {})


def freeze(model: nn.Module, inputs: Tensor, chosen: Callable[[str], bool], mode: BackwardMode = "exact") -> Freezer:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    freezer = Freezer(model, optimizer, [inputs], Frozen(chosen), backward=mode, dispatch=Sliced())
    freezer.step()
    return freezer


def kept_by(run: Callable[[], Tensor]) -> tuple[int, Tensor]:
    """Return the bytes of all tensors kept for the backward pass, a piece of memory counted once, and the output."""
    sizes: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # the very tensor would hold itself where a node saves its output

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = run()
    return sum(sizes.values()), output


def bytes_of(*tensors: Tensor) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.second = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3)
        self.third, self.head = nn.Conv2d(8, 16, 3), nn.Linear(16, 4)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.third(self.second(self.norm(self.stem(images))))
        self.features = hidden.mean((2, 3))
        return self.head(self.features)


IMAGES = (5, 3, 12, 12)


@pytest.mark.parametrize("mode", ["exact", "truncated"])
def test_with_everything_frozen_nothing_is_kept_below_the_output_layer(mode: BackwardMode) -> None:
    model, images = Net(), torch.randn(IMAGES)
    freeze(model, images, lambda name: name != "head", mode)
    kept, output = kept_by(lambda: model(images))
    assert model.features.grad_fn is None
    assert not model.features.requires_grad
    assert kept == bytes_of(model.features)  # for the head's weight gradient
    output.sum().backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is not None] == [
        "head.weight", "head.bias"
    ]  # fmt: skip


def test_nothing_is_propagated_below_the_trainable_layer_nearest_the_input() -> None:
    model, images = Net(), torch.randn(IMAGES)
    seen: dict[str, bool] = {}
    for name, layer in model.named_children():
        layer.register_forward_hook(lambda _, inputs, output, name=name: seen.update({name: inputs[0].requires_grad}))
    freezer = freeze(model, images, lambda name: name in ("stem", "norm"))
    kept, output = kept_by(lambda: model(images))
    assert seen == {"stem": False, "norm": False, "second": False, "third": True, "head": True}
    hidden = 4 * 5 * 8 * (10 * 10 + 8 * 8)  # the inputs of second and third
    weights = bytes_of(model.second.weight, model.third.weight, model.head.weight)
    assert kept == hidden + weights + bytes_of(model.features)
    freezer.policy = Frozen(lambda name: name == "third")  # in the middle: passes on, and keeps no input
    freezer.step()
    kept_third, _ = kept_by(lambda: model(images))
    freezer.policy = Frozen(lambda name: False)
    freezer.step()
    whole, _ = kept_by(lambda: model(images))
    assert whole - kept_third == 4 * 5 * 8 * 8 * 8
    del output


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: nn.Conv1d(6, 10, 3, padding=1), (4, 6, 9)),
        (lambda: nn.Conv2d(6, 10, 3, stride=2, padding=1), (4, 6, 9, 9)),
        (lambda: nn.Conv2d(6, 12, 3, groups=6), (4, 6, 9, 9)),
        (lambda: nn.Conv3d(6, 10, 2), (2, 6, 4, 5, 4)),
        (lambda: nn.ConvTranspose2d(6, 10, 3, stride=2), (4, 6, 5, 5)),
        (lambda: nn.Linear(6, 10), (4, 7, 6)),
    ],
)
def test_a_wholly_frozen_layer_keeps_its_weight_only(make: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = make(), nn.Linear(1, 1)

        def forward(self, inputs: Tensor) -> Tensor:
            return self.head(self.layer(inputs).flatten(1).mean(1, keepdim=True))

    model, inputs = Wrapped(), torch.randn(shape, requires_grad=True)
    dense, _ = kept_by(lambda: model.layer(inputs))
    assert dense == bytes_of(inputs, model.layer.weight)
    freeze(model, inputs.detach(), lambda name: name == "layer")
    kept, output = kept_by(lambda: model.layer(inputs))
    assert kept == bytes_of(model.layer.weight)
    assert output.requires_grad
    kept, output = kept_by(lambda: model.layer(inputs.detach()))
    assert kept == 0
    assert not output.requires_grad


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d])
def test_a_wholly_frozen_batch_norm_in_eval_mode_keeps_no_input(kind: type[nn.Module]) -> None:
    dimensions = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d).index(kind) + 1
    inputs = torch.randn(6, 5, *[3] * dimensions)
    model = nn.Sequential(kind(5), nn.Flatten(), nn.Linear(5 * 3**dimensions, 2))
    freeze(model, inputs, lambda name: name == "0")
    given = inputs.clone().requires_grad_()
    model.eval()
    kept, output = kept_by(lambda: model[0](given))
    assert kept == 4 * 5  # one scale per channel
    assert output.requires_grad
    model.train()
    kept, _ = kept_by(lambda: model[0](given))
    assert kept >= bytes_of(given)  # by the statistics of the batch, the derivative depends on it
    assert kept_by(lambda: model[0](inputs))[0] == 0


@pytest.mark.parametrize("mode", ["exact", "truncated"])
def test_a_transformer_keeps_no_token_for_frozen_layers(mode: BackwardMode) -> None:
    """Its class token and position table lie outside neurons and always train: the error comes down to them, in
    truncated mode past the layers."""
    images = torch.randn(2, 3, 16, 16)
    sizes = {}
    for frozen in (False, True):
        torch.manual_seed(0)
        model = VisionTransformer(16, 4, 2, 2, 12, 24, num_classes=5)
        freeze(model, images, lambda name: frozen and not name.startswith("heads"), mode)  # noqa: B023
        sizes[frozen], output = kept_by(lambda: model(images))  # noqa: B023
        output.sum().backward()
        assert model.class_token.grad is not None
        assert model.encoder.pos_embedding.grad is not None
        if frozen:
            trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
            assert trained == {"class_token", "encoder.pos_embedding", "heads.head.weight", "heads.head.bias"}
    # Two blocks' tokens, 17 of 12 numbers for 2 images: before in_proj, out_proj and the first linear layer of each
    # block, and 24 before the second one; not counting what the attention itself keeps.
    tokens = 4 * 2 * 17 * 12
    assert sizes[False] - sizes[True] >= 2 * (3 * tokens + 2 * tokens)


def test_a_partly_frozen_layer_keeps_no_more_than_a_stock_one() -> None:
    model, images = Net(), torch.randn(IMAGES)
    stock, _ = kept_by(lambda: model(images))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    class Half(Frozen):
        def choose(self, observations: Mapping[str, Any], epoch: int) -> Mapping[str, Tensor]:
            return {name: torch.arange(len(seen.trainable)) % 2 == 0 for name, seen in observations.items()}

    for mode in ("exact", "truncated"):
        freezer = Freezer(model, optimizer, [images], Half(bool), backward=mode, dispatch=Sliced())
        freezer.step()
        assert kept_by(lambda: model(images))[0] == stock
        freezer.detach()
    assert kept_by(lambda: model(images))[0] == stock
