"""BatchNorm over several processes: the same as BatchNorm of one process over the whole batch."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from rounding import apart, unit
from torch import Tensor, nn

from neq_cli.errors import RecipeError
from neq_cli.freezing.backward.swapping import Identities, restore, swap_frozen
from neq_cli.freezing.model.neurons import find_neurons
from neq_cli.training.processes.sync_batchnorm import synchronised

CPU = torch.device("cpu")
SPLITS = {2: [3, 5], 3: [2, 1, 5]}
# Name -> (layer, shape of a sample).
CASES: dict[str, tuple[Any, tuple[int, ...]]] = {
    "1d": (lambda: nn.BatchNorm1d(4), (4,)),
    "sequences": (lambda: nn.BatchNorm1d(4), (4, 3)),
    "2d": (lambda: nn.BatchNorm2d(4), (4, 3, 2)),
    "3d": (lambda: nn.BatchNorm3d(4, eps=0.1), (4, 3, 2, 2)),
    "channels_last": (lambda: nn.BatchNorm2d(4, momentum=0.3), (4, 3, 2)),
    "cumulative": (lambda: nn.BatchNorm2d(4, momentum=None), (4, 3, 2)),
    "not affine": (lambda: nn.BatchNorm2d(4, affine=False), (4, 3, 2)),
    "no statistics": (lambda: nn.BatchNorm2d(4, track_running_stats=False), (4, 3, 2)),
    "single precision": (lambda: nn.BatchNorm2d(4), (4, 3, 2)),
    "bfloat16": (lambda: nn.BatchNorm2d(4), (4, 3, 2)),
    "frozen": (lambda: nn.BatchNorm2d(4), (4, 3, 2)),
    "an empty batch": (lambda: nn.BatchNorm2d(4), (4, 3, 2)),
}


def layer_of(name: str) -> nn.Module:
    layer: nn.Module = CASES[name][0]()
    generator = torch.Generator().manual_seed(1)
    for parameter in layer.parameters():
        nn.init.uniform_(parameter, 0.5, 2, generator=generator)
    return layer.to(computed_in(name))


def computed_in(name: str) -> torch.dtype:
    return torch.float32 if name in ("single precision", "bfloat16") else torch.float64


def batch_of(name: str, step: int) -> tuple[Tensor, Tensor]:
    """The whole batch, far off zero, and the gradient of the loss with respect to the output."""
    generator = torch.Generator().manual_seed(step)
    inputs, gradients = torch.randn(2, 8, *CASES[name][1], generator=generator)
    inputs = 3 * inputs + 10
    if name == "channels_last":
        inputs, gradients = (t.contiguous(memory_format=torch.channels_last) for t in (inputs, gradients))
    if name == "bfloat16":
        return inputs.bfloat16(), gradients.bfloat16()
    return inputs.to(computed_in(name)), gradients.to(computed_in(name))


def parts_of(name: str, batch: Tensor, processes: int) -> tuple[Tensor, ...]:
    empty = name == "an empty batch"
    return batch.split([8, *[0] * (processes - 1)] if empty else SPLITS[processes])


def trained(name: str, layer: nn.Module, take: Any) -> dict[str, Any]:
    """Two steps on what ``take`` makes of each batch, and the output in eval mode after them."""
    found: dict[str, Any] = {}
    for step in (1, 2):
        inputs, gradients = (take(tensor).clone() for tensor in batch_of(name, step))
        outputs = layer(inputs.requires_grad_())
        outputs.backward(gradients)
        found |= {f"output {step}": outputs.detach(), f"input gradient {step}": inputs.grad}
    found["gradients"] = [parameter.grad for parameter in layer.parameters()]
    found["buffers"] = list(layer.buffers())
    layer.eval()
    found["tested"] = layer(take(batch_of(name, 3)[0])).detach()
    return found


def one_of_several(rank: int, processes: int, folder: Path) -> None:
    torch.distributed.init_process_group("gloo", f"file://{folder}/store", timedelta(seconds=90), processes, rank)
    results = {}
    for name in CASES:
        layer = synchronised(layer_of(name), CPU)
        if name == "frozen":
            swap_frozen(layer, Identities([layer.weight, layer.bias]))
        results[name] = trained(name, layer, lambda batch, name=name: parts_of(name, batch, processes)[rank])
    layer = synchronised(nn.BatchNorm1d(3), CPU)
    try:
        layer(torch.zeros(1 if rank == 0 else 0, 3))
    except ValueError as error:
        results["one value"] = str(error)
    torch.save(results, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module", params=[2, 3])
def several(
    request: pytest.FixtureRequest, neq_in: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    """What each of 2 or 3 processes found."""
    folder, processes = tmp_path_factory.mktemp("processes"), request.param
    # Forked where torch is imported already; none of them gets as far as a command of neq's.
    code = f"""
import runpy, sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
runpy.run_path({__file__!r})["one_of_several"]({{rank}}, {processes}, Path({str(folder)!r}))
raise SystemExit
"""
    started = [neq_in(folder, before=code.format(rank=rank)) for rank in range(processes)]
    for process in started:
        assert process.wait(100) == 0, process.text
    return [torch.load(folder / f"{rank}.pt") for rank in range(processes)]


@pytest.mark.parametrize("name", list(CASES))
def test_several_processes_do_what_one_does_with_the_whole_batch(several: list[dict[str, Any]], name: str) -> None:
    whole = trained(name, layer_of(name).double(), lambda batch: batch.double())
    # Of at most 96 values, which lie up to 10 deviations off zero: what their mean, variance and the gradient's sums
    # lose is so much larger beside a deviation. Outputs and inputs' gradients are below 10, statistics below 100,
    # parameters' gradients add up 96 products below 10.
    lost = apart(2 * 96 + 10, computed_in(name), magnitude=10)
    stored = torch.bfloat16 if name == "bfloat16" else computed_in(name)
    found = [process[name] for process in several]
    if name == "no statistics":  # in eval mode each process scales its batch by itself
        parts = parts_of(name, batch_of(name, 3)[0], len(several))
        whole["tested"] = torch.cat([layer_of(name).eval()(part).detach() for part in parts])
    for key in ("output 1", "output 2", "input gradient 1", "input gradient 2", "tested"):
        tensors = [process[key] for process in found]
        assert {tensor.dtype for tensor in tensors} == {stored}
        torch.testing.assert_close(torch.cat(tensors).double(), whole[key], rtol=unit(stored), atol=10 * lost)
        if name == "channels_last":
            assert all(tensor.is_contiguous(memory_format=torch.channels_last) for tensor in tensors)
    for process in found:
        assert all(map(torch.equal, process["buffers"], found[0]["buffers"]))
    for ours, theirs in zip(found[0]["buffers"], whole["buffers"], strict=True):
        torch.testing.assert_close(ours.double(), theirs.double(), rtol=0, atol=100 * lost)
    for number, gradient in enumerate(whole["gradients"]):
        ours = [process["gradients"][number] for process in found]
        if name == "frozen":
            assert ours == [None] * len(found)
        else:
            torch.testing.assert_close(sum(ours).double(), gradient, rtol=0, atol=960 * lost)


def test_one_value_is_too_few(several: list[dict[str, Any]]) -> None:
    assert [process["one value"].partition(",")[0] for process in several] == [
        "BatchNorm trains on more than one value per channel"
    ] * len(several)


def test_alone_it_is_plain_batch_norm() -> None:
    for name in ("2d", "cumulative", "not affine", "no statistics"):
        plain, layer = (trained(name, make(layer_of(name)), lambda batch: batch) for make in (lambda x: x, on_cpu))
        for key in ("output 1", "output 2", "input gradient 2", "tested"):
            assert torch.equal(plain[key], layer[key])
        assert all(map(torch.equal, plain["buffers"] + plain["gradients"], layer["buffers"] + layer["gradients"]))


def on_cpu(model: nn.Module) -> nn.Module:
    return synchronised(model, CPU)


def test_names_parameters_and_sharing_stay() -> None:
    shared = nn.BatchNorm2d(3)
    model = nn.Sequential(nn.Conv2d(3, 3, 1), shared, nn.Sequential(nn.BatchNorm1d(3), shared), nn.InstanceNorm2d(3))
    model[1].weight.requires_grad_(False)
    state, parameters = model.state_dict(), list(model.parameters())
    assert synchronised(model, CPU) is model
    assert model[1] is model[2][1]
    kinds = [type(part).__mro__[1].__name__ for part in (model[1], model[2][0], model[3])]
    assert kinds == ["_Synchronised", "_Synchronised", "_InstanceNorm"]
    assert not any(isinstance(part, nn.SyncBatchNorm) for part in model.modules())  # DDP refuses it on the CPU
    assert list(model.state_dict()) == list(state)
    assert all(map(lambda ours, theirs: ours is theirs, model.parameters(), parameters))
    model.load_state_dict(state)


def test_a_gpu_has_torchs_own_layer() -> None:
    model = synchronised(nn.Sequential(nn.BatchNorm2d(3)), torch.device("cuda"))
    made = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(nn.BatchNorm2d(3)))
    assert type(model[0]) is type(made[0]) is nn.SyncBatchNorm
    assert vars(model[0]).keys() == vars(made[0]).keys()


@pytest.mark.parametrize(("device", "kind"), [("cpu", "BatchNorm2d"), ("cuda", "SyncBatchNorm")])
def test_its_neurons_are_those_of_batch_norm(device: str, kind: str) -> None:
    layers = find_neurons(synchronised(nn.Sequential(nn.BatchNorm2d(3)), torch.device(device))).layers
    assert [(layer.kind, layer.neurons, layer.axis) for layer in layers.values()] == [(kind, 3, 1)]


def test_a_swapped_layer_gets_its_class_back() -> None:
    layer = synchronised(nn.BatchNorm2d(3), CPU)
    own = type(layer)
    swap_frozen(layer, Identities([layer.weight]))
    assert type(layer) is not own
    restore(layer)
    assert type(layer) is own


def test_a_layer_that_does_more_is_refused() -> None:
    class Activated(nn.BatchNorm2d):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input).relu()

    parametrised = nn.utils.parametrizations.weight_norm(nn.BatchNorm2d(3), dim=None)
    for layer, kind in ((Activated(3), "Activated"), (parametrised, "ParametrizedBatchNorm2d")):
        with pytest.raises(RecipeError) as raised:
            synchronised(nn.Sequential(nn.BatchNorm2d(3), layer), CPU)
        assert str(raised.value) == (
            f"sync_batchnorm: 1 is a {kind}, which cannot be synchronised on cpu, unlike torch's own BatchNorm; "
            "set it to false"
        )
