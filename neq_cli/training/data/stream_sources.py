"""Opening data sets as streams: what their files are, how many rows these have, and which classes; labels alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from neq_cli.errors import RecipeValueError, one_line
from neq_cli.recipe import DataSection
from neq_cli.training.data.opened import Source, numbered
from neq_cli.training.data.quiet import quietly
from neq_cli.training.data.streams import RowReader, RowStream

_BUFFER = 1000
"""Rows that are shuffled together unless the recipe says otherwise."""
TEXTS = ("string", "large_string", "string_view")
"""What the library calls the types of texts."""


def streamed_source(
    section: DataSection, name: str, builder: Any, tables: Mapping[str, Any], keys: tuple[str, str]
) -> Source:
    """Return the streams of the splits that ``builder`` made: to train on and, if there is another, to test on.

    ``keys`` are the columns of images and of labels. RecipeValueError, one line, where it does not tell how many rows
    or which classes there are.
    """
    classes = _classes(section, name, next(iter(tables.values())).features[keys[1]], keys[1])
    argument = zip(tables.items(), ("train_length", "test_length"), strict=False)
    streams = [_stream(section, name, builder, split, table, keys, key) for (split, table), key in argument]
    train, test = streams[0], streams[-1]
    files = len(train.reader.files)
    note = (
        f"data.kwargs.streaming: {files} file{'s' * (files > 1)}, in an order of each epoch's own, whose rows are "
        f"shuffled in blocks of {train.buffer} that follow each other"
    )
    return Source(name, train, test, classes, (note,))


def _stream(
    section: DataSection, name: str, builder: Any, split: str, table: Any, keys: tuple[str, str], key: str
) -> RowStream:
    paths = [str(path) for path in builder.config.data_files.get(split, ())] if builder.config.data_files else []
    counts = _counts(name, split, paths)
    length, told = _length(section, name, builder, split, counts, table, key)
    files = [Path(path).name for path in paths]
    if len(files) != table.num_shards:  # a folder of images is read as if it were one
        files = [f"part {number}" for number in range(1, table.num_shards + 1)]
        counts = None
    reader = RowReader(f"{name} {split}", files, section.pixel_range)
    buffer = int(section.kwargs.get("shuffle_buffer", _BUFFER))
    return RowStream(
        reader, table.select_columns(list(keys)), keys, length=length, told=told, key=key, buffer=buffer, counts=counts
    )


def _counts(name: str, split: str, paths: Sequence[str]) -> list[int] | None:
    """Return how many rows each file has, where it lies on this machine and tells; else None."""
    if not paths or not all(Path(path).suffix in _COUNTED and Path(path).is_file() for path in paths):
        return None
    try:
        return [_COUNTED[Path(path).suffix](path) for path in paths]
    except Exception as error:
        raise RecipeValueError("data.name", f"{name} {split} cannot be read ({one_line(error)})") from error


def _length(
    section: DataSection, name: str, builder: Any, split: str, counts: Sequence[int] | None, table: Any, key: str
) -> tuple[int, str]:
    """Return how many rows there are, and what says so: the recipe, the files themselves, or their description."""
    given = section.kwargs.get(key)
    if given is not None:
        return int(given), f"data.kwargs.{key}"
    if counts is not None:
        return sum(counts), "its files"
    files = (builder.config.data_files or {}).get(split, ())
    if hasattr(builder, "BASE_FEATURE") and all(Path(path).is_file() for path in files):
        # Images in folders: names alone are read.
        with quietly():
            return sum(batch.num_rows for batch in table.with_format("arrow").iter(batch_size=1000)), "its folder"
    described = getattr((builder.info.splits or {}).get(split), "num_examples", None)
    if described:
        return int(described), "its description"
    what = f"how many rows has the split '{split}' of {name}? Neither its files nor its description tell; give a number"
    raise RecipeValueError(f"data.kwargs.{key}", what)


def _in_parquet(path: str) -> int:
    from pyarrow import parquet

    return int(parquet.read_metadata(path).num_rows)


def _in_arrow(path: str) -> int:
    import pyarrow

    with pyarrow.memory_map(path) as file:
        try:
            return sum(batch.num_rows for batch in pyarrow.ipc.open_stream(file))
        except pyarrow.ArrowInvalid:
            reader = pyarrow.ipc.open_file(file)
            return sum(reader.get_batch(number).num_rows for number in range(reader.num_record_batches))


_COUNTED: Mapping[str, Callable[[str], int]] = {".parquet": _in_parquet, ".arrow": _in_arrow}
"""Files that tell how many rows they have without being read."""


def _classes(section: DataSection, name: str, feature: Any, column: str) -> tuple[str, ...]:
    """Return what classes are called: as the column's type says, or by their numbers."""
    given = section.kwargs.get("num_classes")
    names = tuple(map(str, getattr(feature, "names", None) or ()))
    kind = str(getattr(feature, "dtype", ""))
    if names or kind == "bool":
        if given is not None:
            what = f"'{column}' of {name} tells its classes; remove it"
            raise RecipeValueError("data.kwargs.num_classes", what)
        return names or ("0", "1")
    if kind in TEXTS:
        what = f"'{column}' of {name} holds texts, which are classes once all are read"
        raise RecipeValueError("data.label_key", f"{what}; cast it to ClassLabel, or remove data.kwargs.streaming")
    if given is None:
        what = f"'{column}' of {name} holds numbers, of which the largest is not known before all are read"
        raise RecipeValueError("data.kwargs.num_classes", f"{what}; give it")
    if not isinstance(given, int) or isinstance(given, bool) or given < 1:
        raise RecipeValueError("data.kwargs.num_classes", f"{given!r} is not a number of classes")
    return numbered(given)
