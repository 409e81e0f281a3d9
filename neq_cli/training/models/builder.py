"""What makes a recipe's network, and what that tells of arguments, weights and images; libraries have their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from neq_cli.errors import RecipeValueError
from neq_cli.recipe import ModelSection
from neq_cli.recipe.entrypoints import accepted_arguments, check_kwargs


@dataclass(frozen=True)
class ImageDefaults:
    """The images that a model is made for: pixels of a side, mean and std per channel, channels; None: not told."""

    size: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    channels: int | None = None


def side_of(size: Any) -> int | None:
    """Return the side of the square that a number, or a list of height and width, stands for; None for all else."""
    sides = [*size] if isinstance(size, list | tuple) and size else [size]
    return sides[0] if isinstance(sides[0], int) and all(side == sides[0] for side in sides) else None


@dataclass(frozen=True)
class Builder:
    """A callable that returns the network, and the name that messages use: of an entrypoint, or of neq's own."""

    name: str
    make: Callable[..., nn.Module]

    classes_argument: ClassVar[str] = "num_classes"
    """The argument that says how many classes the network tells apart."""
    channels_argument: ClassVar[str | None] = "in_channels"
    """The argument that says how many channels its images have; None where it has none."""

    @property
    def needs_task(self) -> bool:
        """Whether the network depends on the recipe's task."""
        return False

    @property
    def accepted(self) -> set[str]:
        """Arguments known to be taken; ``**kwargs`` may hide others."""
        return accepted_arguments(self.make)[0]

    def problems(self, kwargs: Mapping[str, Any]) -> list[tuple[str, str]]:
        """Return (argument, problem) pairs of the recipe's ``kwargs``."""
        return check_kwargs(self.make, kwargs, name=self.name)

    def completed(self, section: ModelSection, num_classes: int | None) -> dict[str, Any]:
        """Return the recipe's arguments with those that follow from the data and from the rest of the section."""
        kwargs = dict(section.kwargs)
        if num_classes is not None and self.classes_argument in self.accepted:
            kwargs.setdefault(self.classes_argument, num_classes)
        return kwargs

    def find_weights(self, section: ModelSection) -> Any:
        """Return what ``section.weights`` names, without opening it; RecipeValueError where there is no such thing."""
        raise RecipeValueError(
            "model.weights", f"{self.name} has no weights by name; give a file as model.checkpoint, or null"
        )

    def published(self, section: ModelSection, model: nn.Module) -> Mapping[str, Tensor]:
        """Return the tensors that ``section.weights`` names, by the names that ``model`` has for them.

        Those that it has in another shape may be among them. RecipeValueError where they are not to be had.
        """
        raise NotImplementedError(f"{self.name} has no weights by name")  # find_weights has said so

    def image_defaults(self, section: ModelSection) -> ImageDefaults:
        """Return what the model's own configuration says of images; nothing is opened but small files of settings."""
        return ImageDefaults(channels=self.given_channels(section, 3))

    def given_channels(self, section: ModelSection, default: int | None) -> int | None:
        """Return how many channels the recipe's arguments give the network, else ``default``; None for what is none."""
        given = section.kwargs.get(self.channels_argument or "", default)
        return given if isinstance(given, int) and not isinstance(given, bool) else None
