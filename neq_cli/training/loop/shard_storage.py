"""Divided tensors go through torch.distributed.checkpoint into shards, and come back on any number of processes.

The storage is by hand: torch's own for safetensors keeps no checksum, does not say how large a tensor was whose last
rows are missing, and maps files, so that one that is cut meanwhile ends the process.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor, empty
from torch.futures import Future

from neq_cli.errors import NeqError, TrainingError, one_line
from neq_cli.training.loop.shards import STARTS, InShards, Shards, in_shards, with_tensors
from neq_cli.training.loop.tensor_file import write_tensors


def write_shards(tensors: Mapping[str, Tensor], folder: Path) -> dict[str, str]:
    """Write ``tensors``, DTensors, into ``folder``, which is made: each process its parts, into a file of its own.

    All processes call it together, and when it returns everything is on the disk. Returns the checksum of each file by
    its name, in the first process; {} in the others. Raises TrainingError in all, one line, where one cannot write.
    """
    writer = _Writer(folder)
    try:
        save(dict(tensors), storage_writer=writer)
    except CheckpointException as error:
        raise _reason(error, folder) from error
    return writer.files


def read_shards(state: Any, mesh: DeviceMesh) -> Any:
    """Return nested ``state`` with DTensors over ``mesh`` in the places of what lies in shards, divided as there.

    All processes call it together; each reads all files, and keeps its part. Raises NeqError, one line, where that
    fails.
    """
    shards, wanted = in_shards(state)
    if shards is None:
        return state
    reader = _Reader(shards, wanted)
    reader.read_metadata()  # before there is memory for them, which is then no more than the files have
    found: dict[str, Any] = {
        name: empty(*one.shape, dtype=one.dtype, device_mesh=mesh, placements=[Shard(0)])
        for name, one in wanted.items()
    }
    try:
        load(found, storage_reader=reader)
    except CheckpointException as error:
        raise _reason(error, shards.folder) from error
    return with_tensors(state, found)


def divided(whole: Tensor, mesh: DeviceMesh) -> DTensor:
    """Return the DTensor of ``whole``, which every process has, divided over ``mesh`` as ``fully_shard`` divides."""
    return distribute_tensor(whole.to(mesh.device_type), mesh, [Shard(0)], src_data_rank=None)


class _Writer(StorageWriter):
    """Writes the parts of each process into ``folder/N-of-COUNT.safetensors``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: dict[str, str] = {}  # once finished, in the first process

    def reset(self, checkpoint_id: Any = None) -> None:
        """Nothing is kept from one checkpoint to the next."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        if is_coordinator:
            self.folder.mkdir()

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        count = len(plans)
        return [replace(plan, storage_data=f"{number}-of-{count}.safetensors") for number, plan in enumerate(plans, 1)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        parts: dict[str, Tensor] = {}
        starts: dict[str, int] = {}
        for item in plan.items:
            part = planner.resolve_data(item)
            assert isinstance(part, Tensor), "only tensors are handed over"
            assert item.index.fqn not in parts, "along one dimension a process has one part"
            parts[item.index.fqn] = part
            starts[item.index.fqn] = item.index.offset[0] if item.index.offset else 0
        path = self.folder / plan.storage_data
        checksum = write_tensors(parts, {"format": "pt", STARTS: json.dumps(starts)}, path)
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        done: Future[list[WriteResult]] = Future()
        done.set_result([WriteResult(item.index, 0, (plan.storage_data, checksum)) for item in plan.items])
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        self.files = dict(sorted({one.storage_data for written in results for one in written}))

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return False  # it is never chosen by a path


class _Reader(StorageReader):
    """Reads those parts of ``shards`` that a process needs of ``wanted``, file by file and tensor by tensor."""

    def __init__(self, shards: Shards, wanted: Mapping[str, InShards]) -> None:
        self.shards, self.wanted = shards, wanted

    def reset(self, checkpoint_id: Any = None) -> None:
        """Nothing is kept from one checkpoint to the next."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        parts = self.shards.parts(self.wanted)
        return Metadata({name: _chunks(one, parts[name]) for name, one in self.wanted.items()})

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """All is known by ``read_metadata``."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        asked: dict[tuple[str, int], list[Any]] = {}
        for item in plan.items:
            assert item.type == LoadItemType.TENSOR, "only tensors are handed over"
            index: MetadataIndex = item.storage_index
            asked.setdefault((index.fqn, index.offset[0] if index.offset else 0), []).append(item)
        for name, start, part in self.shards.each():
            for item in asked.get((name, start), ()):
                target, begin = planner.resolve_tensor(item).detach(), item.storage_offsets[0]
                target.copy_(part[begin : begin + item.lengths[0]])
                planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return False  # it is never chosen by a path


def _chunks(whole: InShards, parts: Iterable[tuple[int, int]]) -> TensorStorageMetadata:
    rest = whole.shape[1:]
    chunks = [
        ChunkStorageMetadata(torch.Size([start, *[0] * len(rest)]), torch.Size([rows, *rest])) for start, rows in parts
    ]
    return TensorStorageMetadata(TensorProperties(whole.dtype), whole.shape, chunks)


def _reason(error: CheckpointException, folder: Path) -> BaseException:
    """Return what is to be raised for a failure of one or more processes, the same in all; a signal as it came."""
    failures = [(rank, one) for rank, (one, _) in sorted(error.failures.items(), key=lambda item: item[0])]
    for _, one in failures:
        if not isinstance(one, Exception) or isinstance(one, NeqError):
            return one
    rank, first = failures[0]
    said = first.strerror if isinstance(first, OSError) and first.strerror else one_line(first)
    return TrainingError(f"{folder}: process {rank} cannot read or write its part ({said}); finished epochs are kept")
