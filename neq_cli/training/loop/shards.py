"""Tensors of a checkpoint whose parts lie in files beside it, one of each process, divided along dimension 0 only."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from neq_cli.freezing.rows.shards import is_sharded
from neq_cli.training.loop.tensor_file import damaged, each_tensor, read_header

STARTS = "starts"
"""In a shard's metadata, as JSON: where along the first dimension the part of each tensor begins, by its name."""

_FOLDER = re.compile(r"shards_[0-9]{1,12}")
_FILE = re.compile(r"[0-9]{1,6}-of-[0-9]{1,6}\.safetensors")


@dataclass(frozen=True)
class Shards:
    """The files that a checkpoint's divided tensors lie in: their ``folder``, and each one's checksum by its name."""

    folder: Path
    files: Mapping[str, str]

    def to_text(self) -> str:
        """Return it as the checkpoint beside it keeps it: without where that lies."""
        return json.dumps({"folder": self.folder.name, "files": dict(self.files)})

    @staticmethod
    def of(text: str, checkpoint: Path) -> Shards:
        """Return what ``to_text`` wrote into ``checkpoint``. RunDirectoryError for what else it may say."""
        try:
            found = json.loads(text)
            folder, files = found["folder"], found["files"]
            fits = _FOLDER.fullmatch(folder) and all(map(_FILE.fullmatch, files))
            if not (fits and files and all(isinstance(checksum, str) for checksum in files.values())):
                raise ValueError
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise damaged(checkpoint, "what it says of its shards is not what was written") from error
        return Shards(checkpoint.parent / folder, files)

    def each(self) -> Iterator[tuple[str, int, Tensor]]:
        """Yield every part in the files: its tensor's name, where it begins, the part; one is in memory at a time.

        RunDirectoryError where a file is missing or is not, to the bit, the one that was written.
        """
        for name, checksum in self.files.items():
            starts, _ = self._header(name, checksum)
            metadata: dict[str, str] = {}
            for tensor, part in each_tensor(self.folder / name, metadata):
                if tensor not in starts or metadata.get("checksum") != checksum:  # it was replaced meanwhile
                    raise damaged(self.folder / name, "of another checkpoint")
                yield tensor, starts[tensor], part

    def check(self) -> None:
        """Raise RunDirectoryError unless every file is whole."""
        for _ in self.each():
            pass

    def parts(self, wanted: Mapping[str, InShards]) -> dict[str, list[tuple[int, int]]]:
        """Return where the parts of each tensor begin, and how many rows they have; nothing is read but headers.

        RunDirectoryError unless every row of every tensor is there once.
        """
        found: dict[str, list[tuple[int, int]]] = {name: [] for name in wanted}
        for file, checksum in self.files.items():
            starts, forms = self._header(file, checksum)
            for name in starts.keys() & wanted.keys():
                (dtype, shape), whole = forms[name], wanted[name]
                if dtype != whole.dtype or shape[1:] != whole.shape[1:]:
                    raise damaged(self.folder / file, f"{name[:60]}: a part that is none of it")
                found[name] += [(starts[name], shape[0])] if shape[0] else []
        for name, spans in found.items():
            end = 0
            for start, rows in sorted(spans):
                if start != end:
                    break
                end += rows
            if end != wanted[name].shape[0] or end != sum(rows for _, rows in spans):
                raise damaged(self.folder, f"{name[:60]}: a part of it is missing")
        return found

    def _header(self, name: str, checksum: str) -> tuple[dict[str, int], dict[str, tuple[torch.dtype, torch.Size]]]:
        path = self.folder / name
        metadata, forms = read_header(path)
        if metadata.get("checksum") != checksum:
            raise damaged(path, "of another checkpoint")
        try:
            starts = json.loads(metadata.get(STARTS, ""))
        except (ValueError, RecursionError):
            starts = None
        known = isinstance(starts, dict) and starts.keys() == forms.keys()
        if not known or not all(type(one) is int and forms[key][1] for key, one in starts.items()):
            raise damaged(path, "it does not tell where its parts belong")
        return starts, forms


@dataclass(frozen=True)
class InShards:
    """Stands in a state for a tensor that lies in ``shards``."""

    name: str
    dtype: torch.dtype
    shape: torch.Size
    shards: Shards


def taken_apart(state: Any, shards: Shards) -> tuple[Any, dict[str, Tensor]]:
    """Return nested ``state`` with an InShards for each of its DTensors, and these by name: "model/fc.weight"."""
    found: dict[str, Tensor] = {}

    def apart(value: Any, place: str) -> Any:
        if not is_sharded(value):
            return value
        while place in found:  # {"a": {"b": ...}, "a/b": ...}
            place += "'"
        found[place] = value
        return InShards(place, value.dtype, value.shape, shards)

    return replaced(state, apart), found


def replaced(state: Any, replace: Callable[[Any, str], Any], place: str = "") -> Any:
    """Return nested ``state`` with what ``replace(value, place)`` returns for each value that holds no others.

    What holds none that changes is the very same, whatever kind of mapping it is.
    """
    items: list[tuple[Any, Any]]
    if isinstance(state, Mapping):
        items = [*state.items()]
    elif isinstance(state, (list, tuple)):
        items = [*enumerate(state)]
    else:
        return replace(state, place)
    values = [replaced(value, replace, f"{place}/{key}".lstrip("/")) for key, value in items]
    if all(value is before for value, (_, before) in zip(values, items, strict=True)):
        return state
    if isinstance(state, Mapping):
        return dict(zip(state, values, strict=True))
    return tuple(values) if isinstance(state, tuple) else values


def in_shards(state: Any) -> tuple[Shards | None, dict[str, InShards]]:
    """Return what of nested ``state`` lies in shards, by name, and in which; None where nothing does."""
    found: dict[str, InShards] = {}

    def note(value: Any, place: str) -> Any:
        if isinstance(value, InShards):
            found[value.name] = value
        return value

    replaced(state, note)
    return next((one.shards for one in found.values()), None), found


def with_tensors(state: Any, tensors: Mapping[str, Any]) -> Any:
    """Return nested ``state`` with ``tensors`` in the places of what lies in shards, by name."""
    return replaced(state, lambda value, _: tensors[value.name] if isinstance(value, InShards) else value)


def put_together(state: Any) -> Any:
    """Return ``state`` with whole tensors, on the CPU, in the places of those in shards: all in this process's memory.

    Raises RunDirectoryError where a part is missing or damaged.
    """
    shards, wanted = in_shards(state)
    if shards is None:
        return state
    shards.parts(wanted)  # before there is memory for them, which is then no more than the files have
    tensors = {name: torch.empty(one.shape, dtype=one.dtype) for name, one in wanted.items()}
    for name, start, part in shards.each():
        if name in tensors:
            tensors[name][start : start + len(part)] = part
    return with_tensors(state, tensors)
