"""Evaluates trained weights on their run's test data, or on another folder of the same classes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from neq_cli.errors import NeqError, did_you_mean
from neq_cli.jobs.prepare import located
from neq_cli.jobs.trained import Trained, WhichWeights, find_trained
from neq_cli.recipe.document import Given
from neq_cli.recipe.load import LoadedRecipe
from neq_cli.runs.compare.evaluation import Evaluation, Pairs
from neq_cli.text import escaped

KEYS = ("batch_size", "channels_last", "deterministic", "device", "precision")
"""Of a recipe's keys outside ``data``, those that make a difference to a test."""
_PLAIN = re.compile(r"[\w./~$+-]+")
_SAME_DATA = ("data.cache", "data.download", "data.workers")
_WITHOUT_FOLDER = ("digits", "FakeData")


def evaluate(
    given: Path,
    which: WhichWeights | None = None,
    recipe: str | None = None,
    folder: Path | None = None,
    overrides: Sequence[str] = (),
    *,
    wants_picture: bool = False,
    on_batch: Callable[[int, int], object] = lambda done, batches: None,
) -> Evaluation:
    """Return the evaluation of the weights in ``given``; ``find_trained`` has the arguments.

    ``folder`` takes the place of ``data.root``, and may hold the test part alone. Where anything else is tested than
    the run's own data, nothing recorded stands beside it. ``wants_picture`` refuses tasks that have no classes, before
    anything slow is begun. Raises NeqError, one line for each problem.
    """
    _check_keys(overrides)
    changes = [*overrides, *([_root(folder)] if folder is not None else ())]
    trained = find_trained(given, which, recipe, changes)
    if folder is not None:
        _check_folder(trained.loaded)
    if wants_picture and trained.loaded.recipe.task_is_own:
        raise NeqError(f"-o: {trained.loaded.recipe.task} tells no classes, so there is no confusion to be drawn")
    return _evaluated(trained, [change.partition("=")[0] for change in changes], on_batch)


def _evaluated(trained: Trained, changed: Sequence[str], on_batch: Callable[[int, int], object]) -> Evaluation:
    from neq_cli.training.evaluation import evaluate as test

    known = (trained.content.classes, trained.content.class_names)
    with located(trained.loaded):
        tested = test(
            trained.loaded.recipe,
            trained.weights.tensors,
            trained.place,
            known,
            on_batch,
            held_out=trained.content.held_out,
        )
    pairs = None
    if tested.pairs is not None and tested.classes is not None:
        pairs = Pairs(tested.classes, *tested.pairs)
    return Evaluation(
        run=trained.name,
        place=str(trained.place),
        weights=trained.which,
        epoch=trained.weights.epoch,
        data=tested.data,
        images=tested.images,
        counted=tested.counted,
        metrics=tested.metrics,
        recorded={} if any(map(_changes_data, changed)) else trained.recorded,
        pairs=pairs,
        class_names=tested.class_names,
        segmentation=tested.segmentation,
        unit=trained.loaded.recipe.unit,
    )


def _changes_data(key: str) -> bool:
    return key.split(".")[0] == "data" and key not in _SAME_DATA


def _check_keys(overrides: Sequence[str]) -> None:
    """Raise NeqError for what would change nothing, or another thing than the test: the model, what it learns."""
    for override in overrides:
        key = override.partition("=")[0]
        if key.split(".")[0] not in ("data", *KEYS):
            hint = did_you_mean(key, KEYS)
            known = f"data.KEY, {', '.join(KEYS)}"
            raise NeqError(f"command line: {escaped(override)}: evaluating goes by {known} alone{hint}")


def _root(folder: Path) -> Given:
    text = str(folder)
    quoted = text if _PLAIN.fullmatch(text) else json.dumps(text, ensure_ascii=False)
    return Given(f"data.root={quoted}", f"--data {text}")


def _check_folder(loaded: LoadedRecipe) -> None:
    name = loaded.recipe.data.name
    if name is not None and name.startswith("hf/"):
        raise NeqError(f"--data: {name} does not lie in data.root; give another folder by data.name=hf/FOLDER")
    if name in _WITHOUT_FOLDER:
        raise NeqError(f"--data: {name} does not lie in a folder; it is for data that does, such as image_folder")
