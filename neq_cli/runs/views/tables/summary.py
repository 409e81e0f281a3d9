"""A recipe in five lines as `neq validate` prints them, each in one piece whatever the terminal's width."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from neq_cli.text import counted, format_percent, printable


def summary_lines(file: str, recipe: Mapping[str, Any], summary: Mapping[str, Any]) -> list[str]:
    """Return the lines of a checked ``recipe`` in ``file``, both in plain values, and what it comes to.

    ``summary``: ``model``, ``data``, ``policy``, ``not_opened``, ``parameters``, ``layers``, ``neurons``,
    ``of_neurons``, ``may_freeze``, ``steps``; None for what is not known.
    """
    told = {
        "ok": file,
        "model": _model(summary),
        "data": summary["data"] + ("" if summary["not_opened"] is None else f"; not opened: {summary['not_opened']}"),
        "neurons": _neurons(summary),
        "run": _run(recipe, summary),
    }
    return [f"{name:<9}{printable(text)}" for name, text in told.items()]


def _model(summary: Mapping[str, Any]) -> str:
    parameters = summary["parameters"]
    return f"{summary['model']}" + ("" if parameters is None else f": {parameters:,} parameters")


def _neurons(summary: Mapping[str, Any]) -> str:
    if summary["neurons"] is None:
        return f"not counted, as only the data tells what the model sees; policy {summary['policy']}"
    told = f"{summary['neurons']:,} in {counted(summary['layers'], 'layer')}, {_share(summary['of_neurons'])}"
    freezing = "none" if not summary["may_freeze"] else _share(summary["may_freeze"])
    return f"{told} of the parameters; {freezing} may freeze under the policy {summary['policy']}"


def _share(share: float) -> str:
    # Nothing is rounded up to all of it.
    return "100%" if share == 1 else format_percent(min(100 * share, 99.9))


def _run(recipe: Mapping[str, Any], summary: Mapping[str, Any]) -> str:
    epochs, batch = recipe["epochs"], recipe["batch_size"]
    told = f"{counted(epochs, 'epoch')} in batches of {batch}"
    if summary["steps"] is not None:
        steps = summary["steps"]
        batches = f"{steps} batch" + ("es" if steps != 1 else "")
        told = f"{counted(epochs, 'epoch')} of {batches} of {batch}, {epochs * steps:,} in all"
    if recipe["gradient_accumulation"] > 1:
        told += f", {recipe['gradient_accumulation']} to an optimiser step"
    return f"{told}; {recipe['optimizer']['name']}, {recipe['scheduler']['name']}, seed {recipe['seed']}"
