"""The commands: parse, call, print; every mistake of the user's is one line and exit code 2."""

from __future__ import annotations

import os
import signal
import sys
import sysconfig
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from neq_cli import __version__
from neq_cli.commands import recipes, results, training
from neq_cli.commands.shared import complain, joined_processes, warning_line
from neq_cli.errors import NeqError, Terminated

if TYPE_CHECKING:
    pass

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
    ending = [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1]
    ending = [number for number in ending if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, terminate) for number in ending}
    format_before, warnings.formatwarning = warnings.formatwarning, warning_line
    try:
        code = app(arguments, prog_name="neq", standalone_mode=False)
        if code == 130:  # what some Typers make of Ctrl-C, without a word
            raise KeyboardInterrupt
    except NeqError as error:
        complain(str(error))
        code = error.exit_code
    except _UsageError as error:
        complain(_usage_line(error))
        code = 2
    except (KeyboardInterrupt, typer.Abort):
        complain("interrupted")
        code = 130
        # Where the interrupt came inside some module's exec(), `python -m` would end by SIGINT, whatever the code is,
        # unless another exec() ends well (CPython 3.11).
        exec("")
    except Terminated as error:
        how = "interrupted" if error.signal == "SIGINT" else f"ended by {error.signal}"
        complain(f"{how}; {error}" if str(error) else how)
        code = 130 if error.signal == "SIGINT" else 143
    except BrokenPipeError:
        # The reader has gone, as in `neq inspect ... | head`.
        sys.stderr.close()
        code = 0
    except (Exception, SystemExit) as error:
        # Code of the user's own, such as a policy or a model, or a mistake of ours. An exit that was asked for there
        # is no end of the command's: a job that trained nothing must not count as done.
        if os.environ.get("NEQ_TRACEBACK") or _is_typers_exit(error):
            raise
        complain(_unexpected_line(error))
        code = 1
    finally:
        warnings.formatwarning = format_before
        for number, handler in before.items():
            signal.signal(number, handler)
    if code and (distributed := joined_processes()) is not None:
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


def _is_typers_exit(error: BaseException) -> bool:
    """Whether ``error`` ends a shell's completion: no command had begun."""
    commands = str(Path(training.__file__).parent)
    begun = any(frame.filename.startswith(commands) for frame in traceback.extract_tb(error.__traceback__))
    return isinstance(error, SystemExit) and not begun


def _unexpected_line(error: BaseException) -> str:
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


def _version(wanted: bool) -> None:
    if wanted:
        print(f"neq {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version and exit")
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())


for command, example in (
    (training.train, "neq train digits epochs=5 policy.epsilon=0.005"),
    (results.inspect, "neq inspect runs/digits/20260131-120000-s1 --layer 'layer2.*'"),
    (results.compare, "neq compare runs/digits/* runs/digits-baseline/* --markdown"),
    (results.report, "neq report runs/digits/* runs/digits-baseline/* -o report.html --svg figures"),
    (recipes.flops, "neq flops resnet32-cifar10 policy.kind=stochastic policy.p=0.5"),
    (training.bench, "neq bench resnet32-cifar10 --fractions 0.5,0.9 --rounds 3"),
    (training.sweep, "neq sweep digits policy.epsilon=0.001,0.01 seed=1,2,3 --jobs 2"),
    (recipes.validate, "neq validate resnet32-cifar10 epochs=100"),
    (recipes.recipes, "neq recipes"),
    (recipes.init, "neq init digits my-experiment"),
    (results.export, "neq export runs/digits/20260131-120000-s1 -o digits.safetensors"),
):
    app.command(epilog=f"Example: {example}")(command)
