"""Which runs there are to resume, and whether a recipe goes on with one; nothing is imported or run that they name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from neq_cli.errors import RunDirectoryError
from neq_cli.recipe.data_keys import DataSection
from neq_cli.recipe.describe import shown
from neq_cli.recipe.keys import MAY_CHANGE, Problem, Recipe
from neq_cli.recipe.policy_keys import StochasticPolicy, matched_run
from neq_cli.recipe.validate import Wrong, validate
from neq_cli.runs.store.paths import STATES, RunFiles, is_hidden, recipe_folder
from neq_cli.runs.store.status import parse_time
from neq_cli.runs.store.untrusted import damaged, read_json, read_yaml
from neq_cli.text import printable

_NAMES_IN_ANY_CASE = ("optimizer.name", "scheduler.name")
_NAMES_OF_ARGUMENTS = ("policy.kind", "scheduler.name")
_ABSENT = object()
ANEW = "or train anew without --resume"


@dataclass(frozen=True)
class Candidate:
    """A run that might be resumed."""

    path: Path
    recipe: Recipe
    state: str  # as status.json has it, whether or not its process still lives; "unknown" where there is none


def candidates(recipe_name: str, seed: int, root: Path = Path("runs")) -> list[Candidate]:
    """Return the runs of that recipe name and seed below ``root``, the one begun last first.

    What is damaged, or no run at all, is left out.
    """
    folder = recipe_folder(recipe_name, root)
    try:
        paths = sorted(folder.iterdir()) if folder.is_dir() else []
    except OSError:
        return []
    found = []
    for path in paths:
        try:
            if not is_hidden(path) and path.is_dir() and read_yaml(RunFiles(path).recipe).get("seed") == seed:
                state, began = _status(RunFiles(path))
                # Two that began in the same second are called ...-s1 and ...-s1-2, ..., ...-s1-10.
                found.append(((began, len(path.name), path.name), Candidate(path, stored_recipe(path), state)))
        except (RunDirectoryError, OSError):
            continue
    return [candidate for _, candidate in sorted(found, key=lambda pair: pair[0], reverse=True)]


def newest_unfinished(recipe_name: str, seed: int, root: Path = Path("runs")) -> Candidate | None:
    """Return the unfinished run begun last, the finished one begun last where there is none, None without any."""
    found = candidates(recipe_name, seed, root)
    return next((candidate for candidate in found if candidate.state != "finished"), found[0] if found else None)


def _status(files: RunFiles) -> tuple[str, float]:
    """Return the state, and when the run began, in seconds."""
    if not files.status.exists():
        return "unknown", files.root.stat().st_mtime
    status = read_json(files.status)
    state, started = status.get("state"), status.get("started")
    if state not in STATES:
        raise damaged(files.status, f"state: not one of {', '.join(STATES)}")
    began = parse_time(started)
    return state, files.root.stat().st_mtime if began is None else began.timestamp()


def stored_recipe(path: Path) -> Recipe:
    """Return the recipe of the run directory ``path``; keys that an older neq did not know have their defaults.

    Only its form is checked: no model, data set or entrypoint that it names is looked at. RunDirectoryError.
    """
    file = RunFiles(path).recipe
    recipe, problems = validate(read_yaml(file))
    if recipe is None:
        key, (message, _) = next(iter(problems.items()), ((), Wrong("not a recipe")))
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise damaged(file, printable(f"{'.'.join(map(str, key))}: {message}", 300) + more)
    return recipe


def differences(stored: Recipe, wanted: Recipe, run: Path | None = None, otherwise: str = ANEW) -> list[Problem]:
    """Return what keeps ``wanted`` from going on with the run that ``stored`` is the recipe of; [] where nothing does.

    ``run`` is the run directory, to be named; ``otherwise`` is what may be done instead. Not judged: ``epochs`` below
    what is trained, and ``batch_size``.
    """
    wanted = merged(stored, wanted)
    if stored.data.channels == "auto":  # as runs of before had it, with those that the model takes, now as then
        told = stored.data.model_copy(update={"channels": wanted.data.channels})
        stored = stored.model_copy(update={"data": told})
    before, now = _values(stored), _values(wanted)
    for name in _NAMES_OF_ARGUMENTS:
        if not _is_same(name, before, now):  # its arguments go with it
            others = f"{name.partition('.')[0]}."
            before, now = (
                {k: v for k, v in values.items() if k == name or not k.startswith(others)} for values in (before, now)
            )
    begun = "the run was begun" if run is None else f"{printable(run)} was begun"
    problems = []
    for key in dict.fromkeys([*now, *before]):
        if key not in MAY_CHANGE and not _is_same(key, before, now):
            sentence = Problem(key, _sentence(key, before, now, begun))
            problem = _epochs_problem(stored, wanted, key, begun) or sentence
            problems.append(Problem(problem.key, f"{problem.message}, {otherwise}"))
    return problems


def merged(stored: Recipe, wanted: Recipe) -> Recipe:
    """Return ``wanted``, with what the run decided by itself where ``wanted`` leaves that open."""
    changes: dict[str, Any] = {}
    if wanted.channels_last == "auto":
        changes["channels_last"] = stored.channels_last
    changes["data"] = wanted.data.model_copy(update=_found(stored.data, wanted.data))
    policy, before = wanted.policy, stored.policy
    if isinstance(policy, StochasticPolicy) and isinstance(before, StochasticPolicy) and policy.matched_p is None:
        # The run that was matched keeps its name wherever it is moved; its path may be relative, too.
        is_same_run = _name_of_matched(policy) == _name_of_matched(before)
        changes["policy"] = policy.model_copy(
            update={"matched_p": before.matched_p, "p": before.p if is_same_run else policy.p}
        )
    return wanted.model_copy(update=changes)


def _found(stored: DataSection, wanted: DataSection) -> dict[str, Any]:
    """Return what the run found of its images where ``wanted`` leaves that open."""
    found = {key: getattr(stored, key) for key in ("mean", "std", "image_size") if getattr(wanted, key) is None}
    return found | ({"channels": stored.channels} if wanted.channels == "auto" else {})


def ended_at_rest(stored: Recipe, wanted: Recipe, epoch: int) -> bool:
    """Whether ``stop_when_frozen`` ended a run that finished after ``epoch``, and ``wanted`` asks no more of it."""
    same_rest = stored.stop_when_frozen is not None and wanted.stop_when_frozen == stored.stop_when_frozen
    return same_rest and epoch < stored.epochs and wanted.epochs <= stored.epochs


def _name_of_matched(policy: StochasticPolicy) -> str | float:
    return policy.p if isinstance(policy.p, float) else PurePath(matched_run(policy.p) or "").name


def _values(recipe: Recipe) -> dict[str, Any]:
    """Return every key that has no keys below it, dotted, with its value; the schedule's length is written out."""
    plain = recipe.model_dump()
    for section in ("optimizer", "scheduler"):  # an argument that is null is one that is left out
        fields = type(getattr(recipe, section)).model_fields
        plain[section] = {key: value for key, value in plain[section].items() if value is not None or key in fields}
    argument = recipe.scheduler.length_argument
    if argument is not None:
        plain["scheduler"].setdefault(argument, max(1, recipe.epochs - recipe.scheduler.warmup_epochs))
    return dict(_leaves("", plain))


def _leaves(prefix: str, values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _leaves(f"{prefix}{key}.", value)
        else:
            yield f"{prefix}{key}", value


def _is_same(key: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    old, new = before.get(key, _ABSENT), now.get(key, _ABSENT)
    if key in _NAMES_IN_ANY_CASE:
        old, new = str(old).lower(), str(new).lower()
    return old == new or repr(old) == repr(new)  # NaN is not equal to itself


def _sentence(key: str, before: Mapping[str, Any], now: Mapping[str, Any], begun: str) -> str:
    begun = f"{begun} with {printable(shown(before[key]))}" if key in before else f"{begun} without it"
    if key not in now:
        return f"left out, but {begun}; write it again"
    return f"{printable(shown(now[key]))}, but {begun}; leave it"


def _epochs_problem(stored: Recipe, wanted: Recipe, key: str, begun: str) -> Problem | None:
    """Return the problem with ``epochs`` where the schedule's length differs because it follows from them."""
    argument = stored.scheduler.length_argument
    if key != f"scheduler.{argument}" or argument in wanted.scheduler.kwargs:
        return None
    length = _values(stored)[key]
    schedule = f"the schedule {printable(shown(stored.scheduler.name))} is laid out for {printable(shown(length))}"
    said = f"{wanted.epochs}, but {begun} with {stored.epochs}, and {schedule}"
    if stored.scheduler.interval == "step":  # only the data says how many steps that are
        return Problem("epochs", f"{said} epochs; leave it")
    return Problem("epochs", f"{said}; give {key}={printable(shown(length))}")
