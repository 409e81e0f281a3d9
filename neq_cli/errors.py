"""The one family of errors: each is what a user sees, one line per problem, with the exit code that goes with it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


class NeqError(Exception):
    """A mistake the user can mend. The message says where, what and how; the command exits with ``exit_code``."""

    exit_code = 2


class RecipeError(NeqError):
    """Every problem of a recipe at once, one line each, in ``problems``."""

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(self.problems))


class RecipeValueError(RecipeError):
    """A value of the recipe that cannot be used: ``key`` is its dotted path, ``reason`` what is wrong and the mend.

    ``others`` are the keys that are to blame where it is not that one alone: what was changed of them on the command
    line, else the first that is written.
    """

    def __init__(self, key: str, reason: str, others: Iterable[str] = ()) -> None:
        self.key = key
        self.reason = reason
        self.others = tuple(others)
        super().__init__([f"{key}: {reason}"])

    def __reduce__(self) -> tuple[type[RecipeValueError], tuple[str, str, tuple[str, ...]]]:
        return type(self), (self.key, self.reason, self.others)


class RunDirectoryError(NeqError):
    """A run directory that is missing, taken, half-written or not one at all."""


class FreezingError(NeqError, ValueError):
    """A model, optimiser, probe set or policy that the method cannot work with."""


class TrainingError(NeqError):
    """A run that began and could not go on, such as a loss that became NaN."""

    exit_code = 1


class Terminated(BaseException):
    """A signal ends the program, with what the user should know. No Exception, so that nothing catches it on the way.

    ``command`` has the words of a command line that goes on. KeyboardInterrupt ends it too, but tells nothing more.
    """

    def __init__(self, signal: str = "SIGTERM", message: str = "", command: Sequence[str] = ()) -> None:
        self.signal = signal
        self.command = tuple(command)
        super().__init__(message)


def described(error: BaseException) -> str:
    """Return what a run's status and other processes are told of ``error``: its line, after its kind where not ours."""
    return str(error) if isinstance(error, NeqError) else f"{type(error).__name__}: {error}"


def one_line(error: BaseException, limit: int = 200) -> str:
    """Return ``"ValueError: its first line"``, cut to ``limit`` characters."""
    text = " ".join(str(error).strip().split("\n", 1)[0].split())
    text = text if len(text) <= limit else text[: limit - 3] + "..."
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def place_in_code(error: BaseException) -> str:
    """Return ``"file.py:12"``, the line that led to the error: of the user's own code where some of it took part.

    An error that was never raised has none: an empty string.
    """
    import sysconfig  # here, since `neq` imports this module before it has taken over the signals
    import traceback
    from pathlib import Path

    frames = traceback.extract_tb(error.__traceback__)
    others = (str(Path(__file__).parent), sysconfig.get_path("purelib"), sysconfig.get_path("stdlib"))
    own = [frame for frame in frames if not frame.filename.startswith(others)] or frames
    return f"{own[-1].filename}:{own[-1].lineno}" if own else ""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'closest'?"``, or an empty string where nothing known is close to ``word``."""
    import difflib  # here, since `neq` imports this module before it has taken over the signals

    matches = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean '{matches[0]}'?" if matches else ""
