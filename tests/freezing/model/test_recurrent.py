"""Recurrent layers: what is seen of each layer and direction is what torch computes, and units keep to their rows."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from frozen import freeze
from rounding import apart, apart_behind_layers
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from neq_cli import Freezer
from neq_cli.freezing.anatomy import anatomy_of
from neq_cli.freezing.model.layouts import RowLayout
from neq_cli.freezing.model.observing import LayerCall, watch_calls

pytestmark = pytest.mark.usefixtures("double")

GATES = {nn.LSTM: 4, nn.GRU: 3, nn.RNN: 1, nn.LSTMCell: 4, nn.GRUCell: 3, nn.RNNCell: 1}
STACKS: dict[str, tuple[Any, dict[str, Any]]] = {
    "LSTM": (nn.LSTM, {}),
    "GRU": (nn.GRU, {"num_layers": 2, "batch_first": True}),
    "RNN": (nn.RNN, {"num_layers": 3, "nonlinearity": "relu", "bidirectional": True}),
    "LSTM both ways": (nn.LSTM, {"num_layers": 2, "bidirectional": True, "bias": False, "dropout": 0.5}),
    "LSTM projected": (nn.LSTM, {"num_layers": 2, "bidirectional": True, "proj_size": 3, "batch_first": True}),
}


class Words(nn.Module):
    def __init__(self, recurrent: nn.RNNBase) -> None:
        super().__init__()
        self.recurrent = recurrent
        with torch.no_grad():
            self.head = nn.Linear(recurrent(torch.randn(2, 3, 4))[0].shape[-1], 2)

    def forward(self, inputs: Any) -> Tensor:
        hidden, _ = self.recurrent(inputs)
        return self.head(torch.tanh(hidden.data if isinstance(hidden, PackedSequence) else hidden))


def words(name: str) -> tuple[Words, Tensor]:
    kind, options = STACKS[name]
    return Words(kind(4, 5, **options)), torch.randn(2, 3, 4)


def seen(net: nn.Module, inputs: Any) -> tuple[dict[str, Tensor], Any]:
    """Return what is seen of each layer, by name, and what the network puts out meanwhile."""
    found: dict[str, Tensor] = {}

    def on_call(call: LayerCall) -> None:
        assert call.layer.name not in found
        found[call.layer.name] = call.output

    layers = anatomy_of(net, inputs).neurons.layers
    with torch.no_grad(), watch_calls(layers.values(), dict(net.named_parameters()), on_call):
        return found, net.eval()(inputs)


def by_layer(recurrent: nn.RNNBase, inputs: Any) -> dict[str, Tensor]:
    """Return every layer's and direction's outputs, of modules of one layer that have its weights."""
    found: dict[str, Tensor] = {}
    ends = ("", "_reverse") if recurrent.bidirectional else ("",)
    for number in range(recurrent.num_layers):
        options: dict[str, Any] = {"nonlinearity": recurrent.nonlinearity} if isinstance(recurrent, nn.RNN) else {}
        options |= {key: getattr(recurrent, key) for key in ("bias", "batch_first", "bidirectional")}
        options |= {"proj_size": recurrent.proj_size} if recurrent.proj_size else {}
        size = (inputs.data if isinstance(inputs, PackedSequence) else inputs).shape[-1]
        one = type(recurrent)(size, recurrent.hidden_size, **options)
        with torch.no_grad():
            for key, parameter in one.named_parameters():
                parameter.copy_(recurrent.get_parameter(key.replace("_l0", f"_l{number}")))
            inputs, last = one(inputs)
        data = inputs.data if isinstance(inputs, PackedSequence) else inputs
        for direction, (end, part) in enumerate(zip(ends, data.chunk(len(ends), -1), strict=True)):
            if recurrent.proj_size:
                found[f"recurrent.hr_l{number}{end}"] = part
                found[f"recurrent.l{number}{end}"] = last[1][direction]
            else:
                found[f"recurrent.l{number}{end}"] = part
    return found


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", STACKS)
def test_every_layer_and_direction_is_seen(name: str, packed: bool) -> None:
    net, padded = words(name)
    lengths = torch.tensor([padded.shape[1], 1] if net.recurrent.batch_first else [2, 1, 2])
    batch_first = net.recurrent.batch_first
    inputs: Any = pack_padded_sequence(padded, lengths, batch_first, enforce_sorted=False) if packed else padded
    found, output = seen(net, inputs)
    expected = by_layer(net.recurrent, inputs)
    assert set(found) == {*expected, "head"}
    for layer, outputs in expected.items():
        # 3 steps, 4 gates, sums of 5 + 6 terms.
        torch.testing.assert_close(found[layer], outputs, rtol=0, atol=apart_behind_layers(3 * 4 * 11))
    with torch.no_grad():
        torch.testing.assert_close(output, net.eval()(inputs), rtol=0, atol=apart_behind_layers(3 * 4 * 11))


@pytest.mark.parametrize("name", STACKS)
def test_rows_are_in_every_gate_and_cover_all(name: str) -> None:
    net, inputs = words(name)
    freezer = Freezer(net, torch.optim.SGD(net.parameters(), lr=0.1), [inputs])
    assert freezer.coverage().outside == ()
    kind = type(net.recurrent)
    layout = RowLayout("gates", GATES[kind]) if kind is not nn.RNN else RowLayout()
    for layer in freezer.layers.values():
        if ".l" in layer.name:
            assert layer.neurons == 5
            assert all(rows.layout == layout and rows.count == 5 for rows in layer.rows)
            assert {rows.parameter.split("_")[0] for rows in layer.rows} <= {"recurrent.weight", "recurrent.bias"}
            assert len(layer.rows) == (4 if net.recurrent.bias else 2)


def test_a_unit_that_stands_still_puts_out_what_it_did_for_the_same_past() -> None:
    """At the first step there is no past: a frozen unit's output is the same bits, whatever became of the others."""
    net, inputs = words("LSTM")
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
    frozen = torch.tensor([True, False, True, False, False])
    freeze(net, inputs, {"recurrent.l0": ~frozen}, optimizer=optimizer)
    before = net.recurrent(inputs)[0][0].detach()
    net(inputs).square().sum().backward()
    optimizer.step()
    after = net.recurrent(inputs)[0][0].detach()
    assert torch.equal((before == after).all(0), frozen)
    for name, parameter in net.recurrent.named_parameters():
        assert parameter.grad is not None, name
        by_unit = parameter.grad.view(4, 5, -1)
        assert not by_unit[:, frozen].any()
        assert by_unit[:, ~frozen].any()


@pytest.mark.parametrize("mode", ["exact", "truncated"])
@pytest.mark.parametrize("name", STACKS)
def test_layers_that_are_frozen_whole_have_no_gradient_and_the_others_their_own(name: str, mode: Any) -> None:
    net, inputs = words(name)
    net.recurrent.dropout = 0.0
    twin = copy.deepcopy(net)
    layers = [layer for layer in anatomy_of(net, inputs).neurons.layers if layer != "head"]
    for whole in ([layers[0]], layers):
        freezer = freeze(net, inputs, {one: torch.zeros_like(freezer_set(net, inputs, one)) for one in whole}, mode)
        for model in (net, twin):
            model.zero_grad()
            model(inputs).square().sum().backward()
        held = {rows.parameter for one in whole for rows in freezer.layers[one].rows}
        for (key, ours), dense in zip(net.named_parameters(), twin.parameters(), strict=True):
            if key in held:
                assert ours.grad is None, key
            else:
                torch.testing.assert_close(ours.grad, dense.grad, rtol=0, atol=apart_behind_layers(1000))
        freezer.detach()


def freezer_set(net: nn.Module, inputs: Tensor, name: str) -> Tensor:
    return torch.ones(anatomy_of(net, inputs).neurons.layers[name].neurons, dtype=torch.bool)


@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_cells(kind: Any) -> None:
    class Steps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell, self.head = kind(4, 5), nn.Linear(5, 2)

        def forward(self, inputs: Tensor) -> Tensor:
            state = None
            for step in inputs.unbind(1):
                state = self.cell(step, state)
            return self.head(state[0] if kind is nn.LSTMCell else state)

    net, inputs = Steps(), torch.randn(2, 3, 4)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    freezer = Freezer(net, optimizer, [inputs])
    assert freezer.coverage().outside == ()

    def outputs() -> Tensor:
        state, found = None, []
        with torch.no_grad():
            for step in inputs.unbind(1):
                state = net.cell(step, state)
                found.append(state[0] if kind is nn.LSTMCell else state)
        return torch.stack(found).flatten(0, 1).t()

    old = outputs()
    net(inputs).square().sum().backward()
    optimizer.step()
    new = outputs()
    freezer.step()
    phi = freezer.dynamics["cell"].phi
    expected = (old * new).sum(1) / (old.norm(dim=1) * new.norm(dim=1))
    torch.testing.assert_close(phi, expected, rtol=0, atol=apart(100))
    # Three steps of a sample, each of gates x 5 rows of 4 inputs and 5 states.
    assert freezer.flops().layers["cell"].paper_dense == 2 * 3 * GATES[kind] * 5 * (4 + 5)


def test_multiply_adds_and_products_of_nobody() -> None:
    net, inputs = words("LSTM projected")
    freezer = Freezer(net, torch.optim.SGD(net.parameters(), lr=0.1), [inputs])
    flops = freezer.flops()
    steps, gates = 3, 4 * 5
    for end in ("", "_reverse"):
        assert flops.layers[f"recurrent.l0{end}"].paper_dense == 2 * steps * gates * (4 + 3)
        assert flops.layers[f"recurrent.l1{end}"].paper_dense == 2 * steps * gates * (6 + 3)
        assert flops.layers[f"recurrent.hr_l0{end}"].paper_dense == 2 * steps * 3 * 5
    assert flops.other_dense == 0


def test_the_order_of_layers_is_that_of_the_stack() -> None:
    for name in STACKS:
        net, inputs = words(name)
        anatomy = anatomy_of(net, inputs)
        layers = list(anatomy.neurons.layers)
        assert layers[-1] == "head"
        assert anatomy.trace.output_layers == {"head"}
        numbers = [layer.split("l")[-1][0] for layer in layers[:-1]]
        assert numbers == sorted(numbers), layers
        everything_but_the_last = [one for one in layers if f"l{net.recurrent.num_layers - 1}" not in one][:-1]
        assert anatomy.front(everything_but_the_last) == set(everything_but_the_last)
