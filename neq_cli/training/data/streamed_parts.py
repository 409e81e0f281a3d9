"""A stream divided into what is tested, probed and trained on: by its beginning, as a stream cannot be drawn from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from neq_cli.recipe import DataSection
from neq_cli.training.data.opened import Source
from neq_cli.training.data.splits import check_probe, count_held_out
from neq_cli.training.data.streams import RowStream


@dataclass(frozen=True)
class StreamPart:
    """The rows ``numbers`` of a stream, counted from 0 where its files are read in ``order``."""

    stream: RowStream
    order: Sequence[int]
    numbers: range


def divided(
    section: DataSection, source: Source, seed: int, *, tested_only: bool
) -> tuple[Source, StreamPart, StreamPart]:
    """Return the source with the rows that are probed as its training part, and what is trained on and tested.

    The order of files is drawn by ``seed``. Of that order's rows the first are tested, where ``data.validation`` says
    so, and the next probed; no epoch has them. RecipeValueError, one line, where they are too many or cannot be read.
    """
    train, test = source.train, source.test
    size, order, notes = len(train), train.order(seed, 0), list(source.notes)
    tested = StreamPart(test, range(len(test.reader.files)), range(len(test)))
    held = 0
    if section.validation is not None:
        held = count_held_out(size, section.validation)
        tested = StreamPart(train, order, range(held))
        instead = f", in place of {source.untested}" if source.untested else ""
        what = f"{held} of {size} training images, the first of its files in an order by seed, are the test part"
        notes.append(f"data.validation: {what}{instead}")
    if tested_only:
        probed = train.hold(seed, 1, 1)  # which tells what images are
        return replace(source, train=probed), StreamPart(train, order, range(held, size)), tested
    check_probe(section.probe_size, size - held)
    probed = train.hold(seed, held + section.probe_size, section.probe_size)
    labels = {row.label for row in probed.rows}
    if len(source.classes) > 1 and len(labels) == 1 and section.probe_size > 1:
        notes.append(
            f"data.kwargs.streaming: the probe's {section.probe_size} images are all of one class, as if rows were "
            "sorted by it; a stream is trained on nearly in its order, so store it shuffled"
        )
    kept = StreamPart(train, order, range(held + section.probe_size, size))
    return replace(source, train=probed, notes=tuple(notes)), kept, tested
