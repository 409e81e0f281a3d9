"""Lightning has two names: `lightning` or `pytorch_lightning`, whichever the program uses, is imported."""

from __future__ import annotations

import importlib
import sys
from typing import Any


def callback_class() -> Any:
    """Return the Callback of the package that the program uses: what it has imported, else what is installed."""
    packages = sorted(("lightning", "pytorch_lightning"), key=lambda name: name not in sys.modules)
    for package in packages:
        try:
            return importlib.import_module("lightning.pytorch" if package == "lightning" else package).Callback
        except ModuleNotFoundError as error:
            if error.name not in ("lightning", "lightning.pytorch", "pytorch_lightning"):
                raise
    raise ImportError("neq_cli.integrations.lightning needs Lightning; pip install 'neq[lightning]'")
