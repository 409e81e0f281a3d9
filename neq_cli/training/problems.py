"""Errors of the training wing that name a recipe key or an image; one line each."""

from __future__ import annotations

from neq_cli.errors import RecipeError, TrainingError


class RecipeValueError(RecipeError):
    """A value of the recipe that cannot be used: ``key`` is its dotted path, ``reason`` what is wrong and the mend."""

    def __init__(self, key: str, reason: str) -> None:
        self.key = key
        self.reason = reason
        super().__init__([f"{key}: {reason}"])

    def __reduce__(self) -> tuple[type[RecipeValueError], tuple[str, str]]:
        return type(self), (self.key, self.reason)


class DataError(TrainingError):
    """An image that could not be read or does not fit the others, met while training.

    A worker process hands its exception over as text with the traceback in front; only the last line is the message.
    """

    def __init__(self, message: str) -> None:
        name = f"{type(self).__module__}.{type(self).__qualname__}: "
        super().__init__(message.rpartition(name)[2].strip() if message.startswith("Caught ") else message)


def one_line(error: BaseException, limit: int = 200) -> str:
    """Return ``"ValueError: its first line"``, cut to ``limit`` characters."""
    text = " ".join(str(error).strip().split("\n", 1)[0].split())
    text = text if len(text) <= limit else text[: limit - 3] + "..."
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
