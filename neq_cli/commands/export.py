"""``neq export``: a run's weights as one plain state_dict, or its model as a graph."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from neq_cli.commands.shared import RunDirectory


def export(
    run_directory: RunDirectory,
    output: Annotated[
        Path,
        typer.Option("-o", "--output", metavar="FILE", help="the file to write: .safetensors, .pt, .ts or .onnx"),
    ],
    source: Annotated[
        Literal["final", "best", "last"], typer.Option("--from", help="final weights, or those of a checkpoint")
    ] = "final",
    form: Annotated[
        Literal["safetensors", "torch", "torchscript", "onnx"] | None,
        typer.Option("--format", help="default what FILE ends in"),
    ] = None,
) -> None:
    """Write a run's weights as one plain state_dict, in safetensors or torch's own format, or its model as a graph.

    A graph, TorchScript or ONNX, runs without neq and without the model's code. It is run beside the model before it is
    kept. To make it, the Python files that the run's recipe names are imported; for a state_dict none are.
    """
    from neq_cli.jobs.export import export as exported

    exported(run_directory, output, source, form)
    print(output)
