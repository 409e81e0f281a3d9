"""The commands: parse, call, print; every mistake of the user's is one line and exit code 2."""

from __future__ import annotations

import json
import os
import signal
import sys
import sysconfig
import traceback
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from neq_cli import __version__
from neq_cli.errors import NeqError, Terminated

if TYPE_CHECKING:
    from rich.console import RenderableType

    from neq_cli.recipe.file import LoadedRecipe
    from neq_cli.runs.run_reader import Run

# Typer's own errors; which module they live in differs between its versions.
_UsageError: Any = typer.BadParameter.__mro__[2]

app = typer.Typer(
    name="neq",
    help="Train any PyTorch model and stop updating the neurons that have reached equilibrium.",
    epilog="Example: neq train digits",
    invoke_without_command=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 1 failed, 2 bad usage or recipe, 130 interrupted, 143 terminated."""
    for stream in (sys.stdout, sys.stderr):
        # A terminal that knows no "±" gets a "?" rather than a traceback.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    ending = [number for number in (signal.SIGTERM, signal.SIGUSR1) if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, terminate) for number in ending}
    try:
        code = app(arguments, prog_name="neq", standalone_mode=False)
        if code == 130:  # what some Typers make of Ctrl-C, without a word
            raise KeyboardInterrupt
    except NeqError as error:
        _complain(str(error))
        code = error.exit_code
    except _UsageError as error:
        _complain(_usage_line(error))
        code = 2
    except (KeyboardInterrupt, typer.Abort) as error:
        _complain(f"interrupted; {error}" if str(error) else "interrupted")
        code = 130
        # Where the interrupt came inside some module's exec(), `python -m` would end by SIGINT, whatever the code is,
        # unless another exec() ends well (CPython 3.11).
        exec("")
    except Terminated as error:
        _complain(f"ended by {error.signal}; {error}" if str(error) else f"ended by {error.signal}")
        code = 143
    except BrokenPipeError:
        # The reader has gone, as in `neq inspect ... | head`.
        sys.stderr.close()
        code = 0
    except Exception as error:
        # Code of the user's own, such as a policy or a model, or a mistake of ours.
        if os.environ.get("NEQ_TRACEBACK"):
            raise
        _complain(_unexpected_line(error))
        code = 1
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if code and (distributed := _distributed()) is not None:
        distributed.joined().linger()
    sys.exit(code if isinstance(code, int) else 0)


def terminate(number: int, frame: FrameType | None) -> None:
    """Handle a signal that ends the program: end what runs so that it can say so."""
    raise Terminated(signal.Signals(number).name)


def _usage_line(error: Any) -> str:
    command = error.ctx.command_path if getattr(error, "ctx", None) else "neq"
    message = error.format_message().rstrip(".").replace("Value error, ", "")
    if hasattr(error.__cause__, "errors"):  # pydantic's, in newer Typers: it does not tell the value
        value = repr(error.__cause__.errors()[0]["input"])
        message += f", not {value}" if value not in message else ""
    return f"{command}: {message}; see `{command} --help`"


def _unexpected_line(error: Exception) -> str:
    """Say what was raised, and in which line of the user's own code where some of it took part."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = (str(Path(__file__).parent), sysconfig.get_path("purelib"), sysconfig.get_path("stdlib"))
    own = [frame for frame in frames if not frame.filename.startswith(ours)]
    place = (own or frames)[-1]
    message = " ".join(str(error).split())
    return (
        f"{place.filename}:{place.lineno}: {type(error).__name__}: {message}; "
        "set NEQ_TRACEBACK=1 to see how it came about"
    )


def _complain(message: str) -> None:
    distributed = _distributed()
    if distributed is None or distributed.joined().say_once(message):
        print(message, file=sys.stderr)


def _distributed() -> Any:
    """Return the module that knows of other processes; None where nobody has joined any, nor torch been imported."""
    return sys.modules.get("neq_cli.training.distributed")


def _version(wanted: bool) -> None:
    if wanted:
        print(f"neq {__version__}")
        raise typer.Exit


def _recipe_names(incomplete: str) -> list[str]:
    from neq_cli.recipe.source import shipped_names

    return [name for name in shipped_names() if name.startswith(incomplete)]


RecipeArgument = Annotated[
    str, typer.Argument(metavar="RECIPE", help="a file, or the name of a shipped recipe", autocompletion=_recipe_names)
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="changes, such as policy.epsilon=0.005 seed=2")
]
RunDirectory = Annotated[Path, typer.Argument(metavar="RUN_DIR", help="the folder of a run")]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON")]


@app.callback()
def _common(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version and exit")
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())


@app.command(epilog="Example: neq train digits epochs=5 policy.epsilon=0.005")
def train(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="DIR", help="run directory; default runs/RECIPE/TIME-sSEED")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps or auto; the same as device=...")] = None,
    progress: Annotated[
        Literal["auto", "rich", "plain", "off"], typer.Option(help="live dashboard, a line per epoch, or nothing")
    ] = "auto",
    resume: Annotated[
        bool, typer.Option("--resume", help="go on with the run in DIR, or with the recipe's newest unfinished one")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="build everything, train nothing")] = False,
) -> None:
    """Train a recipe, with neurons freezing and thawing, into a run directory.

    On several processes: torchrun --nproc-per-node N -m neq_cli train RECIPE.
    """
    from neq_cli.runs.progress import Silent, choose_progress
    from neq_cli.runs.run_dir import check_available, default_run_directory

    changes = [*(overrides or ()), *([f"device={device}"] if device else ())]
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    if output is not None and alone and not resume:
        check_available(output)  # before torch is imported, which takes seconds
    first = True if alone else _join()
    loaded = _load(recipe, changes, warn=first)
    if dry_run:
        _show_plan(loaded, output or default_run_directory(loaded.name, loaded.recipe.seed, datetime.now()))
        return
    from neq_cli import running

    run_directory = running.train(loaded, output, choose_progress(progress) if first else Silent(), resume=resume)
    if first and not sys.stdout.isatty():
        print(run_directory)


@app.command(epilog="Example: neq inspect runs/digits/20260131-120000-s1 --layer 'layer2.*'")
def inspect(
    run_directory: RunDirectory,
    epoch: Annotated[int | None, typer.Option(help="the state after this epoch; default the last")] = None,
    layer: Annotated[str | None, typer.Option(metavar="GLOB", help="only layers whose name matches")] = None,
    as_json: AsJson = False,
) -> None:
    """List a run's frozen neurons by layer, and what it saved."""
    from neq_cli.runs.inspection import inspect_run, to_json
    from neq_cli.runs.inspection_view import render
    from neq_cli.runs.run_reader import read_run

    inspection = inspect_run(read_run(run_directory), epoch, layer)
    if as_json:
        _print_json(to_json(inspection))
    else:
        _print(render(inspection))


@app.command(epilog="Example: neq compare runs/digits/* runs/digits-baseline/* --markdown")
def compare(
    run_directories: Annotated[list[Path], typer.Argument(metavar="RUN_DIR...", help="the folders of the runs")],
    baseline: Annotated[
        Path | None, typer.Option(metavar="RUN_DIR", help="the run to compare with; default the baseline policy's")
    ] = None,
    allow_differences: Annotated[
        bool, typer.Option("--allow-differences", help="also where data, model or epochs differ")
    ] = False,
    as_json: AsJson = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="print CSV")] = False,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="print a Markdown table")] = False,
    as_latex: Annotated[bool, typer.Option("--latex", help="print a LaTeX table")] = False,
) -> None:
    """Set runs side by side: FLOPs, accuracy and seconds, seeds folded into mean and deviation."""
    from neq_cli.runs import comparison_tables as tables
    from neq_cli.runs.comparison import compare_runs, to_json

    if as_json + as_csv + as_markdown + as_latex > 1:
        raise NeqError("neq compare: --json, --csv, --markdown and --latex exclude each other; choose one")
    runs = _read_runs(run_directories)
    against = _read_runs([baseline])[0] if baseline is not None else None
    compared = compare_runs(runs, against, allow_differences)
    if as_json:
        _print_json(to_json(compared))
        return
    for wanted, text in ((as_csv, tables.to_csv), (as_markdown, tables.to_markdown), (as_latex, tables.to_latex)):
        if wanted:
            print(text(compared).rstrip("\n"))
            return
    _print(tables.render(compared))


@app.command(epilog="Example: neq flops resnet32-cifar10 policy.kind=stochastic policy.p=0.5")
def flops(recipe: RecipeArgument, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Count one sample's back-propagation without training, averaged over the recipe's epochs."""
    from neq_cli.running import estimated_flops
    from neq_cli.runs.flops_view import render_flops

    loaded = _load(recipe, overrides)
    estimate = estimated_flops(loaded)
    if as_json:
        _print_json(estimate)
    else:
        _print(render_flops(loaded.name, estimate))


@app.command(epilog="Example: neq bench resnet32-cifar10 --fractions 0.5,0.9 --rounds 3")
def bench(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    fractions: Annotated[
        str, typer.Option(metavar="SHARE,...", help="shares of neurons to freeze, from 0 to 1")
    ] = "0,0.25,0.5,0.75,0.9,1",
    modes: Annotated[
        str, typer.Option(metavar="MODE,...", help="backward: exact, truncated (an approximation) or dense")
    ] = "exact,truncated",
    orders: Annotated[
        str, typer.Option(metavar="ORDER,...", help="random: in every layer; front: layer after layer from the input")
    ] = "random,front",
    rounds: Annotated[int, typer.Option(min=1, help="how often each is measured, by turns")] = 5,
    layers: Annotated[
        float | None, typer.Option(metavar="SHARE", help="the share to show layer by layer; default that nearest 0.5")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure a recipe's training step with neurons frozen, beside the dense step of plain PyTorch.

    On noise in the shape of the data where that is known, so that nothing is downloaded, and with random weights.
    """
    from neq_cli.running import measured_steps
    from neq_cli.runs.bench_view import bench_progress, render_bench
    from neq_cli.training.bench.options import parse_options

    options = parse_options(fractions, modes, orders, rounds, layers)  # before torch is imported, which takes seconds
    loaded = _load(recipe, overrides)
    with bench_progress() as show:
        result = measured_steps(loaded, options, show)
    if as_json:
        _print_json(result)
    else:
        _print(render_bench(result, options.layers))


@app.command(epilog="Example: neq validate resnet32-cifar10 epochs=100")
def validate(recipe: RecipeArgument, overrides: Overrides = None) -> None:
    """Check a recipe without opening its data, and print it with every default written out."""
    print(_load(recipe, overrides).resolved_yaml(), end="")


@app.command(epilog="Example: neq recipes")
def recipes() -> None:
    """List the recipes that ship with neq."""
    from rich.table import Table

    from neq_cli.recipe.shipped import list_recipes

    table = Table(box=None, pad_edge=False, show_header=False)
    for shipped in list_recipes():
        table.add_row(shipped.name, shipped.description)
    _print(table)


@app.command(epilog="Example: neq init digits my-experiment")
def init(
    name: Annotated[str, typer.Argument(metavar="NAME", help="a shipped recipe", autocompletion=_recipe_names)],
    folder: Annotated[Path, typer.Argument(metavar="[DIR]", help="where to put it")] = Path(),
) -> None:
    """Copy a shipped recipe here, to be changed."""
    from neq_cli.recipe.shipped import copy_recipe

    for path in copy_recipe(name, folder):
        print(path)


@app.command(epilog="Example: neq export runs/digits/20260131-120000-s1 -o digits.safetensors")
def export(
    run_directory: RunDirectory,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FILE", help="the .safetensors file to write")],
    source: Annotated[
        Literal["final", "best", "last"], typer.Option("--from", help="final weights, or those of a checkpoint")
    ] = "final",
) -> None:
    """Write a run's weights as one plain state_dict in safetensors."""
    from neq_cli.runs.run_reader import read_run

    run = read_run(run_directory)
    path = run.files.weights if source == "final" else run.files.checkpoint(source)
    if not path.is_file():
        raise NeqError(f"{path}: not there yet; the run wrote it not, try --from last")
    if output.exists():
        raise NeqError(f"{output}: already exists; choose another with -o")
    if output.suffix != ".safetensors":
        raise NeqError(f"{output}: must end in .safetensors")
    from neq_cli.runs.run_dir import atomic_write, writing
    from neq_cli.training.checkpoint import read_weights, save_weights

    weights = read_weights(path)
    with writing(output):
        atomic_write(output, lambda partial: save_weights(weights, partial, {"recipe": run.recipe_name}))
    print(output)


def _join() -> bool:
    """Join the processes that torchrun started; returns whether this is the one that speaks for all."""
    from neq_cli.training.distributed import join

    return join().first


def _load(reference: str, overrides: Sequence[str] | None, *, warn: bool = True) -> LoadedRecipe:
    """Return the checked recipe; its warnings go to stderr, unless another process says them."""
    from neq_cli.recipe.file import load_recipe
    from neq_cli.recipe.keys import warnings
    from neq_cli.recipe.source import find_recipe
    from neq_cli.training.checks import check_section
    from neq_cli.training.entrypoints import add_import_folder

    # Before the checks: they import entrypoints, which may lie beside the recipe.
    add_import_folder(find_recipe(reference).parent)
    loaded = load_recipe(reference, overrides or (), checks=[check_section])
    for warning in warnings(loaded.recipe) if warn else ():
        _complain(f"warning: {warning}")
    return loaded


def _read_runs(paths: Sequence[Path]) -> list[Run]:
    from neq_cli.runs.run_reader import read_run

    return [read_run(path) for path in paths]


def _show_plan(loaded: LoadedRecipe, run_directory: Path) -> None:
    from rich.console import Console

    from neq_cli.running import prepared
    from neq_cli.runs.formatting import format_flops
    from neq_cli.runs.progress import PlainProgress

    session = prepared(loaded)
    PlainProgress(Console(file=sys.stdout)).show(session.started)
    flops = session.trainer.freezer.flops()
    print(
        f"{format_flops(flops.paper)} FLOPs per sample and iteration in the paper's accounting, "
        f"{format_flops(flops.executed)} executed"
    )
    print(f"would write {run_directory}")


def _print(content: RenderableType) -> None:
    from rich.console import Console

    Console().print(content)


def _print_json(content: Any) -> None:
    print(json.dumps(content, indent=2))
