"""Configurations of transformers' models: a class's defaults, or a checkpoint's in a folder or Hugging Face's cache."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from neq_cli.errors import RecipeValueError, one_line
from neq_cli.training.models.libraries import imported


def place_of(name: str) -> str:
    """Return the absolute path of a checkpoint's folder, or ``name`` itself where it is one of the Hugging Face hub."""
    path = Path(name).expanduser()
    if path.is_dir():
        return str(path.absolute())
    if name.startswith(("~", ".", "/")):
        raise RecipeValueError("model.name", f"no folder '{path}'; give one that holds a config.json")
    return name


def class_of(checkpoint: str, model: str) -> type:
    """Return the configuration class of a checkpoint; RecipeValueError where it is not there. ``model`` names it."""
    try:
        with quietly(model):
            return type(configured(None, checkpoint, model, {}))
    except RecipeValueError:
        raise
    except Exception as error:  # a type that this version does not have, or that only code in the checkpoint explains
        raise RecipeValueError(
            "model.name", f"'{model}' is no model of transformers' own ({one_line(error)})"
        ) from error


def configured(kind: Any, checkpoint: str | None, model: str, values: Mapping[str, Any]) -> Any:
    """Return a configuration with these values, otherwise the checkpoint's, or the defaults of class ``kind``."""
    if checkpoint is None:
        try:
            return kind(**values)
        except Exception as error:  # several lines, of which the last one tells
            raise ValueError(" ".join(str(error).split())) from error
    auto = imported("transformers", model).AutoConfig
    try:
        return auto.from_pretrained(checkpoint, local_files_only=True, trust_remote_code=False, **values)
    except OSError as error:
        raise RecipeValueError("model.name", unreadable(model, checkpoint, "configuration", error)) from error


def unreadable(model: str, checkpoint: str, what: str, error: Exception) -> str:
    """Return what to say where a checkpoint's configuration or weights, ``what``, could not be read."""
    if Path(checkpoint).is_dir():
        return f"the {what} in '{checkpoint}' cannot be read ({one_line(error).rstrip('.')})"
    cache = imported("huggingface_hub.constants", model).HF_HUB_CACHE
    if not isinstance(error, OSError):
        return f"the {what} of '{checkpoint}' in '{cache}' cannot be read ({one_line(error).rstrip('.')})"
    return f"no {what} of '{checkpoint}' in '{cache}', nor a folder of that name; `hf download {checkpoint}` fetches it"


def image_statistics(checkpoint: str | None, model: str) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
    """Return mean and std per channel of the checkpoint's image processor; None where it does not say."""
    settings = _processor(checkpoint, model) if checkpoint is not None else {}
    return _per_channel(settings.get("image_mean")), _per_channel(settings.get("image_std"))


def _processor(checkpoint: str, model: str) -> Mapping[str, Any]:
    name = "preprocessor_config.json"
    path: Any = Path(checkpoint) / name
    if not Path(checkpoint).is_dir():
        path = imported("huggingface_hub", model).try_to_load_from_cache(checkpoint, name)
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):  # there need not be one
        return {}
    return content if isinstance(content, dict) else {}


def _per_channel(values: Any) -> tuple[float, ...] | None:
    if isinstance(values, list) and values and all(isinstance(value, int | float) for value in values):
        return tuple(map(float, values))
    return None


@contextmanager
def quietly(model: str) -> Iterator[None]:
    """Keep transformers' log and progress bars off the screen: what matters of them becomes an error or a note."""
    logging = imported("transformers.utils.logging", model)
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
