"""In which order a stream's images are trained on: blocks of rows that follow each other, each shuffled on its own.

A buffer that is refilled image by image, as the library's own, has a state as large as itself, which the library does
not save. A block has none: a run that goes on begins with the block it stopped in, wherever in its files that is.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import count, islice
from typing import Any

import torch

from neq_cli.training.batches.sampling import ALONE, Share, ShuffledSampler
from neq_cli.training.data.streamed_images import StreamedImages
from neq_cli.training.data.streams import Row, drawn_by

Block = tuple[int, list[Row], list[int]]
"""The number of its first image in the epoch, its rows, shuffled, and the integers that decide their augmentation."""


class StreamedSampler(ShuffledSampler):
    """Every image of a stream once, as ``ShuffledSampler`` has them, but that each is shuffled among its neighbours.

    Which process takes which of them, and what is left out, is as there: all processes read all rows, and each decodes
    its own. DataError where the stream ends early, or cannot be read.
    """

    def __init__(self, images: StreamedImages, seed: int, batch_size: int = 1, share: Share = ALONE) -> None:
        super().__init__(len(images), seed, batch_size, share)
        assert images.stream is not None
        self.stream = images.stream
        self._begun: list[Mapping[str, int]] = []  # where each block of the pass begins
        self._place: Mapping[str, int] | None = None  # where one begins that an earlier session was in

    def __iter__(self) -> Iterator[Any]:  # of StreamKey
        consumed, self.consumed = self.consumed, 0
        self.epoch += 1
        group = self.batch_size * self.share.processes
        end = consumed + self.steps(consumed) * group
        with closing(self._blocks(consumed, end)) as blocks, closing(_ahead(blocks)) as read:
            for start, rows, draws in read:
                for place in range(max(start, consumed), min(start + len(rows), end)):
                    if (place - consumed) % group // self.batch_size == self.share.rank:
                        yield rows[place - start], draws[place - start]

    def position(self, consumed: int) -> Mapping[str, int] | None:
        """Return where in its files the block begins in which the pass is after ``consumed`` images, in plain numbers.

        None where no block has been read.
        """
        known = [one for one in self._begun if one["block"] * self.stream.buffer <= consumed]
        return known[-1] if known else self._place

    def go_on_at(self, position: Mapping[str, int] | None) -> None:
        """Begin the pass of that epoch there; from its first file on, which is as exact, where none is given."""
        self._begun, self._place = [], position

    def _blocks(self, consumed: int, end: int) -> Generator[Block, None, None]:
        """Yield the blocks that reach beyond ``consumed``."""
        buffer, order = self.stream.buffer, self.stream.order(self.seed, self.epoch)
        places = {file: place for place, file in enumerate(order)}
        first: Mapping[str, int] = {"epoch": self.epoch, "block": 0, "file": 0, "row": 0}
        if self._place is not None and self._place["epoch"] == self.epoch and self._place["block"] * buffer <= consumed:
            first = self._place
        self._begun = [first]
        with closing(self.stream.rows(order, first["file"], first["row"], self.stream.held)) as stream:
            for block in count(first["block"]):
                start = block * buffer
                if start >= end:
                    return
                wanted = min(buffer, self.size - start)
                rows = list(islice(stream, wanted))
                if len(rows) < wanted:
                    raise self.stream.ended(start + len(rows) + sum(self.stream.held.values()))
                next_row = {"file": places[rows[-1].file], "row": rows[-1].row + 1}
                self._begun.append({"epoch": self.epoch, "block": block + 1, **next_row})
                if start + wanted > consumed:
                    generator = drawn_by(self.seed, self.epoch, block)
                    shuffled = torch.randperm(wanted, generator=generator).tolist()
                    draws = torch.randint(2**63 - 1, (wanted,), generator=generator).tolist()
                    yield start, [rows[number] for number in shuffled], draws


def _ahead(blocks: Iterator[Block]) -> Generator[Block, None, None]:
    """Yield the blocks, each next one read while the caller makes use of this one: a file or a network is slow."""
    with ThreadPoolExecutor(1, "stream") as reader:
        upcoming = reader.submit(next, blocks, None)
        while (block := upcoming.result()) is not None:
            upcoming = reader.submit(next, blocks, None)
            yield block
