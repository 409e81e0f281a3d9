"""The processes that train copies of one model agree on what is frozen: process 0 decides, and all are compared."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed

from neq_cli.errors import FreezingError
from neq_cli.freezing.model.layers import Layer
from neq_cli.freezing.model.observing import map_tensors

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_AT_A_TIME = 1 << 22
"""Elements in one message, from which on a tensor has its own."""


class Agreement:
    """Keeps the processes of ``group`` at one mind: process 0 looks, chooses and remembers for all.

    The Freezer asks it wherever copies of one model could come apart. Without a group there is one process, which
    agrees with itself.
    """

    def __init__(self, group: ProcessGroup | None) -> None:
        self.group = group

    @property
    def is_first(self) -> bool:
        """Whether this is process 0, or the only one."""
        return self.group is None or self.group.rank() == 0

    @property
    def processes(self) -> int:
        """How many there are."""
        return 1 if self.group is None else int(self.group.size())

    def check(self, contents: Iterable[bytes], what: str) -> None:
        """Raise FreezingError in every process where one's ``contents``, in words ``what``, are not process 0's."""
        if self.group is not None:
            check_agreement(contents, self.group, what)

    def sample(self, inputs: Any) -> Any:
        """Return the inputs to look at the model with, since what a model does may depend on them."""
        return inputs if self.group is None else first_sample(inputs, self.group)

    def rounded_alike(self, phi: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return process 0's ``phi``: sums may differ in their last bits where the network adds them up."""
        if self.group is None:
            return phi
        told = from_first(torch.cat(list(phi.values())), self.group)
        return dict(zip(phi, torch.split(told, [len(one) for one in phi.values()]), strict=True))

    def choose(self, choose: Callable[[], dict[str, Tensor]], layers: Mapping[str, Layer]) -> dict[str, Tensor]:
        """Return the sets that ``choose`` returns, or an exception that it raises, in process 0."""
        if self.group is None:
            return choose()
        return chosen_by_first(choose, {name: layer.neurons for name, layer in layers.items()}, self.group)

    def buffers(
        self, tensors: Mapping[str, Tensor | None], parameters: Collection[str], device: torch.device
    ) -> Mapping[str, Tensor | None]:
        """Return ``tensors`` with process 0's where they are not ``parameters``, which are alike anyway."""
        if self.group is None:
            return tensors
        buffers = {name: tensor for name, tensor in tensors.items() if name not in parameters}
        own = {name: tensor for name, tensor in tensors.items() if name in parameters}
        return {**own, **named_from_first(buffers, device, self.group)}

    def overwrite(self, tensors: Iterable[Tensor | None]) -> None:
        """Overwrite ``tensors`` with process 0's."""
        if self.group is not None:
            overwrite_from_first((tensor for tensor in tensors if tensor is not None), self.group)


def add_up(tensor: Tensor, group: ProcessGroup) -> Tensor:
    """Return the sum of all processes' ``tensor``, on the device where theirs are."""
    carried = tensor.to(_carrier(tensor.device, group), copy=True)
    distributed.all_reduce(carried, group=group)
    return carried.to(tensor.device)


def from_first(tensor: Tensor, group: ProcessGroup) -> Tensor:
    """Return process 0's ``tensor``; the others' only tell its shape and type."""
    carried = tensor.detach().to(_carrier(tensor.device, group), copy=True, memory_format=torch.contiguous_format)
    distributed.broadcast(carried, distributed.get_global_rank(group, 0), group=group)
    return carried.to(tensor.device)


@torch.no_grad()
def overwrite_from_first(tensors: Iterable[Tensor], group: ProcessGroup) -> None:
    """Overwrite ``tensors`` with process 0's, small ones together."""
    for alike in _batches(tensors):
        told = from_first(torch.cat([tensor.reshape(-1) for tensor in alike]), group)
        for tensor, part in zip(alike, torch.split(told, [tensor.numel() for tensor in alike]), strict=True):
            tensor.copy_(part.view(tensor.shape))


def named_from_first(
    tensors: Mapping[str, Tensor | None], device: torch.device, group: ProcessGroup
) -> dict[str, Tensor | None]:
    """Return copies of process 0's ``tensors``; the others' may have other names and shapes.

    They are where this process has its own of that name, else on ``device``.
    """
    told = [{name: None if tensor is None else (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}]
    distributed.broadcast_object_list(told, distributed.get_global_rank(group, 0), group=group)
    found: dict[str, Tensor | None] = {}
    for name, form in told[0].items():
        own = tensors.get(name)
        place = device if own is None else own.device
        found[name] = None if form is None else torch.empty(form[0], dtype=form[1], device=place)
        if group.rank() == 0 and own is not None:
            found[name] = own.detach().clone()
    overwrite_from_first((tensor for tensor in found.values() if tensor is not None), group)
    return found


def batches_together(batches: Iterable[Any], group: ProcessGroup | None) -> Iterator[Any]:
    """Yield ``batches``, then None for as long as another process has some left, if there is any."""
    if group is None:
        yield from batches
        return
    own = iter(batches)
    while True:
        batch = next(own, None)
        if not int(add_up(torch.tensor([batch is not None], dtype=torch.int64, device="cpu"), group)):
            return
        yield batch


def _batches(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Yield tensors of one type and device, as many as make one message."""
    waiting: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for tensor in tensors:
        alike = waiting.setdefault((tensor.device, tensor.dtype), [])
        if alike and sum(one.numel() for one in alike) + tensor.numel() > _AT_A_TIME:
            yield alike
            alike = waiting[tensor.device, tensor.dtype] = []
        alike.append(tensor)
    yield from waiting.values()


def first_sample(inputs: Any, group: ProcessGroup) -> Any:
    """Return the first sample of process 0's ``inputs``, on the CPU; None where they are None."""
    told = [None]
    if group.rank() == 0 and inputs is not None:
        told = [map_tensors(lambda tensor: (tensor[:1] if tensor.dim() else tensor).cpu().clone(), inputs)]
    distributed.broadcast_object_list(told, distributed.get_global_rank(group, 0), group=group)
    return told[0]


def chosen_by_first(
    choose: Callable[[], Mapping[str, Tensor]], sizes: Mapping[str, int], group: ProcessGroup
) -> dict[str, Tensor]:
    """Return the sets that process 0 chooses, bool, [neurons], by layer in the order of ``sizes``.

    Where ``choose`` raises there, every process raises: the others a FreezingError with the message.
    """
    sets: Mapping[str, Tensor] = {}
    failure: Exception | None = None
    message = b""
    if group.rank() == 0:
        try:
            sets = choose()
        except Exception as error:
            failure = error
            kind = "" if isinstance(error, FreezingError) else f"process 0: {type(error).__name__}: "
            message = (kind + " ".join(str(error).split())).encode()
    length = int(from_first(torch.tensor([len(message)], device="cpu"), group))
    if length:
        told = from_first(_bytes(message or bytes(length)), group)
        raise failure or FreezingError(bytes(told.tolist()).decode())
    count = sum(sizes.values())
    packed = pack(sets) if group.rank() == 0 else torch.zeros(-(-count // 8), dtype=torch.uint8, device="cpu")
    return unpack(from_first(packed, group), sizes)


def pack(sets: Mapping[str, Tensor]) -> Tensor:
    """Return ``sets`` (bool, [neurons], on the CPU) one after the other in bits: uint8."""
    every = torch.cat(list(sets.values()))
    padded = torch.zeros(-(-len(every) // 8) * 8, dtype=torch.uint8, device="cpu")
    padded[: len(every)] = every
    return (padded.view(-1, 8) << torch.arange(8, dtype=torch.uint8, device="cpu")).sum(1, dtype=torch.uint8)


def unpack(packed: Tensor, sizes: Mapping[str, int]) -> dict[str, Tensor]:
    """Return the sets of these ``sizes`` that ``pack`` put together."""
    every = (packed[:, None] >> torch.arange(8, dtype=torch.uint8, device="cpu") & 1).bool().flatten()
    parts = torch.split(every[: sum(sizes.values())], list(sizes.values()))
    return {name: part.clone() for name, part in zip(sizes, parts, strict=True)}


def check_agreement(contents: Iterable[bytes], group: ProcessGroup, what: str) -> None:
    """Raise FreezingError in every process where the ``contents`` of one of them are not those of process 0."""
    digest = hashlib.sha256()
    for content in contents:
        digest.update(content)
    own = _bytes(digest.digest())
    rows = torch.zeros(group.size(), len(own), dtype=torch.uint8, device="cpu")
    rows[group.rank()] = own
    everyone = add_up(rows, group)
    odd = (everyone != everyone[0]).any(1).nonzero().flatten().tolist()
    if odd:
        raise FreezingError(
            f"process {odd[0]} holds other {what} than process 0; all must train copies of one model, with the same "
            "Freezer and the same loaded state"
        )


def as_bytes(sets: Mapping[str, Tensor], numbers: Sequence[Tensor]) -> Iterator[bytes]:
    """Yield frozen sets and float64 numbers, to the bit, for ``Agreement.check``."""
    for tensor in (pack(sets), torch.cat(list(numbers)).view(torch.uint8)):
        yield tensor.numpy().tobytes()  # a list of numbers would take 40 times as long, and 8 bytes for each of these


def _bytes(content: bytes) -> Tensor:
    return torch.tensor(list(content), dtype=torch.uint8, device="cpu")


def _carrier(device: torch.device, group: ProcessGroup) -> torch.device:
    """Return ``device`` where the group's backend moves tensors there, else one where it does."""
    kinds = {str(torch.device(kind).type) for kind in group._device_types}
    if device.type in kinds or not kinds:
        return device
    kind = "cpu" if "cpu" in kinds else sorted(kinds)[0]
    return torch.device(kind, torch.accelerator.current_device_index()) if kind != "cpu" else torch.device("cpu")
