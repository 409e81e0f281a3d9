"""Puts the commands together as one application of Typer's, each with an example."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from neq_cli import __version__
from neq_cli.commands.bench import bench
from neq_cli.commands.citation import CITATION
from neq_cli.commands.compare import compare
from neq_cli.commands.evaluate import evaluate
from neq_cli.commands.export import export
from neq_cli.commands.flops import flops
from neq_cli.commands.inspect import inspect
from neq_cli.commands.list import list_runs
from neq_cli.commands.predict import predict
from neq_cli.commands.recipes import init, recipes
from neq_cli.commands.report import report
from neq_cli.commands.schema import schema
from neq_cli.commands.sweep import sweep
from neq_cli.commands.train import train
from neq_cli.commands.validate import validate

_ANY_LENGTH = 10_000


class Command(TyperCommand):
    """A command whose sentence stands whole in the list of commands, and whose arguments as we write them in its usage.

    Typer cuts the one where the line ends, and newer ones put brackets of their own around the other.
    """

    def get_short_help_str(self, limit: int = 0) -> str:
        """Return the first sentence of its help, of any length: what lists it breaks lines."""
        return super().get_short_help_str(_ANY_LENGTH)

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """Return what follows the command's name in the line of its usage."""
        arguments = [param.metavar for param in self.params if param.param_type_name == "argument"]
        return ["[OPTIONS]", *filter(None, arguments)]


app = typer.Typer(
    name="neq",
    help="Train any PyTorch model and stop updating the neurons that have reached equilibrium.",
    epilog="Example: neq train digits",
    invoke_without_command=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"neq {__version__}")
        raise typer.Exit


def _citation(wanted: bool) -> None:
    if wanted:
        print(CITATION, end="")
        raise typer.Exit


@app.callback()
def _common(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version and exit")
    ] = False,
    citation: Annotated[
        bool, typer.Option("--citation", callback=_citation, is_eager=True, help="print what to cite, as BibTeX")
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())


for command, example in (
    (train, "neq train digits epochs=5 policy.epsilon=0.005"),
    (inspect, "neq inspect runs/digits/20260131-120000-s1 --layer 'layer2.*'"),
    (list_runs, "neq list runs/digits"),
    (compare, "neq compare runs/digits runs/digits-baseline --markdown"),
    (report, "neq report runs/digits/* runs/digits-baseline/* -o report.html --svg figures"),
    (evaluate, "neq evaluate runs/digits/20260131-120000-s1 -o confusion.png"),
    (predict, "neq predict runs/digits/20260131-120000-s1 seven.png scans --top 3"),
    (flops, "neq flops resnet32-cifar10 policy.kind=stochastic policy.p=0.5"),
    (bench, "neq bench resnet32-cifar10 --fractions 0.5,0.9 --rounds 3"),
    (sweep, "neq sweep digits policy.epsilon=0.001,0.01 seed=1,2,3 --jobs 2"),
    (validate, "neq validate resnet32-cifar10 epochs=100"),
    (recipes, "neq recipes"),
    (init, "neq init --data ~/data/pets pets.yaml"),
    (schema, "neq schema -o neq.schema.json"),
    (export, "neq export runs/digits/20260131-120000-s1 -o digits.onnx"),
):
    app.command(example.split()[1], cls=Command, epilog=f"Example: {example}")(command)
