"""Libraries that neq does without until a recipe names one: imported there, or refused in one line."""

from __future__ import annotations

import importlib
import warnings
from typing import Any

from neq_cli.errors import RecipeValueError, one_line


def imported(module: str, needed_by: str, *, key: str = "model.name", library: str = "") -> Any:
    """Import ``"timm.models"``; RecipeValueError of ``key`` where it is missing or broken.

    ``needed_by``, "timm/...", is what needs it, of the ``library`` that it begins with where no other is given.
    """
    library = library or needed_by.partition("/")[0]
    what = f"'{needed_by}' needs {library}"
    try:
        with warnings.catch_warnings():  # a library's own affairs, such as what its torch calls deprecated
            warnings.simplefilter("ignore")
            return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name == module.partition(".")[0]:
            raise RecipeValueError(key, f"{what}; pip install 'neq[{library}]'") from error
        raise _broken(what, library, key, error) from error
    except Exception as error:  # a version that this Python or torch is too new or too old for
        raise _broken(what, library, key, error) from error


def _broken(what: str, library: str, key: str, error: Exception) -> RecipeValueError:
    mend = f"pip install --upgrade 'neq[{library}]'"
    return RecipeValueError(key, f"{what}, which fails to import ({one_line(error)}); {mend}")
