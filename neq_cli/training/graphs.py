"""A network as a graph that runs without its code, TorchScript or ONNX: on the CPU, in float32, for any batch size.

Written, then run on other images than it was made with, beside the network itself: what differs is not kept.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from neq_cli.errors import NeqError, one_line
from neq_cli.text import counted, escaped
from neq_cli.training.data.catalogue import Shape
from neq_cli.training.models.outputs import main_output

GraphFormat = Literal["torchscript", "onnx"]
INPUT, OUTPUT = "images", "logits"
_LARGEST = 2**31 - 2**24  # bytes; an ONNX file is one protocol buffer, of less than 2 GiB
_CLOSE = 2.0**-10
"""Of the largest output. Float32 carries 24 bits, of which other kernels and sums in another order cost a few; a graph
that is not the network's (training's batch norms, a batch size that was written down) is off by far more."""
_NOT_KEPT = "not written: take another --format"
_JIT: Any = torch.jit  # parts of which have types in some versions of torch alone
_Run = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class GraphOf:
    """What a graph is made of: a network in eval mode on the CPU, and what it sees of an image, the batch apart.

    ``any_size``: its images come in sizes that differ, as those of a segmentation do.
    """

    model: nn.Module
    shape: Shape
    any_size: bool = False


class _Logits(nn.Module):
    """The network, of whose outputs the one that predictions are read from is left."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return main_output(self.model(images))


def check_libraries(form: GraphFormat) -> None:
    """Raise NeqError, one line, where what writes such a graph is not installed."""
    if form == "onnx":
        try:
            import_module("onnxscript")  # which torch's exporter needs
        except ImportError as error:
            raise NeqError(f"--format onnx needs onnxscript ({one_line(error)}); pip install 'neq[onnx]'") from error


def save_graph(graph: GraphOf, form: GraphFormat, path: Path, metadata: Mapping[str, str], name: str) -> list[str]:
    """Write ``graph`` to ``path``, with ``metadata`` in it, and return notes on what does not hold of it.

    It takes ``images``, float32 [batch, channels, height, width], and returns ``logits``. Raises NeqError, one line
    that calls the file ``name``, where torch cannot write such a graph or it differs from the network.
    """
    save, opened = (_save_torchscript, _torchscript) if form == "torchscript" else (_save_onnx, _onnx)
    with torch.no_grad(), _quiet() as heard:
        with _one_line(name, f"torch cannot write this model as {form}"):
            save(graph, path, metadata)
        notes = []
        if any("torch.jit" in str(warning.message) and "deprecated" in str(warning.message) for warning in heard):
            version = torch.__version__
            notes.append(f"torch {version} calls TorchScript deprecated; --format onnx is for what has to last")
        with _one_line(name, "the graph cannot be opened again"):
            run = opened(path)
        if run is None:
            return [*notes, "the graph was not tried: onnxruntime is not installed; pip install 'neq[onnx]'"]
        for count in (1, 3):
            with _one_line(name, f"the graph fails on {counted(count, 'image')}"):
                difference = _difference(graph, run, _noise(count, graph.shape, seed=1 + count))
            if not difference <= _CLOSE:
                what = f"its outputs differ from the network's by {difference:.2g} of the largest"
                raise NeqError(f"{escaped(name)}: {what}, on {counted(count, 'image')}; {_NOT_KEPT}")
        if graph.any_size and not _takes_another_size(graph, run):
            _, height, width = graph.shape
            size = f"{width}x{height} alone (width x height)"
            notes.append(f"the graph takes images of {size}, which the network does not")
        return notes


@contextmanager
def _one_line(name: str, what: str) -> Iterator[None]:
    """Turn whatever an exporter or a runtime raises into one line; of errors that led to others the first says why."""
    try:
        yield
    except (NeqError, OSError):
        raise
    except Exception as error:
        first: BaseException = error
        while first.__cause__ is not None:
            first = first.__cause__
        raise NeqError(f"{escaped(name)}: {what} ({one_line(first)}); {_NOT_KEPT}") from error


def _save_torchscript(graph: GraphOf, path: Path, metadata: Mapping[str, str]) -> None:
    traced = _JIT.trace(_Logits(graph.model).eval(), _noise(2, graph.shape, seed=1), check_trace=False)
    with path.open("wb") as file:
        _JIT.save(traced, file, _extra_files=dict(metadata))


def _torchscript(path: Path) -> _Run:
    run: _Run = _JIT.load(path, map_location="cpu")
    return run


def _save_onnx(graph: GraphOf, path: Path, metadata: Mapping[str, str]) -> None:
    size = sum(tensor.nbytes for tensor in graph.model.state_dict().values())
    if size > _LARGEST:
        raise NeqError(f"--format onnx: {size / 2**30:.1f} GiB of weights, and one file holds 2; take another --format")
    batch, sides = {0: torch.export.Dim.DYNAMIC}, {2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO}
    try:
        program = _onnx_program(graph, batch | sides if graph.any_size else batch)
    except Exception:
        if not graph.any_size:
            raise
        program = _onnx_program(graph, batch)  # for images of one size, which save_graph finds out, and says
    program.model.metadata_props.update(metadata)
    program.save(path, external_data=False)


def _onnx_program(graph: GraphOf, dynamic: Mapping[int, Any]) -> torch.onnx.ONNXProgram:
    """Return the graph with these dimensions of its images left open."""
    program = torch.onnx.export(
        _Logits(graph.model).eval(),
        (_noise(2, graph.shape, seed=1),),
        dynamo=True,
        dynamic_shapes=(dynamic,),
        input_names=[INPUT],
        output_names=[OUTPUT],
        verbose=False,
    )
    assert program is not None  # as with dynamo=True
    return program


def _onnx(path: Path) -> _Run | None:
    try:
        onnxruntime = import_module("onnxruntime")
    except ImportError:
        return None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors; its warnings are of its own affairs
    session = onnxruntime.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run([OUTPUT], {INPUT: images.numpy()})[0])


def _takes_another_size(graph: GraphOf, run: _Run) -> bool:
    """Whether the graph, too, takes images of another size; True where the network takes none either."""
    channels, height, width = graph.shape
    images = _noise(1, (channels, height + 32, width + 64), seed=5)
    try:
        graph.model(images)
    except Exception:
        return True
    try:
        return _difference(graph, run, images) <= _CLOSE
    except Exception:
        return False


def _difference(graph: GraphOf, run: _Run, images: Tensor) -> float:
    """Return the largest difference, in units of the largest number that is expected; ValueError for other shapes."""
    expected, found = _Logits(graph.model)(images), run(images)
    if expected.shape != found.shape:
        raise ValueError(f"outputs of shape {list(found.shape)} for {list(expected.shape)}")
    largest = expected.abs().max().clamp(min=torch.finfo(torch.float32).tiny)
    return float((expected - found).abs().max() / largest)


def _noise(count: int, shape: Shape, seed: int) -> Tensor:
    # A generator of its own: nobody's random numbers are changed by an export.
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))


@contextmanager
def _quiet() -> Iterator[list[warnings.WarningMessage]]:
    """Collect warnings, and keep exporters from logging theirs: what comes of them is tried."""
    level = logging.root.manager.disable
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        logging.disable(max(level, logging.WARNING))
        try:
            yield heard
        finally:
            logging.disable(level)
