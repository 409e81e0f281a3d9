"""Imports the Python callables that a recipe names, and checks arguments against their signatures; calls none."""

from __future__ import annotations

import importlib
import inspect
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from neq_cli.errors import RecipeValueError, did_you_mean, one_line

_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def load_entrypoint(entrypoint: str, key: str = "entrypoint") -> Callable[..., Any]:
    """Import ``"pkg.mod:callable"``; modules in the working directory are found too, as with ``python -m``.

    Raises RecipeValueError at ``key`` where the form is wrong, the module is missing or fails to import, or the name is
    missing or cannot be called.
    """
    module_name, colon, name = entrypoint.partition(":")
    if not (module_name and colon and name):
        raise RecipeValueError(key, f"'{entrypoint}' is not of the form pkg.mod:callable")
    found = _import(module_name, key)
    for part in name.split("."):
        if not hasattr(found, part):
            known = [known for known in dir(found) if not known.startswith("_")]
            raise RecipeValueError(key, f"module '{module_name}' has no '{name}'{did_you_mean(part, known)}")
        found = getattr(found, part)
    if not callable(found):
        raise RecipeValueError(key, f"'{entrypoint}' is a {type(found).__name__}, not a callable")
    return found  # type: ignore[no-any-return]


def add_import_folder(folder: Path) -> None:
    """Let ``load_entrypoint`` find modules in ``folder`` too, such as those beside a recipe."""
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


def _import(module_name: str, key: str) -> Any:
    if "" not in sys.path:
        add_import_folder(Path.cwd())
    try:
        with redirect_stdout(sys.stderr):  # what it prints is no result of the command's
            return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{module_name}.".startswith(f"{error.name}."):
            raise RecipeValueError(
                key,
                f"no module '{error.name}'; it is looked for beside the recipe, here and on PYTHONPATH",
            ) from error
        raise RecipeValueError(key, _import_failure(module_name, error)) from error
    except (Exception, SystemExit) as error:
        raise RecipeValueError(key, _import_failure(module_name, error)) from error


def _import_failure(module_name: str, error: BaseException) -> str:
    if isinstance(error, SyntaxError):
        place = f" ({error.filename}:{error.lineno})"
    else:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        place = "" if frame.filename.startswith("<frozen") else f" ({frame.filename}:{frame.lineno})"
    return f"module '{module_name}' fails to import: {one_line(error)}{place}"


def accepted_arguments(
    function: Callable[..., Any], forwards_to: Iterable[Callable[..., Any]] = ()
) -> tuple[set[str], bool]:
    """Return the keyword arguments that ``function`` names, and whether it takes others too.

    ``forwards_to`` are the callables that its ``**kwargs`` go to, in order, each reached only through the one before.
    """
    names: set[str] = set()
    for candidate in (function, *forwards_to):
        try:
            parameters = inspect.signature(candidate).parameters.values()
        except (TypeError, ValueError):  # some builtins have no signature
            return names, True
        names |= {parameter.name for parameter in parameters if parameter.kind in _NAMED}
        if not any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
            return names, False
    return names, True


def check_kwargs(
    function: Callable[..., Any],
    kwargs: Mapping[str, Any],
    *,
    supplied: Iterable[str] = (),
    forwards_to: Iterable[Callable[..., Any]] = (),
    closed: bool = False,
    name: str | None = None,
) -> list[tuple[str, str]]:
    """Compare ``kwargs`` with the signature of ``function`` and return (argument, problem) pairs, none where it fits.

    ``supplied`` are arguments that neq passes itself: never missing, and not the recipe's to give. ``closed`` refuses
    arguments that are named nowhere even where ``**kwargs`` would swallow them.
    """
    name = name or getattr(function, "__name__", repr(function))
    supplied = set(supplied)
    accepted, others = accepted_arguments(function, forwards_to)
    problems = []
    for argument in kwargs:
        if argument in supplied:
            problems.append((argument, f"'{argument}' of {name} is set by neq; remove it"))
        elif argument not in accepted and (closed or not others):
            hint = did_you_mean(argument, accepted - supplied)
            problems.append((argument, f"unknown argument '{argument}' of {name}{hint}"))
    missing = _required(function) - set(kwargs) - supplied
    return problems + [(argument, f"{name} needs the argument '{argument}'") for argument in sorted(missing)]


def _required(function: Callable[..., Any]) -> set[str]:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return set()
    kinds = (*_NAMED, inspect.Parameter.POSITIONAL_ONLY)
    return {
        parameter.name for parameter in parameters if parameter.kind in kinds and parameter.default is parameter.empty
    }
