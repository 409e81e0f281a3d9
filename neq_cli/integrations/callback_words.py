"""What a Freezer refuses is told in the words of the callback that makes it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from neq_cli.errors import FreezingError


@contextmanager
def in_callback_words(before: str = "") -> Iterator[None]:
    """Have a FreezingError from inside name ``probe`` and ``NEqCallback``, with ``before`` in front of it."""
    try:
        yield
    except FreezingError as error:
        said = str(error).replace("probe_loader:", "probe:").replace("Freezer(", "NEqCallback(")
        raise FreezingError(before + said) from error
