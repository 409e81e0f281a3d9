"""Where decoded images are cached between epochs, decided from sizes that one image tells and the memory there is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from neq_cli.errors import RecipeValueError
from neq_cli.recipe.values import Cache
from neq_cli.training.data.images import Images, ImagesInMemory
from neq_cli.training.data.parts import Data
from neq_cli.training.machine.limits import free_memory

_CPU = torch.device("cpu")
_SHARE = 4  # auto takes a quarter of what is free: the model and its activations come later


@dataclass(frozen=True)
class Choice:
    """Where images are cached, and a line that says so and why: "data.cache: memory, 184 MB"."""

    place: Literal["memory", "device", "none"]
    note: str


def choose_cache(data: Data, cache: Cache, device: torch.device, processes: int = 1) -> Choice:
    """Decide what ``cache`` comes to for a run on ``device``, of ``data`` as this process needs it.

    Each of ``processes`` on this machine keeps images of its own, and has as much of the free RAM as every other.

    ``auto`` takes the device where all parts fit in a quarter of its free memory, else the RAM likewise. It keeps no
    dataset of the user's own, and no images that may differ in size, whose total only decoding would tell. Raises
    RecipeValueError, before anything is decoded, where what the recipe asks for cannot be.
    """
    if cache == "none":
        return Choice("none", "data.cache: none")
    if cache == "auto":
        return _automatic(data, device, processes)
    if cache == "device" and data.train.scales_at_random:
        raise RecipeValueError(
            "data.cache",
            f"{data.train.preparation.augment} augmentation cuts and scales images one by one on the CPU; "
            "use memory, not the device",
        )
    if cache == "memory" or device.type == "cpu":
        _check_fits(_new_bytes(data), _CPU, processes)
        why = ", as the training device is the CPU" if cache == "device" else ""
        return Choice("memory", _cached(data, "memory", processes) + why)
    _check_fits(_all_bytes(data), device)
    return Choice("device", _cached(data, "device", processes))


def _automatic(data: Data, device: torch.device, processes: int) -> Choice:
    if data.as_it_is:
        return _not_kept(f"the items of {data.name} are taken as they are")
    if data.own:
        return _not_kept(f"{data.name} may change or hold chance; memory keeps what is read first")
    if data.train.differ or data.test.differ:
        return _not_kept("images that are cut at random may differ in size; memory keeps them too")
    if device.type != "cpu" and not data.train.scales_at_random:
        free = free_memory(device)
        if free is not None and _SHARE * _all_bytes(data) <= free:
            return Choice("device", _cached(data, "device", processes))
    needed, free = _new_bytes(data), (free_memory(_CPU) or 0) // processes
    if _SHARE * needed <= free:
        return Choice("memory", _cached(data, "memory", processes))
    return _not_kept(
        f"{readable(needed)} are more than a quarter of the {readable(free)} of memory that are free{_each(processes)}"
    )


def _not_kept(why: str) -> Choice:
    return Choice("none", f"data.cache: none, as {why}")


def _cached(data: Data, place: str, processes: int) -> str:
    apart = ", and training images in sizes of their own" if data.train.differ and not data.train.streamed else ""
    each = " in each process" if processes > 1 else ""
    read = ", but test images, which differ in size, are read every time" if data.test.differ else ""
    passing = " of test and probe images, and training images are streamed" if data.train.streamed else ""
    return f"data.cache: {place}, {readable(_all_bytes(data))}{each}{passing}{apart}{read}"


def _each(processes: int) -> str:
    return f" for each of {processes} processes" if processes > 1 else ""


def _check_fits(needed: int, device: torch.device, processes: int = 1) -> None:
    free = free_memory(device)
    free = None if free is None else free // processes
    if free is not None and needed > free:
        where = "memory" if device.type == "cpu" else f"{device}'s memory"
        raise RecipeValueError(
            "data.cache",
            f"images of {readable(needed)}, but {readable(free)} of {where} are free{_each(processes)}; use auto",
        )


def _all_bytes(data: Data) -> int:
    return sum(_bytes(data, images) for images in _parts(data))


def _new_bytes(data: Data) -> int:
    """Return what is taken beyond the images that are in memory from the start."""
    return sum(_bytes(data, images) for images in _parts(data) if not _is_there(images))


def _parts(data: Data) -> list[Images]:
    return [data.train, data.probe, data.test]


def _is_there(images: Images) -> bool:
    return isinstance(images, ImagesInMemory) and images.unchanged


def _bytes(data: Data, images: Images) -> int:
    if images.differ or (images.streamed and images is data.train):
        return 0  # not kept, or not known before all are decoded
    if isinstance(images, ImagesInMemory) and images.unchanged:
        return len(images) * images.images[0].nbytes
    if images.whole_pixels is not None and data.image_shape is not None:
        _, height, width = data.image_shape
        return images.whole_pixels * data.image_bytes // (height * width)
    return len(images) * data.image_bytes


def readable(count: int) -> str:
    """Return bytes in words: "0.36 MB", "184 MB", "12.3 GB"."""
    number, unit = (count / 1e9, "GB") if count >= 1e9 else (count / 1e6, "MB")
    return f"{number:.3g} {unit}" if number < 999.5 else f"{number:,.0f} {unit}"
