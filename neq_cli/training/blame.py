"""Which of several arguments a library refuses: found by leaving them out in turn; users' own code is not tried."""

from __future__ import annotations

from collections.abc import Callable, Iterable


def blamed(section: str, arguments: Iterable[str], fails_without: Callable[[str], bool]) -> str:
    """Return the key of the argument that is to blame for a call that failed.

    ``fails_without`` tries the call without one of the ``arguments``, which stand under the key ``section``. Where it
    does not go through without exactly one, all of the ``section`` is to blame.
    """
    found = [argument for argument in arguments if not fails_without(argument)]
    return f"{section}.{found[0]}" if len(found) == 1 else section
