"""Names that begin with a dot, which editors and file managers leave behind: no data; counted, for a note to say so."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from torchvision.datasets.folder import DatasetFolder

from neq_cli.text import some_of

_SHOWN = 3


class Hidden:
    """What would have been data below ``root`` but for a dot; told once, however often it was looked at."""

    def __init__(self, root: Path) -> None:
        self.root = str(root)
        self.found: dict[str, None] = {}  # below the root; a set in order

    def without(self, paths: Iterable[str]) -> list[str]:
        """Return ``paths``, which begin with the root, but those in which a name below it begins with a dot."""
        return [path for path in paths if not self._is_hidden(path)]

    def _is_hidden(self, path: str) -> bool:
        # Of strings, not Path objects: ImageNet has more than a million.
        below = path[len(self.root) :]
        place = below.find(f"{os.sep}.")
        if place < 0:
            return False
        end = below.find(os.sep, place + 1)
        self.found[below[1 : end if end >= 0 else None]] = None
        return True

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know of it, in one line; none where nothing was left out."""
        if not self.found:
            return ()
        shown = some_of(self.found, _SHOWN)
        return (f"data: names that begin with a dot are skipped ({len(self.found)}): {shown}",)


def folder_maker(kind: type[DatasetFolder], hidden: Hidden) -> Callable[..., Any]:
    """Return what makes a ``kind``, a data set of class folders, without what is hidden in its folder."""

    class Visible(kind):  # type: ignore[misc]
        def find_classes(self, directory: str) -> tuple[list[str], dict[str, int]]:
            folders = hidden.without(entry.path for entry in os.scandir(directory) if entry.is_dir())
            classes = sorted(map(os.path.basename, folders))
            if not classes:
                raise FileNotFoundError(f"no class folder in {directory}")
            return classes, {name: number for number, name in enumerate(classes)}

        @staticmethod
        def make_dataset(
            directory: str, class_to_idx: dict[str, int], *arguments: Any, allow_empty: bool = False, **options: Any
        ) -> list[tuple[str, int]]:
            samples = kind.make_dataset(directory, class_to_idx, *arguments, **{**options, "allow_empty": True})
            kept = set(hidden.without(path for path, _ in samples))
            samples = [(path, label) for path, label in samples if path in kept]
            there = {label for _, label in samples}
            empty = [name for name, label in class_to_idx.items() if label not in there]
            if empty and not allow_empty:
                raise NoImagesError(sorted(empty))
            return samples

    def make(*arguments: Any, **options: Any) -> Any:
        made = Visible(*arguments, **options)
        made.__class__ = kind  # which can be sent to another process
        return made

    return make


class NoImagesError(FileNotFoundError):
    """Folders of these classes hold no images."""

    def __init__(self, classes: list[str]) -> None:
        super().__init__(f"no images of the classes {', '.join(classes)}")
        self.classes = classes
