"""Which runs are the same configuration but for the seed, and how a configuration is called; reads recipes only."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from neq_cli.recipe.keys import NAMES_NO_CONFIGURATION
from neq_cli.recipe.policy_keys import MATCH, matched_run
from neq_cli.recipe.recorded import is_recorded
from neq_cli.runs.compare.statistics import mean_known, summarise
from neq_cli.runs.store.run import Run
from neq_cli.text import printable

# Configurations that differ here answer different questions; `data.probe_size` alone is left free.
_COMPARABLE_BLOCKS = ("data", "model", "task", "epochs")
_COMPARABLE_ANYWAY = frozenset({"data.probe_size"})
_OF_IMAGES = ("data.channels", "data.image_size", "data.mean", "data.std")
_CUT_TO_A_SIZE = ('"imagenet"', '"randaugment"')
_AUTO = '"auto"'
UNSET = "not set"

Settings = Mapping[str, str]


def settings(run: Run) -> Settings:
    """Return the recipe as ``{dotted key: value as JSON}``, without what is not part of a configuration."""
    flat: dict[str, str] = {}

    def visit(value: Any, key: str) -> None:
        if isinstance(value, dict):
            for name, item in value.items():
                visit(item, f"{key}.{name}" if key else name)
        elif value is not None and key not in NAMES_NO_CONFIGURATION:  # null is what a key is before anybody sets it
            flat[key] = json.dumps(_number_as_float(value), ensure_ascii=False)

    visit(run.recipe, "")
    if _is_matched(run):
        flat["policy.p"] = MATCH  # whichever run it was matched to, and by whatever path
    if flat.get("data.channels") == _AUTO:  # which is what it was before there was such a key
        del flat["data.channels"]
    return {**flat, **_images_as_used(run, flat)}


def settings_together(runs: Sequence[Run]) -> list[Settings]:
    """Return the settings of each run; where one does not tell how its images were prepared, as those that found it.

    Runs of before have ``mean: null`` for what they found in the data, and say nowhere what that was.
    """
    flats = [dict(settings(run)) for run in runs]
    for key in _OF_IMAGES:
        told = {flat[key] for run, flat in zip(runs, flats, strict=True) if key in flat and _is_found(key, run)}
        for flat in flats:
            if key not in flat and len(told) == 1:
                flat[key] = next(iter(told))
    return list(flats)


def _images_as_used(run: Run, flat: Settings) -> dict[str, str]:
    """Return how images were prepared where the recipe leaves it open, as the run tells of its data."""
    data = run.environment.get("data")
    if not isinstance(data, dict):
        return {}
    used: dict[str, Any] = {"data.mean": data.get("mean"), "data.std": data.get("std")}
    shape = data.get("image_shape")
    if isinstance(shape, list) and len(shape) == 3:
        used["data.channels"] = shape[0] if shape[0] in (1, 3) else None
        if flat.get("data.augment") in _CUT_TO_A_SIZE:
            used["data.image_size"] = shape[1]
    left_open = [key for key, value in used.items() if value is not None and key not in flat]
    return {key: json.dumps(_number_as_float(used[key])) for key in left_open}


def _is_found(key: str, run: Run) -> bool:
    """Whether the recipe left ``key`` open, as runs of before did; how many channels there are the model decides."""
    return key == "data.channels" or key in _found(run)


def _found(run: Run) -> set[str]:
    """Return the keys that the recipe left open and the run found, when it began or when it was gone on with."""
    resumed = run.environment.get("resumed")
    entries = (
        [entry.get("changed") for entry in resumed if isinstance(entry, dict)] if isinstance(resumed, list) else []
    )
    told = [about.get("found") for about in (run.environment, *entries) if isinstance(about, dict)]
    return {key for keys in told if isinstance(keys, list) for key in keys if isinstance(key, str)}


def content(run: Run) -> Settings:
    """Return what must agree before runs are compared: data, model, task, epochs, and the data's recorded content."""
    return _content(run, settings(run))


def _content(run: Run, flat: Settings) -> Settings:
    found = {
        key: value
        for key, value in flat.items()
        if key.split(".")[0] in _COMPARABLE_BLOCKS and key not in _COMPARABLE_ANYWAY
    }
    recorded = run.environment.get("data")
    if isinstance(recorded, dict):
        found.update({f"environment.data.{key}": json.dumps(value) for key, value in recorded.items()})
    return found


def disagreements(runs: Sequence[Run]) -> dict[str, dict[str, list[Run]]]:
    """Return ``{key: {value: runs}}`` of every key of ``content`` in which the runs differ.

    What environment.json records of the data counts only between runs that recorded it.
    """
    contents = [_content(run, flat) for run, flat in zip(runs, settings_together(runs), strict=True)]
    found: dict[str, dict[str, list[Run]]] = {}
    for key in dict.fromkeys(key for each in contents for key in each):
        values: dict[str, list[Run]] = {}
        for run, each in zip(runs, contents, strict=True):
            if key in each or not key.startswith("environment."):
                values.setdefault(each.get(key, UNSET), []).append(run)
        if len(values) > 1:
            found[key] = values
    return found


def by_question(runs: Sequence[Run]) -> list[list[Run]]:
    """Return the runs in groups that may be compared: recipes agree in data, model, task and epochs."""
    found: dict[tuple[tuple[str, str], ...], list[Run]] = {}
    for run in runs:
        asked = {key: value for key, value in content(run).items() if not key.startswith("environment.")}
        found.setdefault(tuple(sorted(asked.items())), []).append(run)
    return list(found.values())


def roots_of_unknown_content(runs: Sequence[Run]) -> list[str]:
    """Return the folders that may hold different data: no dataset's name and no record tells what is in them."""
    unnamed = [run for run in runs if run.setting("data.name") in (None, "image_folder")]
    if all(isinstance(run.environment.get("data"), dict) for run in unnamed):
        return []
    roots = dict.fromkeys(_short(run.setting("data.root") or UNSET) for run in unnamed)
    return list(roots) if len(roots) > 1 else []


def policy_label(runs: Sequence[Run]) -> str:
    """Name the policy of runs of one configuration: ``Baseline``, ``Stochastic p=0.2``, ``NEq eps=0.001 mu=0.5``."""
    run = runs[0]
    kind = run.setting("policy.kind")
    if kind == "baseline":
        return "Baseline"
    if kind == "neq":
        definition = run.setting("policy.definition")
        suffix = "" if definition in (None, "paper") else f" {_short(definition)}"
        suffix += _scope(run)
        if run.setting("policy.share") not in (None, 1.0):
            suffix += f" share={_short(run.setting('policy.share'))}"
        if run.setting("policy.thaw_at_lr_drop") is not None:
            suffix += f" thaw={_short(run.setting('policy.thaw_at_lr_drop'))}"
        if run.setting("policy.front_mode") not in (None, "train"):
            suffix += f" {_short(run.setting('policy.front_mode'))}"
        return f"NEq eps={_short(run.setting('policy.epsilon'))} mu={_short(run.setting('policy.mu'))}{suffix}"
    if kind == "stochastic" and _is_matched(run):
        return f"Stochastic* p={_matched_p(runs)}{_scope(run)}"
    if kind == "stochastic":
        return f"Stochastic p={_short(run.setting('policy.p'))}{_scope(run)}"
    if kind == "front":
        return f"Front start={_short(run.setting('policy.start'))} level={_short(run.setting('policy.level'))}"
    if kind == "budget":
        return f"Budget flops={_short(run.setting('policy.flops'))}"
    return _short(run.setting("policy.entrypoint") or kind or "unknown policy")


def _scope(run: Run) -> str:
    scope = run.setting("policy.scope")
    return "" if scope in (None, "neuron") else f" {_short(scope)}"


def labels(groups: Sequence[Sequence[Run]]) -> list[str]:
    """Name every configuration so that no two rows read the same.

    A key outside the policy in which any of them differ stands behind every name; one of the policy that the name
    does not tell stands behind those that would read the same without it.
    """
    found = [policy_label(group) for group in groups]
    flats = settings_together([group[0] for group in groups])
    shared = [key for key in differing_keys(flats) if key.split(".")[0] != "policy"]
    result = []
    for name, flat in zip(found, flats, strict=True):
        twins = [other for other_name, other in zip(found, flats, strict=True) if other_name == name]
        policy = [key for key in differing_keys(twins) if key not in shared]
        extra = [_key_label(key, flat) for key in (*policy, *shared)]
        result.append(", ".join([name, *extra]))
    return result


def _key_label(key: str, flat: Settings) -> str:
    return f"{printable(key)}={written(flat[key])}" if key in flat else f"no {printable(key)}"


def differing_keys(flats: Iterable[Settings]) -> list[str]:
    """Return the keys in which not all agree, in the order of the recipe."""
    flats = list(flats)
    keys = dict.fromkeys(key for flat in flats for key in flat)
    return [key for key in keys if len({flat.get(key, UNSET) for flat in flats}) > 1]


def written(setting: str) -> str:
    """Write a value of ``Settings`` as people do: no quotes, no needless ``.0``."""
    return setting if setting in (UNSET, MATCH) else _short(json.loads(setting))


def model_and_data(run: Run) -> str:
    """Name both in a few words: ``resnet32 on CIFAR10``; of a loop of somebody's own, the class of the model."""
    if is_recorded(run.recipe):
        return printable(run.environment.get("description", "a model"), 100)
    model = run.setting("model.name") or run.setting("model.entrypoint") or "unknown model"
    data = run.setting("data.name") or run.setting("data.entrypoint") or "unknown data"
    return f"{_short(model)} on {_short(data)}"


def matched_values(runs: Sequence[Run]) -> list[float]:
    """Return the resolved ``policy.matched_p`` of those runs that have one."""
    values = (run.setting("policy.matched_p") for run in runs)
    return [float(value) for value in values if isinstance(value, (int, float)) and not isinstance(value, bool)]


def beside_matched(runs: Sequence[Run]) -> list[float]:
    """Return by how many percent the mean paper FLOPs of whole runs differ from those that p was matched to."""
    found = []
    for run in runs:
        target = run.environment.get("matched_flops")
        if isinstance(target, (int, float)) and not isinstance(target, bool) and target > 0:
            reached = mean_known(run.column("flops_paper"))
            if run.epochs >= run.epochs_planned and math.isfinite(reached):
                found.append(100 * (reached / target - 1))
    return found


def matched_to_seeds(runs: Sequence[Run]) -> bool:
    """Whether the runs that ``p: match:RUN_DIR`` names differ in the seed alone, as the names in a sweep tell."""
    return len({re.sub(r"(?<=seed=)-?[0-9]+$", "", str(run.setting("policy.p"))) for run in runs}) == 1


def _is_matched(run: Run) -> bool:
    return run.setting("policy.kind") == "stochastic" and matched_run(run.setting("policy.p")) is not None


def _matched_p(runs: Sequence[Run]) -> str:
    summary = summarise(matched_values(runs))
    if not summary.n:
        return MATCH
    return f"{summary.mean:.3g}" if summary.n == 1 else f"{summary.mean:.3g} ± {summary.std:.2g}"


def _number_as_float(value: Any) -> Any:
    """Let ``1`` and ``1.0`` be the same setting."""
    if isinstance(value, list):
        return [_number_as_float(item) for item in value]
    return float(value) if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**53 else value


def _short(value: Any) -> str:
    if isinstance(value, list):
        return printable(f"[{', '.join(map(_short, value))}]", 60)
    if not isinstance(value, float):
        return printable(value, 60)
    return f"{value:g}" if float(f"{value:g}") == value else repr(value)
