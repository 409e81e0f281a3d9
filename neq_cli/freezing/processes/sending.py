"""A communication hook for DistributedDataParallel averages the trainable rows of each bucket alone.

By hand, since torch's own hooks send whole buckets.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed

from neq_cli.freezing.backward.dispatch import Dispatch, KernelChoice, read_choice
from neq_cli.freezing.model.layouts import RowLayout
from neq_cli.freezing.processes.agreement import from_first
from neq_cli.freezing.rows.frozen_rows import FrozenRows
from neq_cli.freezing.rows.keeper import RowKeeper

if TYPE_CHECKING:
    from torch._C._distributed_c10d import GradBucket
    from torch.distributed import ProcessGroup

_KIND = "all-reduce "
_SMALL = 4096
"""Elements up to which a parameter's are copied one by one, in one call with others'; eight bytes each to say which."""
_ROUNDS = 6
_MOST_BY_RULE = 0.75
"""The largest share of trainable elements that is sent alone where nothing is timed."""


@dataclass(frozen=True)
class Piece:
    """Part of a bucket, seen as [rows, width] from element ``first``: the rows of it in ``index``, or all of it."""

    first: int
    rows: int
    width: int
    index: Tensor | None  # int64, on the bucket's device

    @property
    def count(self) -> int:
        """How many elements are trainable."""
        return (self.rows if self.index is None else len(self.index)) * self.width

    def view(self, bucket: Tensor) -> Tensor:
        return bucket[self.first : self.first + self.rows * self.width].view(self.rows, self.width)


class Part:
    """The trainable elements of a bucket, gathered into one tensor and put back; ``count`` of ``total``."""

    def __init__(self, pieces: list[Piece], total: int) -> None:
        self.pieces = pieces
        self.count = sum(piece.count for piece in pieces)
        self.total = total
        self._gathered: Tensor | None = None

    def gather(self, bucket: Tensor) -> Tensor:
        """Return the trainable elements of ``bucket``, [count]; the same memory each time."""
        if self._gathered is None:
            self._gathered = bucket.new_empty(self.count)
        for piece, target in self._targets(self._gathered):
            if piece.index is None:
                target.copy_(piece.view(bucket))
            else:
                torch.index_select(piece.view(bucket), 0, piece.index, out=target)
        return self._gathered

    def put_back(self, gathered: Tensor, bucket: Tensor) -> None:
        """Write what ``gather`` returned into ``bucket``; frozen elements stay what they are, and are discarded."""
        for piece, source in self._targets(gathered):
            target = piece.view(bucket)
            if piece.index is None:
                target.copy_(source)
            else:
                target, source = _in_wide_elements(target, source)
                target.index_copy_(0, piece.index, source)

    def _targets(self, gathered: Tensor) -> list[tuple[Piece, Tensor]]:
        parts = torch.split(gathered, [piece.count for piece in self.pieces])
        return [(piece, part.view(-1, piece.width)) for piece, part in zip(self.pieces, parts, strict=True)]


class Sending:
    """What the hook knows: the frozen rows in force, each bucket's trainable part, and whether to send that alone.

    It knows nothing of the wrapper, which knows it: the cycle would lie where Python's garbage collector does not look.
    """

    def __init__(self, group: ProcessGroup, dispatch: Dispatch) -> None:
        self.group = group
        self.dispatch = dispatch
        self.bytes = 0
        self.frozen: dict[int, FrozenRows] = {}  # by the parameter's identity, where some of its rows are
        self.nothing: frozenset[int] = frozenset()  # the identities of parameters of which no row trains
        self.parts: dict[tuple[int, ...], Part | None] = {}  # by bucket; None: all of it is sent
        self.choices = _of_first(dispatch, group)
        self._last: Any = None

    def send(self, keeper: RowKeeper) -> None:
        """Send from now on what ``keeper`` does not keep frozen."""
        self.frozen = {id(one.parameter): one for one in keeper.partly}
        self.nothing = frozenset(map(id, keeper.discarding.whole))
        self.parts, self._last = {}, None

    def part(self, bucket: GradBucket) -> Part | None:
        """Return the part of ``bucket`` to be sent; None where that is all of it."""
        parameters = bucket.parameters()
        key = (bucket.index(), *map(id, parameters))
        if key not in self.parts:
            places = [
                (_as_stored(gradient, parameter), self.frozen.get(id(parameter)))
                for parameter, gradient in zip(parameters, bucket.gradients(), strict=True)
                if id(parameter) not in self.nothing
            ]
            part = Part(_pieces(bucket.buffer(), places), bucket.buffer().numel())
            self.parts[key] = part if self._wins(part, bucket.buffer()) else None
        return self.parts[key]

    def average(self, tensor: Tensor) -> Any:
        """Begin to replace ``tensor`` by all processes' mean; return the future that it is."""
        self.bytes += tensor.numel() * tensor.element_size()
        tensor.mul_(1 / self.group.size())  # before: a sum of half-precision numbers might overflow
        self._last = distributed.all_reduce(tensor, group=self.group, async_op=True)
        return self._last.get_future()

    def _wins(self, part: Part, bucket: Tensor) -> bool:
        if part.count in (0, part.total):
            return not part.count
        kind = self._kind(part, bucket)
        choice = self.choices.get(kind)
        if choice is None:
            if self.dispatch.fixed:
                choice = KernelChoice("sliced" if part.count <= _MOST_BY_RULE * part.total else "dense", {})
            else:
                started = time.perf_counter()
                choice = self._timed(part, bucket)
                self.dispatch.seconds += time.perf_counter() - started
            self.choices[kind] = self.dispatch.choices[kind] = choice
            if self.dispatch.on_choice is not None:
                self.dispatch.on_choice(self.dispatch)
        return choice.kernel == "sliced"

    def _kind(self, part: Part, bucket: Tensor) -> str:
        """Describe the call, in words that are the same in all processes."""
        size = 1 << max(0, bucket.numel() * bucket.element_size() - 1).bit_length()
        eighths = -(-8 * part.count // part.total)
        return (
            f"{_KIND}of up to {size} bytes of {str(bucket.dtype)[6:]} on {bucket.device.type} over {self.group.size()} "
            f"processes by {distributed.get_backend(self.group)}, {eighths} of 8 parts trainable"
        )

    def _timed(self, part: Part, bucket: Tensor) -> KernelChoice:
        """Time both ways on the group itself, the slowest process counts: all of them choose alike."""
        if self._last is not None:
            self._last.wait()  # earlier buckets are still under way
        scratch = torch.zeros_like(bucket)

        def whole() -> None:
            distributed.all_reduce(scratch, group=self.group)

        def trainable() -> None:
            gathered = part.gather(scratch)
            distributed.all_reduce(gathered, group=self.group)
            part.put_back(gathered, scratch)

        times = [[_seconds(run, bucket.device) for run in (whole, trainable)] for _ in range(_ROUNDS + 1)]
        best = torch.tensor(times[1:], dtype=torch.float64).amin(0).to(bucket.device, torch.float32)
        distributed.all_reduce(best, distributed.ReduceOp.MAX, group=self.group)
        all_rows, some_rows = best.tolist()
        milliseconds = {"dense": round(1e3 * all_rows, 4), "sliced": round(1e3 * some_rows, 4)}
        return KernelChoice("sliced" if some_rows < all_rows else "dense", milliseconds)


def average(sending: Sending, bucket: GradBucket) -> torch.futures.Future[Tensor]:
    """Average a bucket's trainable part over the processes: what DistributedDataParallel calls for each bucket."""
    buffer = bucket.buffer()
    part = None if buffer.is_sparse else sending.part(bucket)
    if part is None:
        return _then(sending.average(buffer), lambda mean: mean)
    if not part.count:
        devices: list[int | str | torch.device] | None = [buffer.device] if buffer.device.type == "cuda" else None
        done: torch.futures.Future[Tensor] = torch.futures.Future(devices=devices)
        done.set_result(buffer)
        return done

    def put_back(mean: Tensor) -> Tensor:
        part.put_back(mean, buffer)
        return buffer

    return _then(sending.average(part.gather(buffer)), put_back)


def _then(future: Any, use: Callable[[Tensor], Tensor]) -> torch.futures.Future[Tensor]:
    result: torch.futures.Future[Tensor] = future.then(lambda done: use(done.value()[0]))
    return result


def _pieces(bucket: Tensor, places: list[tuple[Tensor, FrozenRows | None]]) -> list[Piece]:
    """Return the trainable pieces of a bucket, the widest rows first, so that later ones keep their alignment.

    ``places`` are gradients, views of ``bucket`` in their order there, and which of their rows are frozen.
    """
    by_row: list[Piece] = []
    whole: list[Piece] = []
    single: list[Tensor] = []
    for gradient, frozen in places:
        count = gradient.numel()
        first = int(gradient.storage_offset()) - int(bucket.storage_offset())
        if count <= _SMALL or not (frozen is None or _in_rows(gradient, frozen.layout)):
            single.append(_elements(gradient, frozen) + first)
        elif frozen is None:
            whole.append(Piece(first, 1, count, None))
        else:
            index = (~frozen.frozen).nonzero().squeeze(1).to(gradient.device)
            by_row.append(Piece(first, len(gradient), count // len(gradient), index))
    pieces = sorted(by_row, key=lambda piece: -piece.width) + _merged(whole)
    if single:
        pieces.append(Piece(0, bucket.numel(), 1, torch.cat(single)))
    return [piece for piece in pieces if piece.count]


def _elements(gradient: Tensor, frozen: FrozenRows | None) -> Tensor:
    """Return which of the elements of ``gradient`` are trainable: int64, in the order in which they are stored."""
    trains = torch.ones_like(gradient, dtype=torch.bool)  # with its strides
    if frozen is not None:
        rows = frozen.frozen.nonzero().squeeze(1).to(gradient.device)
        frozen.layout.view(trains)[frozen.layout.index(trains, rows)] = False
    return trains.as_strided((gradient.numel(),), (1,)).nonzero().squeeze(1)


def _as_stored(gradient: Tensor, parameter: Tensor) -> Tensor:
    """Return ``gradient``, a bucket's view without strides of its own, as it is stored: with the parameter's."""
    dense = torch.empty_like(parameter, device="meta").stride() == parameter.stride()
    return gradient.as_strided(gradient.shape, parameter.stride()) if dense else gradient


def _in_rows(gradient: Tensor, layout: RowLayout) -> bool:
    """Whether each row of a large gradient is one piece of memory."""
    return layout.kind == "leading" and gradient.stride(0) * len(gradient) == gradient.numel()


def _merged(pieces: list[Piece]) -> list[Piece]:
    """Join pieces that follow on each other."""
    merged: list[Piece] = []
    for piece in sorted(pieces, key=lambda piece: piece.first):
        if merged and merged[-1].first + merged[-1].width == piece.first:
            piece = Piece(merged[-1].first, 1, merged.pop().width + piece.width, None)
        merged.append(piece)
    return merged


def _in_wide_elements(target: Tensor, source: Tensor) -> tuple[Tensor, Tensor]:
    """Return both with elements as wide as can be: rows are written an element at a time."""
    size, width = target.element_size(), target.shape[1]
    for kind in (torch.complex128, torch.int64):
        places = (width * size, target.data_ptr(), target.storage_offset() * size,
                  source.data_ptr(), source.storage_offset() * size)  # fmt: skip
        if size < kind.itemsize and all(place % kind.itemsize == 0 for place in places):
            return target.view(kind), source.view(kind)
    return target, source


def _seconds(run: Callable[[], None], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def _of_first(dispatch: Dispatch, group: ProcessGroup) -> dict[str, KernelChoice]:
    """Return process 0's choices of this kind: where others had others, they would wait for each other for ever."""
    own = {kind: asdict(choice) for kind, choice in dispatch.choices.items() if kind.startswith(_KIND)}
    text = json.dumps(own).encode() if group.rank() == 0 else b""
    length = int(from_first(torch.tensor([len(text)], device="cpu"), group))
    told = from_first(torch.tensor(list(text or bytes(length)), dtype=torch.uint8, device="cpu"), group)
    return {kind: read_choice(choice) for kind, choice in json.loads(bytes(told.tolist())).items()}
