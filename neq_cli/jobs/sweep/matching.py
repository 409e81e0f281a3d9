"""Finds the NEq run of a sweep that a stochastic policy with `p: match` in the same sweep is to match."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from neq_cli.jobs.sweep.grid import Point
from neq_cli.recipe.policy_keys import MATCH, match_with, policy_kind
from neq_cli.recipe.yaml import YamlSyntaxError, read_yaml
from neq_cli.runs.store.sweep_folder import SweepFiles

_POLICY = "policy="


@dataclass(frozen=True)
class Matches:
    """By the name of a point with ``{kind: stochastic, p: match}``: whose run it matches, or why it matches none."""

    found: Mapping[str, str]
    problems: Mapping[str, str]


def find_matches(points: Sequence[Point]) -> Matches:
    """Match every such point with the NEq run that differs from it in the policy alone; there must be one."""
    policies = [(point, _policy(point)) for point in points]
    candidates: dict[tuple[str, ...], list[str]] = {}
    for point, policy in policies:
        if _is_neq(policy):
            candidates.setdefault(_all_but_policy(point), []).append(point.name)
    there = {point.name: candidates.get(_all_but_policy(point), []) for point, policy in policies if _asks(policy)}
    return Matches(
        {name: names[0] for name, names in there.items() if len(names) == 1},
        {name: _problem(len(names)) for name, names in there.items() if len(names) != 1},
    )


def with_match(point: Point, other: str, files: SweepFiles) -> Point:
    """Return ``point`` with the run directory of ``other`` in the place of ``match``."""
    written = json.dumps(match_with(files.run(other)), ensure_ascii=False)  # quoted, as a path may need
    return replace(point, overrides=(*point.overrides, f"policy.p={written}"))


def _policy(point: Point) -> Any:
    texts = [text.removeprefix(_POLICY) for text in point.overrides if text.startswith(_POLICY)]
    try:
        return read_yaml(texts[-1]).value if texts else None
    except YamlSyntaxError:  # which is told, with its place, when the point's recipe is read
        return None


def _all_but_policy(point: Point) -> tuple[str, ...]:
    return tuple(text for text in point.overrides if not text.startswith(_POLICY))


def _is_neq(policy: Any) -> bool:
    return isinstance(policy, Mapping) and policy_kind(policy) == "neq"


def _asks(policy: Any) -> bool:
    return isinstance(policy, Mapping) and policy_kind(policy) == "stochastic" and policy.get("p") == MATCH


def _problem(found: int) -> str:
    if not found:
        return "policy.p: match: no NEq run in this sweep to match; add {kind: neq} to policy=, or give match:RUN_DIR"
    return f"policy.p: match: {found} NEq runs to match; sweep them one by one, or give match:RUN_DIR"
