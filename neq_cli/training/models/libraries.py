"""Libraries of models that neq does without until a recipe names one: imported there, or refused in one line."""

from __future__ import annotations

import importlib
import warnings
from typing import Any

from neq_cli.errors import RecipeValueError, one_line


def imported(module: str, model: str) -> Any:
    """Import ``"timm.models"``; RecipeValueError where it is missing or broken, which ``model``, "timm/...", needs."""
    library = model.partition("/")[0]
    try:
        with warnings.catch_warnings():  # a library's own affairs, such as what its torch calls deprecated
            warnings.simplefilter("ignore")
            return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name == module.partition(".")[0]:
            raise RecipeValueError("model.name", f"'{model}' needs {library}; pip install 'neq[{library}]'") from error
        raise _broken(library, model, error) from error
    except Exception as error:  # a version that this Python or torch is too new or too old for
        raise _broken(library, model, error) from error


def _broken(library: str, model: str, error: Exception) -> RecipeValueError:
    mend = f"pip install --upgrade 'neq[{library}]'"
    return RecipeValueError(
        "model.name", f"'{model}' needs {library}, which fails to import ({one_line(error)}); {mend}"
    )
