"""Runs a command from its first moment to its exit code: signals first, then its call, one line for every mistake.

Typer only parses: its own way to end (boxes, exit code 1 for Ctrl-C) is not ours, so it is called without it.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any

# Nothing else yet: until the signals are taken over, one of them is a traceback.
from neq_cli import signals
from neq_cli.complaints import columns, complain, leave, linger, warning_line
from neq_cli.errors import NeqError, Terminated, place_in_code


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 1 failed, 2 bad usage or recipe, 130 interrupted, 143 terminated."""
    watch = signals.Watch()
    for_good = arguments is None  # this is all that the process is for
    try:
        watch.start()
        code = _run(arguments, watch)
        if for_good and not code:
            leave()
    except Terminated as error:
        from neq_cli.text import to_go_on

        complain(to_go_on(signals.last_words(error.signal, str(error)), error.command, columns()))
        code = signals.exit_code(error.signal)
        linger()
        if for_good:
            watch.stop(for_good=True)
            signals.finish(code)
    finally:
        watch.stop(for_good=for_good)
    sys.exit(code if isinstance(code, int) else 0)


def _run(arguments: Sequence[str] | None, watch: signals.Watch) -> Any:
    """Return the exit code of a command that no signal ended, after a line for what was wrong; Terminated else."""
    for stream in (sys.stdout, sys.stderr):
        # A terminal that knows no "±" gets a "?" rather than a traceback.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    format_before, warnings.formatwarning = warnings.formatwarning, warning_line
    try:
        from neq_cli.commands.app import app

        code: Any = app(arguments, prog_name="neq", standalone_mode=False)
        if code == 130:  # what some Typers make of a KeyboardInterrupt, without a word
            complain("interrupted")
    except NeqError as error:
        complain(str(error))
        code = error.exit_code
    except BrokenPipeError:
        # The reader has gone, as in `neq inspect ... | head`.
        sys.stderr.close()
        code = 0
    except (Exception, SystemExit, KeyboardInterrupt) as error:
        if watch.raised is not None:
            # What the end of the command came to in code that made another error of it.
            raise Terminated(watch.raised) from error
        code = _unexpected(error)
    finally:
        warnings.formatwarning = format_before
    if code:
        linger()
    return code


def _unexpected(error: BaseException) -> int:
    """Say what was raised that is no NeqError; returns the exit code."""
    import typer

    if isinstance(error, KeyboardInterrupt | typer.Abort):
        complain("interrupted")
        return 130
    # A mistake in the command line. Which module the class lies in differs between Typer's versions.
    if hasattr(error, "format_message"):
        complain(_usage_line(error))
        return 2
    # Code of the user's own, such as a policy or a model, or a mistake of ours. An exit that was asked for there is no
    # end of the command's: a job that trained nothing must not count as done.
    if os.environ.get("NEQ_TRACEBACK") or _is_typers_exit(error):
        raise error
    message = " ".join(str(error).split())
    complain(f"{place_in_code(error)}: {type(error).__name__}: {message}; set NEQ_TRACEBACK=1 to see how it came about")
    return 1


def _usage_line(error: Any) -> str:
    command = error.ctx.command_path if getattr(error, "ctx", None) else "neq"
    message = error.format_message().rstrip(".").replace("Value error, ", "")
    if hasattr(error.__cause__, "errors"):  # pydantic's, in newer Typers: it does not tell the value
        value = repr(error.__cause__.errors()[0]["input"])
        message += f", not {value}" if value not in message else ""
    return f"{command}: {message}; see `{command} --help`"


def _is_typers_exit(error: BaseException) -> bool:
    """Whether ``error`` ends a shell's completion: no command had begun."""
    import traceback
    from pathlib import Path

    commands = str(Path(__file__).parent / "commands")
    begun = any(frame.filename.startswith(commands) for frame in traceback.extract_tb(error.__traceback__))
    return isinstance(error, SystemExit) and not begun
