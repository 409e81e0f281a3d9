"""Data sets in folders of tables, or of the Hugging Face hub, by the library `datasets` (its extra)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from neq_cli.errors import RecipeValueError, one_line
from neq_cli.recipe import DataSection
from neq_cli.training.data.mask_sources import OR_VALIDATION, classes_in, given_classes
from neq_cli.training.data.opened import Source
from neq_cli.training.data.pixels import Range
from neq_cli.training.data.quiet import quietly
from neq_cli.training.data.rows import Rows
from neq_cli.training.data.stream_sources import TEXTS, streamed_source
from neq_cli.training.errors import of_the_disk
from neq_cli.training.models.libraries import imported

_TESTED = ("test", "validation", "valid", "val", "dev")
"""What the split that is tested is called: the first of these that is there."""
_LAYOUT = (
    "a folder holds parquet, arrow, a folder for each class, images beside metadata.csv, or what save_to_disk wrote"
)
_SAVED = ("dataset_dict.json", "state.json")
"""Files that tell a folder that save_to_disk wrote."""
_METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")


def open_hub(section: DataSection) -> Source:
    """Open ``hf/NAME``: a folder, absolute or below ~ or the current one, else a data set of the Hugging Face hub.

    RecipeValueError, one line, where it cannot be had, or does not tell which splits and columns are meant.
    """
    name = str(section.name)
    library = imported("datasets", name, key="data.name", library="datasets")
    splits, streaming = _splits(library, section, name)
    train, test, untested = _chosen(section, name, list(splits))
    tables = {split: splits[split] for split in (train, test)}
    columns = _columns(section, name, tables[train].features)
    for column in (columns.image, columns.label):
        if any(table.features.get(column) != tables[train].features[column] for table in tables.values()):
            what = f"the splits '{train}' and '{test}' of {name} differ in the column '{column}'; make them alike"
            raise RecipeValueError("data.name", what)
    if streaming is not None:
        if columns.masks:
            what = f"'{columns.label}' of {name} holds masks, which are not streamed; remove it"
            raise RecipeValueError("data.kwargs.streaming", what)
        source = streamed_source(section, name, streaming, tables, (columns.image, columns.label))
        return replace(source, untested=untested)
    notes: tuple[str, ...] = ()
    labels, classes = ({}, ()) if columns.masks else _labels(name, tables, columns.label)
    opened = {
        split: _rows(library, f"{name} {split}", table, columns, section.pixel_range, labels.get(split))
        for split, table in tables.items()
    }
    if columns.masks:
        classes, notes = _classes_of_masks(section, name, list(opened.values()))
    elif "num_classes" in section.kwargs:
        what = f"is for masks, and '{columns.label}' of {name} holds labels; remove it"
        raise RecipeValueError("data.kwargs.num_classes", what)
    return Source(name, opened[train], opened[test], classes, notes, untested)


def holds_tables(folder: Path) -> bool:
    """Whether a folder, or one in it, holds files that ``hf/FOLDER`` reads and an image folder has none of. OSError."""
    folders = [folder, *(path for path in folder.iterdir() if path.is_dir())]
    return any(
        path.name in (*_SAVED, *_METADATA) or path.name.endswith((".parquet", ".arrow"))
        for place in folders
        for path in place.iterdir()
    )


def _splits(library: Any, section: DataSection, name: str) -> tuple[dict[str, Any], Any]:
    """Return the splits by their names, as tables on disk and None; or as streams and the builder that made them."""
    source = name.removeprefix("hf/")
    folder = Path(source).expanduser()
    local = folder.is_dir()
    if not local and source.startswith(("~", ".", "/")):
        raise RecipeValueError("data.name", f"no folder '{folder}'; {_LAYOUT}")
    if not local and not section.download and not library.config.HF_HUB_OFFLINE:
        mend = "set HF_HUB_OFFLINE=1 to take it from Hugging Face's cache alone, or name a folder"
        raise RecipeValueError("data.download", f"false, and {name} is the hub's; {mend}")
    config, revision = section.kwargs.get("config"), section.kwargs.get("revision")
    saved, builder = local and any((folder / file).is_file() for file in _SAVED), None
    streaming = section.kwargs.get("streaming", False)
    if saved and streaming:
        what = f"save_to_disk wrote {name}, which is read where it lies without being held in memory; remove it"
        raise RecipeValueError("data.kwargs.streaming", what)
    place = str(folder.absolute()) if local else source
    try:
        with quietly():
            if saved:
                made = library.load_from_disk(str(folder))
            elif streaming:
                builder = library.load_dataset_builder(place, config, revision=revision)
                made = builder.as_streaming_dataset()
            else:
                made = library.load_dataset(place, config, revision=revision)
    except Exception as error:
        raise _unread(name, folder if local else None, error) from error
    splits = dict(made) if isinstance(made, dict) else {"train": made}
    if builder is not None and any(split.features is None for split in splits.values()):
        what = f"the stream of {name} does not tell its columns before it is read; remove it"
        raise RecipeValueError("data.kwargs.streaming", what)
    return splits, builder


def _unread(name: str, folder: Path | None, error: Exception) -> RecipeValueError:
    if type(error) is ValueError:  # several lines, of which the last one tells
        error = ValueError(" ".join(str(error).split()))
    said = one_line(error).rstrip(".")
    if isinstance(error, ValueError) and "config" in str(error).lower():
        return RecipeValueError("data.kwargs.config", f"{name} has other configurations ({said}); give one of them")
    if of_the_disk(error):
        return RecipeValueError("data.name", f"{name} cannot be read, or kept where HF_HOME says ({said})")
    if folder is not None:
        return RecipeValueError("data.name", f"'{folder}' cannot be read ({said}); {_LAYOUT}")
    source = name.removeprefix("hf/")
    return RecipeValueError(
        "data.name",
        f"no folder '{source}', nor could it be had from the Hugging Face hub ({said}); check the name, or where there "
        f"is no network, `hf download --repo-type dataset {source} --local-dir FOLDER` elsewhere and name hf/FOLDER",
    )


def _chosen(section: DataSection, name: str, there: Sequence[str]) -> tuple[str, str, str]:
    """Return the names of the splits that are trained on and tested, and what stays untested for data.validation."""
    for key in ("train_split", "test_split"):
        given = section.kwargs.get(key)
        if given is not None and given not in there:
            raise RecipeValueError(f"data.kwargs.{key}", f"{name} has no split '{given}'; it has {_listed(there)}")
    train = section.kwargs.get("train_split") or ("train" if len(there) > 1 else there[0])
    if train not in there:
        what = f"{name} has no split 'train', it has {_listed(there)}; give the one to train on"
        raise RecipeValueError("data.kwargs.train_split", what)
    test = section.kwargs.get("test_split") or next((one for one in _TESTED if one in there and one != train), None)
    if section.validation is not None:
        return train, train, "" if test is None else f"the split '{test}'"
    if test is None:
        what = f"{name} has no split '{_TESTED[0]}' or '{_TESTED[1]}', it has {_listed(there)}; give the one to test on"
        raise RecipeValueError("data.kwargs.test_split", what + OR_VALIDATION)
    return train, test, ""


@dataclass(frozen=True)
class _Columns:
    image: str
    label: str
    masks: bool  # whether labels are masks


def _columns(section: DataSection, name: str, features: Mapping[str, Any]) -> _Columns:
    """Return which columns hold images, and labels or masks: those that are named, else those whose type tells."""
    listed = ", ".join(f"{column} ({_kind(feature)})" for column, feature in features.items())
    for key, given in (("image_key", section.image_key), ("label_key", section.label_key)):
        if given is not None and given not in features:
            raise RecipeValueError(f"data.{key}", f"{name} has no column '{given}'; it has {listed}")
    image = section.image_key or _only(features, "Image", but=section.label_key)
    label = section.label_key or _only(features, "ClassLabel")
    for key, column, what in (("image_key", image, "images"), ("label_key", label, "labels")):
        if column is None:
            raise RecipeValueError(f"data.{key}", f"which column of {name} holds the {what}? Write one of {listed}")
    assert image is not None
    assert label is not None
    if _kind(features[image]) != "Image":
        raise RecipeValueError("data.image_key", f"'{image}' of {name} holds no images; it has {listed}")
    kind = _kind(features[label])
    if kind not in ("Image", "ClassLabel", "bool", *TEXTS) and not kind.lstrip("u").startswith("int"):
        raise RecipeValueError("data.label_key", f"'{label}' of {name} holds no classes; it has {listed}")
    return _Columns(image, label, masks=kind == "Image")


def _only(features: Mapping[str, Any], kind: str, but: str | None = None) -> str | None:
    found = [column for column, feature in features.items() if _kind(feature) == kind and column != but]
    return found[0] if len(found) == 1 else None


def _kind(feature: Any) -> str:
    return str(feature.dtype) if type(feature).__name__ == "Value" else type(feature).__name__


def _rows(
    library: Any, place: str, table: Any, columns: _Columns, value_range: Range | None, labels: Tensor | None = None
) -> Rows:
    """Return a split's rows; the library hands images over as they are stored, and decodes none."""
    wanted = [columns.image, *([columns.label] if columns.masks else ())]
    table = table.with_format(None).select_columns(wanted)
    for column in wanted:
        table = table.cast_column(column, library.Image(decode=False))
    mask_key = columns.label if columns.masks else None
    return Rows(place, table, columns.image, targets=labels, mask_key=mask_key, value_range=value_range)


def _labels(name: str, tables: Mapping[str, Any], column: str) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Return the labels of every split, and what classes are called: by their numbers where the data does not say.

    Texts are classes in the order of the alphabet, those of the first split.
    """
    values = {
        split: table.with_format("arrow").select_columns([column])[:].column(column).to_pylist()
        for split, table in tables.items()
    }
    feature = next(iter(tables.values())).features[column]
    classes = tuple(map(str, getattr(feature, "names", None) or ()))
    if _kind(feature) in TEXTS:
        classes = tuple(sorted(set(next(iter(values.values()))) - {None}))
        numbers = {text: number for number, text in enumerate(classes)}
        values = {split: [numbers.get(text) for text in texts] for split, texts in values.items()}
    for split, found in values.items():
        without = sum(number is None or number < 0 for number in found)
        if without:
            raise RecipeValueError(
                "data.label_key",
                f"'{column}' names no class in {without} of {len(found)} rows of the split '{split}' of {name}; take "
                "another one by data.kwargs.test_split, or a share of the training images by data.validation=0.1",
            )
    labels = {split: torch.tensor(found, dtype=torch.int64) for split, found in values.items()}
    if not classes:
        largest = max((int(found.max()) for found in labels.values() if len(found)), default=-1)
        classes = tuple(map(str, range(largest + 1)))
    return labels, classes


def _classes_of_masks(
    section: DataSection, name: str, parts: Sequence[Rows]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    given = section.kwargs.get("num_classes")
    if given is not None:
        return given_classes(given), ()
    classes, note = classes_in(parts, section.ignore_index, f"of {name}", "data.name")
    return classes, (note,)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(f"'{name}'" for name in names)
