"""Hooks on modules that copies and pickles of the modules do not share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class OnlyHere:
    """A hook that does what ``act`` does, with what the hook is given; in copies and pickles of the module nothing."""

    def __init__(self, act: Callable[..., None] | None = None) -> None:
        self.act = act

    def __call__(self, *arguments: Any) -> None:
        if self.act is not None:
            self.act(*arguments)

    def __reduce__(self) -> tuple[type[OnlyHere], tuple[()]]:
        return (OnlyHere, ())
