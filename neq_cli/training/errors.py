"""Errors of the training wing that name a recipe key or an image; one line each."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from neq_cli.errors import FreezingError, NeqError, RecipeError, RecipeValueError, TrainingError

if TYPE_CHECKING:
    from neq_cli.recipe import Recipe

_KEYS_OF_THE_METHOD = ("exclude", "model", "optimizer", "policy")
_OF_THE_DISK = {
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST),
    *(errno.ENOENT, errno.EIO, errno.EMFILE, errno.ENFILE),
}


class DataError(TrainingError):
    """An image that could not be read or does not fit the others, met while training: a mistake in what was given.

    A worker process hands its exception over as text with the traceback in front; only the last line is the message.
    """

    exit_code = NeqError.exit_code

    def __init__(self, message: str) -> None:
        name = f"{type(self).__module__}.{type(self).__qualname__}: "
        super().__init__(message.rpartition(name)[2].strip() if message.startswith("Caught ") else message)


def of_the_recipe(error: FreezingError) -> RecipeError:
    """Return what the method finds wrong as an error of the recipe: of the key that its message begins with."""
    key, _, reason = str(error).partition(": ")
    return RecipeValueError(key, reason) if key in _KEYS_OF_THE_METHOD else RecipeError([str(error)])


def of_the_disk(error: BaseException) -> bool:
    """Whether a file, its folder or the room for it is to blame, and not what it holds, nor a network."""
    return isinstance(error, OSError) and error.errno in _OF_THE_DISK


def divergence_mend(recipe: Recipe, before_any_update: bool = False) -> str:
    """Return what to try where losses or weights are no finite numbers, of that only what may help."""
    precise = recipe.precision == "fp32"
    if before_any_update:
        also = "" if precise else ", or try precision=fp32"
        what = "data" if recipe.task_is_own else "images (data.mean, data.std)"
        return f"no update came before it: look at the {what} and at the model's weights{also}"
    clips = [] if recipe.clip_grad_norm is not None else ["clip_grad_norm"]
    return " or ".join(["try a lower optimizer.lr", *clips, *([] if precise else ["precision=fp32"])])
