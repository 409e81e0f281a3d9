"""What the value of a recipe's key may be, and what it means that it changes: the words that keys.py is written in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field


@dataclass(frozen=True)
class Words:
    """What a key takes, in words, where its type alone does not say it; ``choices`` are what a typo may have meant."""

    text: str
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Change:
    """What another value of a key makes of a run; every key says it in its annotation.

    ``may_change``: a run that is resumed may take the other value. ``names_configuration``: runs that differ in the key
    are compared as two configurations; else as one, like runs that differ in their seed.
    """

    may_change: bool
    names_configuration: bool


RESULT = Change(may_change=False, names_configuration=True)  # what is trained
COURSE = Change(may_change=True, names_configuration=True)  # how far and by what means; may change in the middle
SURROUNDINGS = Change(may_change=True, names_configuration=False)  # where it is computed; changes no result
DRAW = Change(may_change=False, names_configuration=False)  # one of many runs of the same configuration


class Section(BaseModel):
    """A block of a recipe: unknown keys are refused, values are not coerced across types."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


_DOTTED = r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*"
_CALLABLE = rf"{_DOTTED}:{_DOTTED}"

Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
BelowOne = Annotated[float, Field(gt=0, lt=1)]
Count = Annotated[int, Field(gt=0)]
Entrypoint = Annotated[str, Field(pattern=f"^{_CALLABLE}$"), Words("pkg.mod:callable")]
ProbeEvery = Annotated[
    Literal["epoch"] | Count, Words("epoch, or a whole number of optimiser steps above 0", ("epoch",))
]
Task = Annotated[
    str,
    Field(pattern=f"^(classification|segmentation|{_CALLABLE})$"),
    Words("classification, segmentation or pkg.mod:callable", ("classification", "segmentation")),
]
PerChannel = Annotated[list[float], Field(min_length=1)]
PositivePerChannel = Annotated[list[Positive], Field(min_length=1)]
PixelRange = Annotated[list[float], Field(min_length=2, max_length=2), Words("list of two numbers, low and high")]
Channels = Annotated[Literal["auto"] | Literal[1, 3], Words("1, 3 or auto", ("auto",))]
Augment = Literal["none", "crop", "cifar", "imagenet", "randaugment", "segmentation"]
BackwardMode = Literal["exact", "truncated", "dense"]
Snapshot = Literal["device", "cpu"]
Scope = Literal["neuron", "layer", "front"]
Cache = Literal["auto", "memory", "device", "none"]
TrackerName = Literal["tensorboard", "wandb", "mlflow", "trackio"]
Trackers = Annotated[list[TrackerName], Words("a list of any of tensorboard, wandb, mlflow, trackio")]
Device = Annotated[
    str,
    Field(pattern=r"^[a-z]+(:[0-9]+)?$"),
    Words("auto, cpu, cuda, cuda:N, mps or another torch device", ("auto", "cpu", "cuda", "mps")),
]


class AtOdds(ValueError):
    """What validators of a section raise of values that do not go together: those of ``keys``."""

    def __init__(self, message: str, *keys: str) -> None:
        self.keys = keys
        super().__init__(message)


def exactly_one_source(name: str | None, entrypoint: str | None) -> None:
    """Raise ValueError where not one of both is given; sections that name something in either way ask it."""
    if name is None and entrypoint is None:
        raise AtOdds("neither name nor entrypoint is given; write one of them", "name", "entrypoint")
    if name is not None and entrypoint is not None:
        raise AtOdds("both name and entrypoint are given; remove one of them", "name", "entrypoint")
