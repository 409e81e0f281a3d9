"""recipe.yaml of a loop of one's own: what its runs are told apart by, and the method as a recipe has it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neq_cli.errors import FreezingError
from neq_cli.recipe.recorded import RECORDED
from neq_cli.recipe.yaml import read_yaml as parse_yaml
from neq_cli.recipe.yaml import write_yaml
from neq_cli.runs.store.paths import RunFiles
from neq_cli.runs.store.untrusted import read_json, read_yaml
from neq_cli.text import printable

if TYPE_CHECKING:
    from neq_cli.freezing import Freezer


def recorded_recipe(
    freezer: Freezer, name: str, seed: int | None, epochs: int | None, settings: Mapping[str, Any]
) -> str:
    """Return the YAML. FreezingError that names the place of a setting which YAML cannot hold."""
    recipe = {**RECORDED, "name": name, "seed": seed, "epochs": epochs, **_method(freezer)}
    return write_yaml({**recipe, "settings": _plain(settings, "settings")})


def check_same_run(path: Path, recipe_yaml: str, metric: str) -> None:
    """Raise FreezingError where a run that is begun anew in place was of other settings, which its files keep."""
    files = RunFiles(path)
    old, new = read_yaml(files.recipe), parse_yaml(recipe_yaml).value
    differing = [key for key in {**old, **new} if key != "epochs" and old.get(key) != new.get(key)]
    environment = read_json(files.environment) if files.environment.exists() else {}
    if environment.get("metric", metric) != metric:
        differing.append("metric")
    if differing:
        raise FreezingError(
            f"Recorder: {printable(path)}: its run, of which no epoch is kept, had another {printable(differing[0])}; "
            "record in another directory, or remove it"
        )


def _method(freezer: Freezer) -> dict[str, Any]:
    """Return the policy and the backward mode as a recipe has them."""
    from neq_cli.training.policies import section_of

    section, kind = section_of(freezer.policy), type(freezer.policy)
    policy = {"entrypoint": f"{kind.__module__}:{kind.__qualname__}"} if section is None else section.model_dump()
    return {"policy": policy, "backward": freezer.backward}


def _plain(value: Any, place: str) -> Any:
    """Return ``value`` in what YAML can hold; FreezingError that names the place of what it cannot."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(each, f"{place}.{key}") for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each, f"{place}[{number}]") for number, each in enumerate(value)]
    if isinstance(value, Path):
        return str(value)
    raise FreezingError(
        f"Recorder: {place}: is a {type(value).__name__}; give numbers, text, lists and mappings of them"
    )
