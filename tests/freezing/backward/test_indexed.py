"""Products that load rows by their number, in Triton's interpreter, which needs no GPU, beside PyTorch's."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
import torch
from frozen import freeze
from rounding import apart
from torch import Tensor, nn

from neq_cli.freezing.backward import indexed, kernels
from neq_cli.freezing.backward.dispatch import Dispatch, Kernel, KernelChoice

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="test_all_of_these_in_tritons_interpreter runs it")


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    if INTERPRETED:
        monkeypatch.setattr(indexed, "_works", lambda device: True)


@pytest.mark.skipif(INTERPRETED, reason="this runs in it")
def test_all_of_these_in_tritons_interpreter() -> None:
    """In a process of its own: Triton looks whether it is to interpret when it is imported."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not there")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not gpu", __file__]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if "only 0-dimensional arrays can be converted" in done.stdout:
        pytest.skip("this Triton's interpreter does not work with this NumPy")
    assert done.returncode == 0, done.stdout
    assert f"{len(PRODUCTS) + 1 + 2 * len(LAYERS)} passed, 2 skipped" in done.stdout, done.stdout


def whole(*shape: int) -> Tensor:
    """Return small whole numbers, whose sums of products are exact in every precision up to TF32's."""
    return torch.randint(-4, 5, shape).float()


PRODUCTS = [(1, 1, 1, 1), (3, 5, 2, 2), (100, 70, 130, 65), (64, 64, 64, 64), (1100, 20, 9, 3), (2500, 130, 70, 129)]


@interpreted
@pytest.mark.parametrize(
    ("tokens", "neurons", "features", "count"),
    PRODUCTS,
)
def test_products_are_those_of_pytorch(tokens: int, neurons: int, features: int, count: int) -> None:
    errors, values, weight = whole(tokens, neurons), whole(tokens, features), whole(neurons, features)
    rows = torch.randperm(neurons)[:count].sort().values
    expected = errors[:, rows].t() @ values
    assert torch.equal(indexed.weight_gradient(errors, rows, values), expected)
    assert torch.equal(indexed.input_gradient(errors, rows, weight), errors[:, rows] @ weight[rows])
    # Views that are not contiguous, as an error that was transposed or cut.
    wide = torch.cat([errors, errors], 1)[:, :neurons]
    assert torch.equal(indexed.weight_gradient(wide, rows, values.t().contiguous().t()), expected)


@interpreted
def test_sums_in_single_precision_are_as_exact_as_pytorchs() -> None:
    errors, values = torch.randn(3000, 40), torch.randn(3000, 30)
    rows = torch.tensor([0, 7, 39])
    exact = errors.double()[:, rows].t() @ values.double()
    magnitude = (errors.abs().double()[:, rows].t() @ values.abs().double()).max()
    found = indexed.weight_gradient(errors, rows, values).double()
    assert (found - exact).abs().max() <= apart(3000, torch.float32, float(magnitude))


class Indexed(Dispatch):
    """Chooses the kernel wherever it is offered."""

    def __init__(self) -> None:
        super().__init__()
        self.taken: list[Kernel] = []

    def choose(self, kind: str, kernels: list[Kernel], *_: object) -> KernelChoice:  # type: ignore[override]
        self.taken.append("indexed" if "indexed" in kernels else "sliced")
        return KernelChoice(self.taken[-1], {})


LAYERS = {
    "linear": (lambda: nn.Linear(9, 20), (6, 9), "indexed"),
    "linear on tokens": (lambda: nn.Linear(9, 20, bias=False), (3, 7, 9), "indexed"),
    "pointwise, channels_last": (lambda: nn.Conv2d(9, 20, 1), (3, 9, 5, 4), "indexed"),
    "pointwise, contiguous": (lambda: nn.Conv2d(9, 20, 1), (3, 9, 5, 4), "sliced"),
    "strided, channels_last": (lambda: nn.Conv2d(9, 20, 1, 2), (3, 9, 5, 4), "sliced"),
    "padded, channels_last": (lambda: nn.Conv2d(9, 20, 1, padding=1), (3, 9, 5, 4), "sliced"),
    "grouped, channels_last": (lambda: nn.Conv2d(10, 20, 1, groups=2), (3, 10, 5, 4), "sliced"),
    "larger, channels_last": (lambda: nn.Conv2d(9, 20, 3), (3, 9, 5, 4), "sliced"),
}


@interpreted
@pytest.mark.parametrize("mode", ["exact", "truncated"])
@pytest.mark.parametrize("name", LAYERS)
def test_layers_have_the_gradients_of_the_sliced_kernel(name: str, mode: str) -> None:
    make, shape, expected = LAYERS[name]
    results = []
    for dispatch in (Indexed(), Dispatch(fixed=True)):
        torch.manual_seed(0)
        layer = make()
        model = nn.Sequential(layer, nn.Flatten(1), nn.Linear(layer(torch.zeros(shape))[0].numel(), 3))
        inputs = whole(*shape)
        if name.endswith("channels_last"):
            model, inputs = (one.to(memory_format=torch.channels_last) for one in (model, inputs))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(whole(*parameter.shape))
        freezer = freeze(model, inputs, {"0": torch.arange(20) % 3 == 0}, mode, dispatch=dispatch)
        mine = inputs.clone().requires_grad_()
        model(mine).sum().backward()
        assert mine.grad is not None
        results.append([mine.grad, *(parameter.grad for parameter in model[0].parameters())])
        assert mine.grad.stride() == inputs.stride()
        if isinstance(dispatch, Indexed):
            assert dispatch.taken[0] == expected
        freezer.detach()
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.skipif(INTERPRETED, reason="which stands for one")
def test_without_a_gpu_none_is_offered() -> None:
    assert not indexed.can_multiply(torch.ones(2, 2))
    assert not kernels.can_go_by_index(nn.Linear, torch.ones(2, 2), torch.ones(2, 2, 3))  # type: ignore[arg-type]


@pytest.mark.gpu
def test_a_gpu_multiplies_as_pytorch_does() -> None:
    device = torch.device("cuda")
    indexed._works.cache_clear()
    assert indexed.can_multiply(torch.ones(2, 2, device=device))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        errors, values, weight = (whole(*shape).to(device, dtype) for shape in ((9000, 700), (9000, 300), (700, 300)))
        rows = torch.arange(0, 700, 9, device=device)
        found = indexed.weight_gradient(errors, rows, values), indexed.input_gradient(errors, rows, weight)
        expected = errors[:, rows].t().double() @ values.double(), errors[:, rows].double() @ weight[rows].double()
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one, other.to(dtype)), dtype
