"""A state dict in a file that ``torch.load(weights_only=True)`` reads, with text beside it; pickled code is never run.

The text lies in the archive as TorchScript's extra files do, where torch.load does not look.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError

import torch
from torch import Tensor

from neq_cli.errors import NeqError, one_line
from neq_cli.text import escaped
from neq_cli.training.loop.checkpoint import Weights, told_epoch
from neq_cli.training.loop.tensor_file import damaged

INSTEAD_OF_GRAPH = "give the run, or what `neq export` writes of it as .safetensors or .pt"
_EXTRA = "/extra/"
_GRAPH = "/constants.pkl"  # which TorchScript's archives alone have
_LONGEST_TEXT = 2**24  # bytes
_MOST_TEXTS = 100


def save_torch(state_dict: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """Write a plain dictionary of tensors, in memory of their own. Failures of the disk pass through as OSError."""
    with path.open("wb") as file:
        torch.save({name: tensor.detach().cpu().contiguous() for name, tensor in state_dict.items()}, file)
    with zipfile.ZipFile(path, "a") as archive:
        root = _root(archive)
        for key, text in metadata.items():
            archive.writestr(zipfile.ZipInfo(f"{root}{_EXTRA}{key}"), text)  # without the time: equal bytes


def read_torch(path: Path) -> Weights:
    """Return the state dict in a file of ``torch.save``, and the text beside it where ``save_torch`` wrote it.

    Raises NeqError, one line, where it is a TorchScript graph, damaged, or holds more than tensors.
    """
    try:
        metadata = _texts(path)
        contents = torch.load(path, map_location="cpu", weights_only=True)
    except NeqError:
        raise
    except UnpicklingError as error:
        raise damaged(path, "or it holds more than plain tensors") from error
    except Exception as error:  # whatever a zip, an unpickler and a tensor's shape can have wrong with them
        raise damaged(path, one_line(error)) from error
    if not isinstance(contents, Mapping) or not all(isinstance(tensor, Tensor) for tensor in contents.values()):
        raise NeqError(f"{escaped(str(path))}: holds no state_dict of tensors; save model.state_dict()")
    return Weights({str(name): tensor for name, tensor in contents.items()}, metadata, told_epoch(metadata))


def _texts(path: Path) -> dict[str, str]:
    if not zipfile.is_zipfile(path):  # as torch.save wrote before 1.6
        return {}
    with zipfile.ZipFile(path) as archive:
        if f"{_root(archive)}{_GRAPH}" in archive.namelist():
            raise NeqError(f"{escaped(str(path))}: is a TorchScript graph, for torch.jit.load; {INSTEAD_OF_GRAPH}")
        start = f"{_root(archive)}{_EXTRA}"
        texts = [info for info in archive.infolist() if info.filename.startswith(start)]
        if len(texts) > _MOST_TEXTS or any(info.file_size > _LONGEST_TEXT for info in texts):
            raise damaged(path, "text of many megabytes beside the tensors")
        # torch.load looks at no checksum, and torch.save may be told to leave them out; what is told here has all.
        if texts and (broken := archive.testzip()):
            raise damaged(path, f"the checksum of {broken} does not fit")
        return {info.filename.removeprefix(start): archive.read(info).decode() for info in texts}


def _root(archive: zipfile.ZipFile) -> str:
    return next(iter(archive.namelist()), "").partition("/")[0]
