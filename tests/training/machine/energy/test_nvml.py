"""NVML against a module in its place with counters written down; on a real card, against its power."""

from __future__ import annotations

import sys
import time
from types import ModuleType

import pytest
import torch

from neq_cli.training.machine.energy import nvml
from neq_cli.training.machine.energy.meter import EnergyError, Unmeasured, sampled
from neq_cli.training.machine.energy.nvml import card_of, nvml_meter


class Fake(ModuleType):
    """What of pynvml is used, for one card; an empty list is what the card does not support."""

    class NVMLError(Exception):
        pass

    def __init__(self, millijoules: list[int], milliwatts: list[int], card: str = "GPU-a") -> None:
        super().__init__("pynvml")
        self.millijoules, self.milliwatts, self.card = list(millijoules), list(milliwatts), card
        self.open = 0
        self.driver = True

    def nvmlInit(self) -> None:
        if not self.driver:
            raise self.NVMLError("Driver Not Loaded")
        self.open += 1

    def nvmlShutdown(self) -> None:
        self.open -= 1

    def nvmlDeviceGetHandleByUUID(self, card: str) -> str:
        if card != self.card:
            raise self.NVMLError("Not Found")
        return f"handle of {card}"

    def nvmlDeviceGetName(self, handle: str) -> str:
        assert handle == f"handle of {self.card}"
        return "NVIDIA Fake"

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:
        return self._next(self.millijoules)

    def nvmlDeviceGetPowerUsage(self, handle: str) -> int:
        return self._next(self.milliwatts)

    def _next(self, values: list[int]) -> int:
        if not values:
            raise self.NVMLError("Not Supported")
        return values.pop(0)


def fake(monkeypatch: pytest.MonkeyPatch, *arguments: list[int]) -> Fake:
    module = Fake(*arguments)
    monkeypatch.setitem(sys.modules, "pynvml", module)
    return module


def test_the_cards_own_counter_is_read_in_millijoules(monkeypatch: pytest.MonkeyPatch) -> None:
    module = fake(monkeypatch, [5_000_000, 5_001_500, 5_004_000], [])
    meter = nvml_meter("GPU-a")
    assert (meter.source, meter.how) == ("gpu", "NVML total energy, NVIDIA Fake")
    assert [meter.joules(), meter.joules()] == [1.5, 4.0]
    meter.close()
    assert module.open == 0


def test_a_card_without_a_counter_is_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    fake(monkeypatch, [], [100_000, 300_000, 200_000])
    ticks = iter([0.0, 0.5, 1.5])
    monkeypatch.setattr(nvml, "sampled", lambda watts: sampled(watts, lambda: next(ticks)))
    meter = nvml_meter("GPU-a")
    assert meter.how == "NVML power every 0.1 s, NVIDIA Fake"
    # 200 W for half a second, 250 W for a whole one.
    assert [meter.joules(), meter.joules()] == [100.0, 350.0]


def test_samples_are_taken_while_nobody_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    module = fake(monkeypatch, [], [100_000] * 10_000)
    monkeypatch.setattr(nvml, "_EVERY", 0.001)
    meter = nvml_meter("GPU-a")
    meter.start()
    end = time.monotonic() + 10
    while len(module.milliwatts) > 9_990 and time.monotonic() < end:
        time.sleep(0.001)
    meter.close()
    assert len(module.milliwatts) <= 9_990


@pytest.mark.parametrize(
    ("card", "driver", "said"),
    [
        ("GPU-a", True, r"no energy of GPU-a, nor its power \(Not Supported\)"),
        ("GPU-b", True, r"no energy of GPU-b, nor its power \(Not Found\)"),
        ("GPU-a", False, r"does not start \(Driver Not Loaded\)"),
    ],
)
def test_why_a_card_is_not_measured(monkeypatch: pytest.MonkeyPatch, card: str, driver: bool, said: str) -> None:
    module = fake(monkeypatch, [], [])
    module.driver = driver
    with pytest.raises(Unmeasured, match=said):
        nvml_meter(card)
    assert module.open == 0


def test_a_missing_library_is_one_line_that_mends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(EnergyError, match=r"needs nvidia-ml-py .*; pip install 'neq\[energy\]'") as caught:
        nvml_meter("GPU-a")
    assert "\n" not in str(caught.value)


def test_only_cuda_devices_are_cards() -> None:
    assert card_of(torch.device("cpu")) is None


@pytest.mark.gpu
def test_a_real_card_takes_what_its_power_says() -> None:
    pynvml = pytest.importorskip("pynvml")
    device = torch.device("cuda", torch.cuda.current_device())
    card = card_of(device)
    assert card is not None
    meter = nvml_meter(card)
    meter.start()
    matrix = torch.randn(8192, 8192, device=device)
    torch.cuda.synchronize()
    before, began, powers = meter.joules(), time.perf_counter(), []
    handle = pynvml.nvmlDeviceGetHandleByUUID(card)
    while time.perf_counter() < began + 5:
        for _ in range(20):
            matrix @ matrix
        torch.cuda.synchronize()
        powers.append(pynvml.nvmlDeviceGetPowerUsage(handle) / 1e3)
    watts = (meter.joules() - before) / (time.perf_counter() - began)
    meter.close()
    assert watts == pytest.approx(sum(powers) / len(powers), rel=0.3)  # NVML's power is a mean over up to a second
