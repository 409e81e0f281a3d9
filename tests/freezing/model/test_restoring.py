"""A model is found again as it was before it was looked at, whatever its modules do in ``train`` and ``eval``."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from bits import everything
from torch import Tensor, nn

from neq_cli import Baseline, Freezer
from neq_cli.freezing.model.observing import undisturbed


class Merging(nn.Linear):
    """A weight with a low-rank part beside it, which is added up in eval mode and subtracted again in training mode."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.weight.requires_grad_(False)
        self.merged = False
        self.down, self.up = nn.Parameter(torch.randn(2, inputs)), nn.Parameter(torch.randn(outputs, 2))

    def train(self, mode: bool = True) -> Merging:
        super().train(mode)
        if self.merged == mode:
            self.weight.data += (self.up @ self.down) * (-1 if mode else 1)
            self.merged = not mode
        return self

    def forward(self, inputs: Tensor) -> Tensor:
        plain = nn.functional.linear(inputs, self.weight, self.bias)
        return plain if self.merged else plain + inputs @ self.down.T @ self.up.T


class MergingOnlyInEval(Merging):
    """The same by ``eval`` and ``train`` of the root, which answers None."""

    def train(self, mode: bool = True) -> Any:
        super().train(mode)

    def eval(self) -> Any:
        super().eval()


def merging() -> nn.Module:
    return nn.Sequential(
        Merging(4, 6), nn.BatchNorm1d(6), nn.ReLU(), MergingOnlyInEval(6, 5), nn.ReLU(), nn.Linear(5, 3)
    )


class WithCopies(nn.Module):
    """Computes in eval mode with a second weight, which only eval makes: no parameter, no buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 5), nn.Linear(4, 5), nn.Linear(5, 3)
        self.fused: Tensor | None = None

    def train(self, mode: bool = True) -> WithCopies:
        super().train(mode)
        self.fused = None if mode else (self.first.weight + self.second.weight).detach()
        return self

    def forward(self, inputs: Tensor) -> Tensor:
        if self.fused is None:
            return self.head(torch.relu(self.first(inputs) + self.second(inputs)))
        return self.head(torch.relu(nn.functional.linear(inputs, self.fused, self.first.bias + self.second.bias)))


class FrozenStatistics(nn.Module):
    """Keeps its norm in eval mode, and its first layer from needing gradients in eval mode, as many do."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.head = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)
        self.train()

    def train(self, mode: bool = True) -> FrozenStatistics:
        super().train(mode)
        self.norm.eval()
        self.first.weight.requires_grad_(mode)
        return self

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(torch.relu(self.norm(self.first(inputs))))


def refusing() -> nn.Module:
    """A part that is kept in training mode by an attribute of its own, and one whose train raises."""

    class Raises(nn.Linear):
        def train(self, mode: bool = True) -> Any:
            if mode:
                raise RuntimeError("only for inference")
            return super().train(mode)

    net = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.3), nn.ReLU(), Raises(6, 5), nn.Linear(5, 3))
    vars(net[1])["train"] = lambda mode=True: net[1]
    net[3].training = False
    return net


def loralib_s() -> nn.Module:
    lora = pytest.importorskip("loralib")
    net = nn.Sequential(
        lora.Conv2d(1, 6, 2, r=2), nn.ReLU(), nn.Flatten(), lora.Linear(6, 5, r=2, lora_dropout=0.1), nn.Linear(5, 3)
    )
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if "lora_" in name:
                parameter.normal_()
    return nn.Sequential(nn.Unflatten(1, (1, 2, 2)), *net)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "merging": merging,
    "copies": WithCopies,
    "frozen statistics": FrozenStatistics,
    "refusing": refusing,
    "loralib": loralib_s,
}


def made(name: str) -> nn.Module:
    torch.manual_seed(4)
    return MODELS[name]()


def train_a_little(net: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> None:
    generator = torch.Generator().manual_seed(number)
    for _ in range(3):
        optimizer.zero_grad()
        net(torch.randn(6, 4, generator=generator)).square().mean().backward()
        optimizer.step()


def sgd(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.05, momentum=0.9)


@pytest.mark.parametrize("mode", ["training", "eval", "mixed"])
@pytest.mark.parametrize("name", MODELS)
def test_looking_leaves_every_bit_and_every_mode(name: str, mode: str) -> None:
    net = made(name)
    optimizer = sgd(net)  # before eval, which may switch gradients off
    if mode != "training":
        net.eval()
    if mode == "mixed":  # by the attribute alone, and by the module's own way
        net.training = True
        next(iter(net.children())).train()
    before = everything(net)
    freezer = Freezer(net, optimizer, [torch.randn(3, 4), torch.randn(2, 4)], Baseline())
    assert everything(net) == before
    for _ in range(2):
        freezer.step()
        assert everything(net) == before


@pytest.mark.parametrize("name", MODELS)
def test_training_is_what_it_is_without_looking(name: str) -> None:
    plain, observed = made(name), made(name)
    optimizers = sgd(plain), sgd(observed)
    freezer = Freezer(observed, optimizers[1], [torch.randn(3, 4)], Baseline())
    for epoch in range(3):
        for net, optimizer in zip((plain, observed), optimizers, strict=True):
            torch.manual_seed(epoch)  # dropout's draws
            train_a_little(net, optimizer, epoch)
        freezer.step()
    for (key, expected), (_, found) in zip(plain.named_parameters(), observed.named_parameters(), strict=True):
        assert torch.equal(found, expected), key
        assert (found.grad is None) == (expected.grad is None), key
        assert found.grad is None or torch.equal(found.grad, expected.grad), key
    assert all(parameter.grad is not None for parameter in observed.parameters() if parameter.requires_grad)


@pytest.mark.parametrize("starts", ["training", "eval"])
@pytest.mark.parametrize("name", ["merging", "copies", "frozen statistics", "loralib"])
def test_each_network_is_seen_as_its_own_eval_mode_makes_it(name: str, starts: str) -> None:
    net, probe = made(name).double(), torch.randn(5, 4, dtype=torch.float64)
    optimizer = sgd(net)
    net.train(starts == "training")
    freezer = Freezer(net, optimizer, [probe], Baseline())
    old = copy.deepcopy(net)
    net.train()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    net.train(starts == "training")
    seen = freezer.step()

    def outputs_of(model: nn.Module) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        model = copy.deepcopy(model).eval()
        for layer in freezer.layers:
            module = model.get_submodule(layer)
            module.register_forward_hook(lambda _m, _i, output, layer=layer: found.update({layer: output.detach()}))
        model(probe)
        return found

    before, after = outputs_of(old), outputs_of(net)
    assert set(before) == {layer for layer in seen if not seen[layer].phi.isnan().any()}
    for layer, output in after.items():
        a, b = (tensor.transpose(0, 1).flatten(1) for tensor in (output, before[layer]))
        expected = nn.functional.cosine_similarity(a, b, dim=1)
        assert torch.allclose(seen[layer].phi.double(), expected, rtol=0, atol=1e-6), layer
        assert (expected < 0.999999).any() or not output.any(), layer


def test_low_rank_parts_lie_in_the_graph_that_is_traced() -> None:
    net = made("merging").eval()  # merged when the Freezer looks
    freezer = Freezer(net, sgd(net), [torch.randn(3, 4)], Baseline())
    assert not freezer.anatomy.trace.unused
    assert freezer.anatomy.trace.input_gradient["1"]  # through the low-rank part alone


def test_a_look_that_fails_leaves_nothing_half_way() -> None:
    class Fails(Merging):
        fail = False

        def forward(self, inputs: Tensor) -> Tensor:
            if self.fail and self.merged:
                raise ValueError("broken")
            return super().forward(inputs)

    net = nn.Sequential(Merging(4, 5), Fails(5, 4), nn.Linear(4, 3))
    freezer = Freezer(net, sgd(net), [torch.randn(3, 4)], Baseline())
    before, kept = everything(net), {name: tensor.clone() for name, tensor in freezer._previous.tensors.items()}
    Fails.fail = True
    with pytest.raises(ValueError, match="broken"):
        freezer.step()
    assert everything(net) == before
    assert all(torch.equal(tensor, kept[name]) for name, tensor in freezer._previous.tensors.items())


def test_a_way_back_that_fails_still_puts_everything_back() -> None:
    class Stuck(nn.Linear):
        def train(self, mode: bool = True) -> Any:
            if mode and not self.training:
                raise RuntimeError("stays where it is")
            self.weight.data += 1
            return super().train(mode)

    net = nn.Sequential(Stuck(3, 3), nn.BatchNorm1d(3))
    before = everything(net)

    def look() -> None:
        with undisturbed(net):
            net.eval()
            net(torch.randn(2, 3))

    with pytest.raises(RuntimeError, match="stays where it is"):
        look()
    assert everything(net) == before


def test_an_embedding_that_scales_what_it_reads_is_left_alone() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.hidden, self.head = nn.Embedding(5, 4, max_norm=0.1), nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, words: Tensor) -> Tensor:
            return self.head(torch.relu(self.hidden(self.table(words).mean(1))))

    net = Net()
    before = everything(net)
    freezer = Freezer(net, sgd(net), [torch.tensor([[0, 1], [2, 3]])], Baseline())
    freezer.step()
    assert everything(net) == before


def test_recurrent_layers_run_with_the_weights_of_their_epoch() -> None:
    """Their weights lie in a list of their own too."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cells, self.head, self.last = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, words: Tensor) -> Tensor:
            return self.last(self.head(self.cells(words)[0][:, -1]))

    net, probe = Net().double(), torch.randn(6, 5, 3, dtype=torch.float64)
    freezer = Freezer(net, sgd(net), [probe], Baseline())
    old = copy.deepcopy(net)
    with torch.no_grad():
        for parameter in net.cells.parameters():
            parameter.add_(torch.randn_like(parameter))
    before = everything(net)
    phi = freezer.step()["head"].phi.double()
    assert everything(net) == before
    outputs = [model.head(model.cells(probe)[0][:, -1]) for model in (net, old)]
    expected = nn.functional.cosine_similarity(*outputs, dim=0).detach()
    assert torch.allclose(phi, expected, rtol=0, atol=1e-6)
    assert (expected < 0.999).any()
