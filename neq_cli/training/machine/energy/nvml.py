"""A CUDA device, by NVML: the card's own energy counter, or its power sampled where it has none; whole cards only."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch

from neq_cli.errors import one_line
from neq_cli.training.machine.energy.meter import EnergyError, Meter, Unmeasured, counted, sampled

_EVERY = 0.1
"""Seconds between two samples of a card's power, which itself is a mean over some of them."""


def card_of(device: torch.device) -> str | None:
    """Return what NVML calls the card that ``device`` is, whatever CUDA_VISIBLE_DEVICES has made of its number.

    None where it is not NVIDIA's.
    """
    if device.type != "cuda" or torch.version.cuda is None:
        return None
    return f"GPU-{torch.cuda.get_device_properties(device).uuid}"


def nvml_meter(card: str) -> Meter:
    """Return the meter of a card. Raises Unmeasured where NVML has none for it, EnergyError where the library lacks."""
    try:
        nvml: Any = import_module("pynvml")
    except ImportError as error:
        raise EnergyError(f"that of a GPU needs nvidia-ml-py ({one_line(error)}); pip install 'neq[energy]'") from error
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        raise Unmeasured(f"NVML does not start ({error})") from error
    try:
        handle = nvml.nvmlDeviceGetHandleByUUID(card)
        name = nvml.nvmlDeviceGetName(handle)
        how, spent, every = _source(nvml, handle)
    except nvml.NVMLError as error:
        nvml.nvmlShutdown()
        raise Unmeasured(f"NVML tells no energy of {card}, nor its power ({error})") from error
    return Meter("gpu", f"{how}, {name}", spent, every=every, close=nvml.nvmlShutdown)


def _source(nvml: Any, handle: Any) -> tuple[str, Callable[[], float], float | None]:
    """Return how the card is measured: by its counter, which cards since Volta have, else by its power."""

    def joules() -> float:
        return float(nvml.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1e3

    def watts() -> float:
        return float(nvml.nvmlDeviceGetPowerUsage(handle)) / 1e3

    try:
        return "NVML total energy", counted(joules), None
    except nvml.NVMLError:
        return f"NVML power every {_EVERY:g} s", sampled(watts), _EVERY
