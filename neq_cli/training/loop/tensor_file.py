"""Tensors and text in one safetensors file with a checksum; one tensor is copied at a time, and nothing is mapped.

By hand: safetensors' writer holds a second copy of all tensors, and its reader maps the file, so that a file that is
cut meanwhile ends the process.
"""

from __future__ import annotations

import json
import os
import stat
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TypeGuard

import torch
from torch import Tensor

from neq_cli.errors import RunDirectoryError, TrainingError
from neq_cli.text import escaped

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_LARGEST_HEADER = 32 * 2**20  # bytes
_MOST_MARKS = 2_000_000  # commas and brackets of a header, which bound what its JSON can become in memory
_MOST_DIMENSIONS = 64
# The checksum is that of the whole file with zeros in its own place, which is therefore always the same.
_CHECKSUM_FIRST = b'{"__metadata__":{"checksum":"'
_NO_CHECKSUM = b"00000000"


def write_tensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], path: Path) -> str:
    """Write a safetensors file; ``metadata`` gets the key ``checksum``, a CRC-32 over all bytes of the file, returned.

    Tensors may lie on any device, share memory and have any strides; at most one at a time is copied. TrainingError
    for tensors that the format does not know; failures of the disk pass through as OSError.
    """
    # By size of element, so that every tensor is aligned.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    entries: dict[str, Any] = {}
    end = 0
    for name, tensor in ordered:
        if tensor.layout is not torch.strided or tensor.is_meta or tensor.dtype not in _NAMES:
            kind = f"{tensor.layout} {tensor.dtype} tensor on {tensor.device}".replace("torch.", "")
            raise TrainingError(f"{escaped(str(path))}: {escaped(name)}: a {kind} cannot be stored")
        begin, end = end, end + tensor.numel() * tensor.element_size()
        entries[_text(name)] = {"dtype": _NAMES[tensor.dtype], "shape": [*tensor.shape], "data_offsets": [begin, end]}
    own = {"checksum": _NO_CHECKSUM.decode(), **{_text(key): _text(value) for key, value in metadata.items()}}
    header = json.dumps({"__metadata__": own, **entries}, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    if len(entries) != len(tensors) or len(header) > _LARGEST_HEADER or _marks(header) > _MOST_MARKS:
        raise TrainingError(
            f"{escaped(str(path))}: {len(tensors)} tensors with {len(header)} bytes to describe them; at most "
            f"{_LARGEST_HEADER} bytes, {_MOST_MARKS} commas and brackets, and names that differ as UTF-8"
        )
    with path.open("wb") as file:
        checksum = 0
        for part in (len(header).to_bytes(8, "little"), header):
            file.write(part)
            checksum = zlib.crc32(part, checksum)
        for _, tensor in ordered:
            if tensor.numel():
                part = _bytes_of(tensor.detach().cpu().resolve_conj().resolve_neg().contiguous())
                file.write(part)
                checksum = zlib.crc32(part, checksum)
        file.seek(8 + len(_CHECKSUM_FIRST))
        file.write(b"%08x" % checksum)
    return f"{checksum:08x}"


def read_tensors(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Return metadata and tensors of a safetensors file, each tensor in memory of its own on the CPU.

    Where the file has a checksum (``checksum`` is then in the metadata) it was verified. Beside the tensors, which are
    never larger than the file, memory stays within some hundred MiB. Raises RunDirectoryError, one line, for all else.
    """
    metadata: dict[str, str] = {}
    tensors = dict(each_tensor(path, metadata))
    return metadata, tensors


def each_tensor(path: Path, metadata: dict[str, str]) -> Iterator[tuple[str, Tensor]]:
    """Yield what ``read_tensors`` returns, one after the other; ``metadata`` is filled before the first.

    A checksum that does not fit is told after the last.
    """
    with _opened(path) as (file, size):
        yield from _read(file, size, metadata)


def read_header(path: Path) -> tuple[dict[str, str], dict[str, tuple[torch.dtype, torch.Size]]]:
    """Return the metadata of a safetensors file, and dtype and shape of each tensor; nothing is verified by a checksum.

    Raises RunDirectoryError as ``read_tensors`` does.
    """
    with _opened(path) as (file, size):
        header = _header(file, size)
        metadata, entries = _parse(header, size - 8 - len(header))
        return metadata, {name: (dtype, torch.Size(shape)) for name, dtype, shape, _ in entries}


@contextmanager
def _opened(path: Path) -> Iterator[tuple[BinaryIO, int]]:
    """Open a file of tensors, and tell its size. Inside, RunDirectoryError, one line, is raised for what is wrong."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe would be waited for
        with os.fdopen(descriptor, "rb") as file:
            state = os.fstat(file.fileno())
            if not stat.S_ISREG(state.st_mode):
                raise _Damage("not a regular file")
            yield file, state.st_size
    except FileNotFoundError as error:
        raise RunDirectoryError(f"{escaped(str(path))}: missing") from error
    except _Damage as damage:
        raise damaged(path, str(damage)) from damage
    except OSError as error:
        reason = escaped(error.strerror or str(error))
        raise RunDirectoryError(f"{escaped(str(path))}: cannot be read: {reason}") from error
    except (MemoryError, RuntimeError) as error:  # RuntimeError: torch's allocator
        raise damaged(path, f"{type(error).__name__}: too large for the memory") from error


def damaged(path: Path, reason: str) -> RunDirectoryError:
    """Return the error for a file of tensors that is not as it was written."""
    return RunDirectoryError(f"{escaped(str(path))}: damaged ({escaped(reason)}); use another, or train again")


class _Damage(Exception):
    """What is wrong with a file, without its name."""


def _read(file: BinaryIO, size: int, metadata: dict[str, str]) -> Iterator[tuple[str, Tensor]]:
    header = _header(file, size)
    found, entries = _parse(header, size - 8 - len(header))
    metadata.update(found)
    start = len(header).to_bytes(8, "little")
    place = len(_CHECKSUM_FIRST)
    claimed, rest = header[place : place + len(_NO_CHECKSUM)], header[place + len(_NO_CHECKSUM) :]
    checksum = 0
    for known in (start, _CHECKSUM_FIRST, _NO_CHECKSUM, rest):
        checksum = zlib.crc32(known, checksum)
    for name, dtype, shape, length in entries:
        content = torch.empty(length, dtype=torch.uint8)
        if length:
            part = content.numpy()
            if file.readinto(part.data) != length:  # type: ignore[attr-defined]
                raise _Damage("cut short while it was read")
            checksum = zlib.crc32(part.data, checksum)
            if dtype is torch.bool and part.max() > 1:
                raise _Damage(f"{name[:60]}: a truth value that is neither 0 nor 1")
        yield name, content.view(dtype).reshape(shape) if length else torch.empty(shape, dtype=dtype)
    if header.startswith(_CHECKSUM_FIRST):
        if claimed != b"%08x" % checksum:
            raise _Damage("its checksum does not fit")
    elif "checksum" in metadata:
        raise _Damage("its checksum is not where it belongs")


def _header(file: BinaryIO, size: int) -> bytes:
    length = int.from_bytes(file.read(8), "little")
    if size < 10 or length > size - 8:
        raise _Damage("cut short, or not a safetensors file")
    if length > _LARGEST_HEADER:
        raise _Damage(f"a header of {length} bytes")
    header = file.read(length)
    if len(header) != length:
        raise _Damage("cut short while it was read")
    return header


def _parse(header: bytes, data: int) -> tuple[dict[str, str], list[tuple[str, Any, list[int], int]]]:
    """Return metadata and, in the order of the file, each tensor's name, dtype, shape and number of bytes."""
    if _marks(header) > _MOST_MARKS:
        raise _Damage("a header of millions of entries")
    try:
        document = json.loads(header)
    except (ValueError, RecursionError) as error:
        raise _Damage("its header is not that of a safetensors file") from error
    metadata = document.pop("__metadata__", {}) if isinstance(document, dict) else None
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _Damage("its header is not that of a safetensors file")
    entries = sorted((_entry(name, entry) for name, entry in document.items()), key=lambda found: found[:2])
    end = 0
    for begin, until, name, _, _ in entries:
        if begin != end:
            raise _Damage(f"{name[:60]}: its place in the file is not where the one before ends")
        end = until
    if end != data:
        raise _Damage(f"{data} bytes of tensors where {end} belong")
    return metadata, [(name, dtype, shape, until - begin) for begin, until, name, dtype, shape in entries]


def _entry(name: str, entry: object) -> tuple[int, int, str, torch.dtype, list[int]]:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise _Damage(f"{name[:60]}: not a tensor's entry")
    dtype = _DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        raise _Damage(f"{name[:60]}: a dtype that neq does not know")
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not are_sizes(shape) or not are_sizes(offsets, 2) or len(offsets) != 2:
        raise _Damage(f"{name[:60]}: its shape or place is not one")
    length = dtype.itemsize
    for dimension in shape:
        length *= dimension
    if length != offsets[1] - offsets[0]:
        raise _Damage(f"{name[:60]}: its shape does not fit its bytes")
    return offsets[0], offsets[1], name, dtype, shape


def dtype_name(dtype: torch.dtype) -> str:
    """Return what safetensors calls a dtype; the dtype's own name where it has none, which no file can hold."""
    return _NAMES.get(dtype, str(dtype))


def dtype_named(name: object) -> torch.dtype:
    """Return the dtype of that name in safetensors. ValueError where there is none."""
    if not isinstance(name, str) or name not in _DTYPES:
        raise ValueError("dtype")
    return _DTYPES[name]


def are_sizes(value: object, most: int = _MOST_DIMENSIONS) -> TypeGuard[list[int]]:
    """Whether ``value`` is a list of sizes, such as a shape."""
    if not isinstance(value, list) or len(value) > most:
        return False
    return all(type(item) is int and 0 <= item < 2**62 for item in value)


def _marks(header: bytes) -> int:
    return sum(map(header.count, (b",", b"[", b"{")))


def _bytes_of(tensor: Tensor) -> Any:
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _text(text: str) -> str:
    # Lone surrogates, which JSON can write and UTF-8 cannot, are refused by other readers.
    return text.encode("utf-8", "replace").decode()
