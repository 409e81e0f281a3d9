"""What environment.json says of a model's coverage, parsed as untrusted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from neq_cli.errors import RunDirectoryError
from neq_cli.runs.store.paths import RunFiles
from neq_cli.runs.store.run import Run
from neq_cli.runs.store.untrusted import damaged


def recorded_coverage(run: Run) -> Mapping[str, Any]:
    """Return what ``run`` recorded. Raises RunDirectoryError where it recorded none, or what is none."""
    found = run.environment.get("coverage")
    if found is None:
        raise RunDirectoryError(f"{run.path}: has no coverage; it was begun by an earlier version, which recorded none")
    if not (_is_number(found, "parameters") and _is_number(found, "flops") and all(map(_is_part, _parts(found)))):
        raise damaged(RunFiles(run.path).environment, "coverage: is not what a run records")
    return dict(found)


def _parts(found: Mapping[str, Any]) -> Iterator[Any]:
    for key in ("outside", "never_frozen"):
        parts = found.get(key)
        yield from parts if isinstance(parts, list) else [None]


def _is_part(part: Any) -> bool:
    return (
        isinstance(part, dict)
        and isinstance(part.get("reason"), str)
        and _is_number(part, "parameters")
        and _is_number(part, "flops")
        and isinstance(part.get("names"), list)
        and all(isinstance(name, str) for name in part["names"])
    )


def _is_number(found: Any, key: str) -> bool:
    value = found.get(key) if isinstance(found, dict) else None
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < 1e18
