"""Under torch.compile: the same gradients, and nothing compiled again when only the frozen sets change."""

from __future__ import annotations

import copy
import gc
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from frozen import Sets
from torch import Tensor, nn

from neq_cli import Freezer
from neq_cli.freezing.backward import compiled as module
from neq_cli.freezing.backward.dispatch import Dispatch
from neq_cli.freezing.backward.gradients import GradientPlan
from neq_cli.freezing.backward.sliced import COMPILED_FUNCTIONAL, BackwardMode

ROOT = Path(__file__).parents[3]


class Net(nn.Module):
    def __init__(self, *, attends: bool) -> None:
        super().__init__()
        self.attends = attends
        self.conv, self.norm, self.same = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding="same")
        self.up, self.attention = nn.ConvTranspose2d(8, 8, 2, stride=2, groups=2), nn.MultiheadAttention(8, 2)
        self.linear, self.head = nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.up(torch.relu(self.same(torch.relu(self.norm(self.conv(images))))))
        tokens = hidden.flatten(2).permute(2, 0, 1)
        if self.attends:
            tokens = tokens + self.attention(tokens, tokens, tokens)[0]
        return self.head(torch.tanh(self.linear(tokens.mean(0))))


def images() -> Tensor:
    return torch.randn(3, 3, 5, 5, generator=torch.Generator().manual_seed(3))


def gradients(model: Callable[[Tensor], Tensor], own: nn.Module) -> dict[str, Tensor | None]:
    own.zero_grad()
    model(images()).sin().sum().backward()
    return {name: parameter.grad for name, parameter in own.named_parameters()}


@pytest.mark.parametrize("mode", ["exact", "truncated"])
@pytest.mark.parametrize("kernel", ["dense", "sliced"])
@pytest.mark.usefixtures("double")
def test_gradients_are_those_of_the_eager_model_and_one_graph_serves_all_sets(
    mode: BackwardMode, kernel: str, force: Callable[[str], None]
) -> None:
    force(kernel)
    torch._dynamo.reset()
    # Attention's functional weights are exact where they are compiled.
    model = Net(attends=mode == "exact")
    eager = copy.deepcopy(model)
    compiled = torch.compile(model, backend="aot_eager")
    freezers = []
    for net, given in ((model, compiled), (eager, eager)):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        policy = Sets(0.0)
        freezers.append(Freezer(given, optimizer, [images()], policy, backward=mode))
    assert [freezer.compiled for freezer in freezers] == [True, False]
    graphs = []
    for share in (0.0, 0.5, 1.0, 0.3):
        for freezer in freezers:
            freezer.policy = Sets(share)
            freezer.step()
        found, expected = gradients(compiled, model), gradients(eager, eager)
        for name, gradient in expected.items():
            if gradient is None:
                assert found[name] is None, name
            else:
                assert torch.allclose(found[name], gradient, rtol=1e-11, atol=1e-12), (share, name)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert len(set(graphs)) == 1
    told = freezers[0].kernels()
    assert told["conv"].kernel == told["same"].kernel == told["up"].kernel == told["linear"].kernel == kernel
    if mode == "exact":
        assert (told["attention.in_proj"].kernel, told["attention.in_proj"].reason) == ("dense", COMPILED_FUNCTIONAL)
    for freezer in freezers:
        freezer.detach()
    assert type(model.conv) is nn.Conv2d


@pytest.mark.parametrize("wraps", [True, False])
@pytest.mark.usefixtures("double")
def test_a_part_that_is_compiled_is_compiled_once(*, wraps: bool) -> None:
    """Where the model itself runs eagerly, and after more sets than torch would compile anew for."""
    torch._dynamo.reset()
    part, head = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)), nn.Linear(3, 2)
    if not wraps:
        part.compile(backend="aot_eager")
    model = nn.Sequential(torch.compile(part, backend="aot_eager") if wraps else part, head)
    inputs = torch.randn(5, 4, generator=torch.Generator().manual_seed(3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    freezer = Freezer(model, optimizer, [inputs], Sets(0.5))
    assert freezer.compiled
    graphs = []
    for _ in range(torch._dynamo.config.recompile_limit + 2):
        before, trainable = part[0].weight.detach().clone(), next(iter(freezer.trainable.values()))
        model(inputs).sin().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert torch.equal((part[0].weight != before).any(1), trainable)
        freezer.step()
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert len(set(graphs)) == 1


def test_everything_frozen_is_no_exception(force: Callable[[str], None]) -> None:
    force("sliced")
    torch._dynamo.reset()
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(72, 8), nn.Tanh(), nn.Linear(8, 2))
    model.compile(backend="aot_eager")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    freezer = Freezer(model, optimizer, [images()], Sets(1.0))
    assert freezer.compiled
    dense = {name: gradient.clone() for name, gradient in gradients(model, model).items()}
    freezer.step()
    found = gradients(model, model)
    assert [name for name, gradient in found.items() if gradient is not None] == ["4.weight", "4.bias"]
    torch.testing.assert_close(found["4.weight"], dense["4.weight"])
    flops = freezer.flops()
    # The error goes wherever it would: only the weights' gradients are saved.
    assert flops.executed == flops.executed_dense - (8 * 9 * 27 + 8 * 72)


def test_a_plan_goes_with_its_slot() -> None:
    slot, plan = module.Slot(), GradientPlan(torch.tensor([True]), truncated=False, dispatch=Dispatch())
    slot.put(plan)
    number = slot.number
    assert module._plans[number] is plan
    del slot, plan
    gc.collect()
    assert number not in module._plans


LATE = """
import abc, ctypes
from neq_cli.freezing.backward import compiled

abc.kept = compiled.Slot()  # in a module that is emptied later
# Held where Python does not look, as compiled code holds what its guards watch.
ctypes.pythonapi.Py_IncRef(ctypes.py_object(compiled))
"""


def test_slots_that_outlive_what_their_module_holds_are_silent() -> None:
    """At the interpreter's end modules that something still holds are emptied one by one."""
    done = subprocess.run([sys.executable, "-c", LATE], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stderr == ""
