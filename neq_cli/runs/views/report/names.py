"""What a report's page calls things: metrics and keys in words, runs by the shortest names that tell them apart."""

from __future__ import annotations

import json
import shlex
from collections import Counter
from collections.abc import Sequence
from pathlib import PurePath

from neq_cli.runs.store.run import Run
from neq_cli.text import printable

_LONGEST_METRIC = 40
_LONGEST_NAME = 80
_METRICS = {"test_top1": "test top-1 accuracy", "test_miou": "test mean IoU"}
_KEYS = {
    "argv": "command line",
    "cuda": "CUDA",
    "device": "device",
    "git.commit": "git commit",
    "git.dirty": "changes not committed",
    "metric": "metric",
    "metric_better": "better metric",
    "neq": "neq",
    "platform": "operating system",
    "processor": "processor",
    "python": "Python",
    "recipe_name": "recipe",
}


def metric_in_words(metric: str) -> str:
    """``test top-1 accuracy``; a task's own metric by its own name, whose words are apart."""
    return _METRICS.get(metric) or _apart(metric, _LONGEST_METRIC)


def capital(words: str) -> str:
    """Return a heading."""
    return words[:1].upper() + words[1:]


def key_in_words(key: str) -> str:
    """Say what a dotted key of environment.json is: ``packages.torch`` is ``torch``."""
    known = _KEYS.get(key)
    return known or _apart(key.removeprefix("packages.").replace(".", ", "), _LONGEST_NAME)


def command_line(written: str) -> str | None:
    """Return what was typed, to be typed again in a shell; None where ``written`` is no JSON list of words."""
    try:
        argv = json.loads(written)
    except ValueError:
        return None
    if not isinstance(argv, list) or not argv or not all(isinstance(word, str) for word in argv):
        return None
    program = PurePath(argv[0]).name
    return shlex.join(["neq" if program == "__main__.py" else program, *argv[1:]])


def run_names(runs: Sequence[Run]) -> list[str]:
    """Return each run's folder, with as many of the folders above it as it takes to tell all apart."""
    parts = [run.path.parts for run in runs]
    names = ["/".join(each[-1:]) or str(run.path) for each, run in zip(parts, runs, strict=True)]
    for depth in range(2, max(map(len, parts), default=0) + 1):
        twice = {name for name, count in Counter(names).items() if count > 1}
        if not twice:
            break
        names = ["/".join(each[-depth:]) if name in twice else name for name, each in zip(names, parts, strict=True)]
    return [printable(name, _LONGEST_NAME) for name in names]


def _apart(name: str, limit: int) -> str:
    return " ".join(printable(name, limit).replace("_", " ").split()) or printable(name, limit)
