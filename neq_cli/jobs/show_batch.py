"""Draws the first training batch of a recipe into a file: its data alone is opened, no model built, nothing trained."""

from __future__ import annotations

import io
from pathlib import Path

from neq_cli.errors import NeqError
from neq_cli.jobs.prepare import located
from neq_cli.recipe.load import LoadedRecipe
from neq_cli.runs.store.disk import atomic_write, writing
from neq_cli.runs.views.report.drawing import MARK
from neq_cli.runs.views.report.files import check_replaceable
from neq_cli.text import printable

_MEND = "choose another place with --show-batch"


def check_picture(path: Path) -> None:
    """Raise NeqError where no picture can be written to ``path``: before anything slow is begun."""
    if path.suffix.lower() != ".png":
        raise NeqError(f"{printable(path)}: must end in .png")
    with writing(path, _MEND):
        check_replaceable(path)


def show_batch(loaded: LoadedRecipe, path: Path) -> None:
    """Write the picture of the first batch of the first epoch, the very images that training would see.

    One that neq drew before is replaced. NeqError where the data cannot be opened, or holds no images.
    """
    import torch
    from PIL.PngImagePlugin import PngInfo

    from neq_cli.training.batch_picture import draw_batch
    from neq_cli.training.batches.loaders import make_loaders
    from neq_cli.training.data.parts import load_data

    recipe = loaded.recipe
    with located(loaded):
        data = load_data(recipe.data, recipe.seed, own_task=recipe.task_is_own)
        # Neither the cache nor the number of workers changes a batch; for one of them both would only take time.
        loaders = make_loaders(data, recipe.batch_size, 0, recipe.seed, torch.device("cpu"), cache="none")
        loaders.start_epoch(1)
        picture = draw_batch(next(iter(loaders.train)), data)
    mark = PngInfo()
    mark.add_text("Software", MARK)
    content = io.BytesIO()
    picture.save(content, format="png", pnginfo=mark)
    with writing(path, _MEND):
        atomic_write(path, content.getvalue())
