"""Gradients when backward ends, however it was run: frozen rows are zero, and whole frozen parameters have none."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from neq_cli.freezing.model.layouts import RowLayout
from neq_cli.freezing.rows.frozen_rows import FrozenRows
from neq_cli.freezing.rows.zeroed import Discarding


class Net(nn.Module):
    """Parameters of every kind: small ones, large ones with many or few frozen rows, and one to be frozen whole."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 600)  # 9,600 elements
        self.norm = nn.LayerNorm(600)
        self.second = nn.Linear(600, 50, bias=False)
        self.whole = nn.Linear(50, 4)
        self.last = nn.Linear(4, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.second(self.norm(torch.tanh(self.first(inputs))))
        return self.last(torch.tanh(self.whole(hidden)))


FROZEN = {
    "first.weight": torch.arange(600) % 3 == 0,
    "first.bias": torch.arange(600) % 2 == 0,
    "norm.weight": torch.arange(600) < 7,
    "second.weight": torch.arange(50) % 10 == 3,
    "whole.weight": torch.ones(4, dtype=torch.bool),
    "whole.bias": torch.ones(4, dtype=torch.bool),
    "last.bias": torch.tensor([False, True, False]),
}


def discarding(net: nn.Module) -> Discarding:
    parameters = dict(net.named_parameters())
    frozen = [FrozenRows(parameters[name], RowLayout(), rows) for name, rows in FROZEN.items()]
    assert [one.by_row for one in frozen] == [name in ("first.weight", "second.weight") for name in FROZEN]
    return Discarding(frozen)


def pair() -> tuple[Net, Net, Discarding]:
    """Return a net, the same net without hooks, and what discards the first one's gradients."""
    net, twin = Net(), Net()
    twin.load_state_dict(net.state_dict())
    return net, twin, discarding(net)


def check(net: nn.Module, twin: nn.Module) -> None:
    """The gradients of ``net`` are those of ``twin``, but for frozen rows."""
    for (name, ours), theirs in zip(net.named_parameters(), twin.parameters(), strict=True):
        assert theirs.grad is not None
        rows = FROZEN.get(name, torch.zeros(len(ours), dtype=torch.bool))
        if rows.all():
            assert ours.grad is None, name
            continue
        assert ours.grad is not None, name
        assert not ours.grad[rows].any(), name
        assert theirs.grad[rows].any() or not rows.any(), name  # else the test shows nothing
        assert torch.equal(ours.grad[~rows], theirs.grad[~rows]), name


def plain(net: Net, inputs: Tensor) -> None:
    net(inputs).square().sum().backward()


def several_roots(net: Net, inputs: Tensor) -> None:
    torch.autograd.backward([net(inputs).square().sum(), net(2 * inputs).sum()])


def accumulating(net: Net, inputs: Tensor) -> None:
    for factor in (1, 2):
        plain(net, factor * inputs)


def with_a_graph(net: Net, inputs: Tensor) -> None:
    net(inputs).square().sum().backward(create_graph=True)


def a_term_of_the_weights(net: Net, inputs: Tensor) -> None:
    (net(inputs).square().sum() + sum(parameter.square().sum() for parameter in net.parameters())).backward()


def only_some_parameters(net: Net, inputs: Tensor) -> None:
    for parameters in ([net.first.weight, net.first.bias], [net.norm.weight, net.norm.bias]):
        net(inputs).square().sum().backward(inputs=parameters)
    net(inputs).square().sum().backward(inputs=[net.second.weight, *net.whole.parameters(), *net.last.parameters()])


def through_checkpoints(reentrant: bool) -> Callable[[Net, Tensor], None]:
    def run(net: Net, inputs: Tensor) -> None:
        hidden = checkpoint(net.first, inputs.clone().requires_grad_(), use_reentrant=reentrant)
        hidden = checkpoint(net.norm, torch.tanh(hidden), use_reentrant=reentrant)
        checkpoint(
            net.last, torch.tanh(net.whole(net.second(hidden))), use_reentrant=reentrant
        ).square().sum().backward()

    return run


def after_one_that_failed(net: Net, inputs: Tensor) -> None:
    def fail(_: Tensor) -> None:
        raise ArithmeticError

    inputs = inputs.clone().requires_grad_()
    handle = inputs.register_hook(fail)  # by then all but the first layer have their gradients
    with pytest.raises(ArithmeticError):
        plain(net, inputs)
    handle.remove()
    net.zero_grad()
    plain(net, inputs)


def inside_another(net: Net, inputs: Tensor) -> None:
    """A backward pass in a hook of another one that reaches the same parameters."""

    def another(_: Tensor) -> None:
        with torch.enable_grad():
            plain(net, 2 * inputs)

    outer = net(inputs).square().sum()
    outer.register_hook(another)
    outer.backward()


WAYS = {
    "plain": plain,
    "several roots": several_roots,
    "accumulating": accumulating,
    "with a graph": with_a_graph,
    "a term of the weights": a_term_of_the_weights,
    "only some parameters": only_some_parameters,
    "checkpoints": through_checkpoints(False),
    "reentrant checkpoints": through_checkpoints(True),
    "after one that failed": after_one_that_failed,
    "inside another": inside_another,
}


@pytest.mark.filterwarnings("ignore:Using backward")  # a graph of gradients is kept alive by them
@pytest.mark.parametrize("way", WAYS)
def test_frozen_rows_are_zero_when_backward_ends(way: str) -> None:
    net, twin, _kept = pair()
    inputs = torch.randn(5, 16)
    for one in (net, twin):
        WAYS[way](one, inputs)
    check(net, twin)


def test_in_a_compiled_backward_pass() -> None:
    from torch._dynamo import compiled_autograd

    net, twin, _kept = pair()
    inputs = torch.randn(5, 16)
    with compiled_autograd._enable(torch.compile(backend="eager")):
        plain(net, inputs)
    plain(twin, inputs)
    check(net, twin)


def test_outside_a_backward_pass_nothing_is_put_off() -> None:
    net = nn.Linear(2, 3)
    kept = Discarding([FrozenRows(net.bias, RowLayout(), torch.tensor([True, False, True]))])
    net.bias.grad = torch.ones(3)
    kept.when_backward_ends()
    assert net.bias.grad.tolist() == [0, 1, 0]


@pytest.fixture
def _process_group() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("_process_group")
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed")
@pytest.mark.parametrize("views", [False, True])
def test_distributed_data_parallel_writes_gradients_before_small_ones_are_discarded(views: bool) -> None:
    net, twin, _kept = pair()
    parallel = nn.parallel.DistributedDataParallel(net, gradient_as_bucket_view=views)
    for _ in range(3):  # from the second on buckets are rebuilt
        inputs = torch.randn(5, 16)
        for one in (net, twin):
            one.zero_grad()
        parallel(inputs).square().sum().backward()
        plain(twin, inputs)
        check(net, twin)


def test_gradients_that_are_not_finite_are_zero_too() -> None:
    net, _, _kept = pair()
    names = ("first.weight", "first.bias", "second.weight")
    for name in names:
        net.get_parameter(name).register_hook(lambda gradient: torch.full_like(gradient, math.nan))
    plain(net, torch.randn(5, 16))
    for name in names:
        gradient = net.get_parameter(name).grad
        assert gradient is not None
        assert torch.equal(
            gradient.isnan().flatten(1).all(1) if gradient.dim() > 1 else gradient.isnan(), ~FROZEN[name]
        )
        assert not gradient[FROZEN[name]].any()


def test_removed_hooks_discard_nothing() -> None:
    net, twin, kept = pair()
    kept.remove()
    inputs = torch.randn(5, 16)
    for one in (net, twin):
        plain(one, inputs)
    for ours, theirs in zip(net.parameters(), twin.parameters(), strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        assert torch.equal(ours.grad, theirs.grad)


def test_small_gradients_are_zeroed_in_one_call_for_each_kind() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    calls: list[str] = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            calls.append(function.name())
            return function(*args, **(kwargs or {}))

    net = nn.Sequential(*(nn.Linear(4, 4) for _ in range(20)))
    half = torch.tensor([True, False, True, False])
    kept = Discarding([FrozenRows(parameter, RowLayout(), half) for parameter in net.parameters()])
    net(torch.randn(3, 4)).sum().backward()
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    with Record():
        kept.late()
    assert [name for name in calls if name not in ("aten::view.dtype", "aten::detach")] == ["aten::_foreach_mul_.List"]
    assert all(parameter.grad.flatten().tolist().count(0.0) * 2 == parameter.numel() for parameter in net.parameters())
