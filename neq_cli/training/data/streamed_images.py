"""Images of a stream, which come in its order and not by number; what is asked for are rows, read before they are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch.utils.data import Sampler

from neq_cli.training.data.images import ReadImages
from neq_cli.training.data.streams import Row, RowStream
from neq_cli.training.data.transforms import Preparation

StreamKey = tuple[Row, int]
"""What is asked for: a row, and the random integer that decides its augmentation."""


class StreamedImages(ReadImages):
    """The images ``numbers``, counted from 0, of a stream whose files are read in ``order``.

    The process that asks reads the rows, once; decoding, preparing and augmenting them is left to its workers. Trained
    on, they come in orders of their own; ``numbers`` are then what is not held. ``read`` is as ``ReadImages`` has it.
    DataError as ``ReadImages`` and ``RowStream`` do.
    """

    streamed = True

    def __init__(
        self,
        stream: RowStream,
        order: Sequence[int],
        numbers: range,
        preparation: Preparation,
        *,
        name: str,
        classes: int,
        augmented: bool,
        **read: Any,
    ) -> None:
        indices: Any = numbers  # a tensor of so many could be larger than memory
        super().__init__(stream.reader, indices, preparation, name=name, classes=classes, augmented=augmented, **read)
        self.stream: RowStream | None = stream
        self.order = order

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "stream": None}  # a worker needs no more than the reader

    def __copy__(self) -> StreamedImages:
        copied = object.__new__(StreamedImages)
        vars(copied).update(vars(self))
        return copied

    def fixed(self, positions: Sequence[Any]) -> tuple[Any, Any]:
        """Return images as ``Images.fixed`` does, of the keys that ``keys`` yields."""
        rows, draws = zip(*positions, strict=True)
        return self._fixed(rows, draws)

    @property
    def keys(self) -> Sampler[Any]:
        return InTurn(self)

    def _resolved(self, key: Any) -> tuple[Any, int]:
        row, draw = key
        return row, draw

    def _place(self, index: Any, which: int = 0) -> str:
        place: str = self.source.place(index)
        return place


class InTurn(Sampler[StreamKey]):
    """The keys of streamed images in the stream's own order: how they are tested."""

    def __init__(self, images: StreamedImages) -> None:
        assert images.stream is not None
        self.stream, self.order, self.numbers = images.stream, images.order, images.indices

    def __len__(self) -> int:
        return len(self.numbers)

    def __iter__(self) -> Iterator[StreamKey]:
        if len(self):
            numbers: Any = self.numbers
            for row in self.stream.part(self.order, numbers.start, numbers.stop):
                yield row, 0
