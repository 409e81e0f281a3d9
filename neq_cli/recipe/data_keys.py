"""The keys of what is trained on, and of how images are prepared; data sets' own arguments are checked in training."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from neq_cli.recipe.values import (
    RESULT,
    SURROUNDINGS,
    AtOdds,
    Augment,
    BelowOne,
    Cache,
    Channels,
    Count,
    Entrypoint,
    NotNegative,
    PerChannel,
    PixelRange,
    PositivePerChannel,
    Section,
    Share,
    exactly_one_source,
)


class DataSection(Section):
    """What it is trained on, images or anything else: by name or from a Python callable."""

    name: Annotated[str | None, RESULT] = Field(
        default=None,
        description="digits, image_folder, segmentation_folder, COCO, a torchvision dataset such as CIFAR10, or "
        "hf/NAME: a folder of parquet or the like, or a data set of the Hugging Face hub",
        examples=["CIFAR10", "CIFAR100", "ImageNet", "digits", "image_folder", "segmentation_folder", "COCO"],
    )
    entrypoint: Annotated[Entrypoint | None, RESULT] = Field(
        default=None, description="callable that returns (train, test) datasets, in place of name"
    )
    root: Annotated[str, SURROUNDINGS] = Field(
        default="~/data", description="folder of the data; ~ and $VARIABLES are expanded"
    )
    image_key: Annotated[str | None, RESULT] = Field(
        default=None, description="column of the images of hf/NAME; null: the one that holds images", examples=["img"]
    )
    label_key: Annotated[str | None, RESULT] = Field(
        default=None,
        description="column of the labels, or of the masks, of hf/NAME; null: the one of a class each",
        examples=["fine_label"],
    )
    download: Annotated[bool, SURROUNDINGS] = Field(
        default=True, description="let torchvision fetch what is missing, where it can"
    )
    image_size: Annotated[Count | None, RESULT] = Field(
        default=None,
        description="pixels of a side; null: what a model of timm or transformers is made for, else the data's own",
        examples=[224],
    )
    base_size: Annotated[Count | None, RESULT] = Field(
        default=None,
        description="shorter side of images with masks before they are cut; null: image_size",
        examples=[520],
    )
    augment: Annotated[Augment, RESULT] = Field(
        default="none",
        description="crop: pad and crop; cifar: crop and mirror; imagenet: resized crop and mirror; randaugment: "
        "imagenet and two of RandAugment's operations; segmentation: scale by 0.5 to 2, mirror and crop, masks too",
    )
    interpolation: Annotated[Literal["bilinear", "bicubic"], RESULT] = Field(
        default="bilinear", description="how images are scaled"
    )
    erasing: Annotated[Share, RESULT] = Field(
        default=0.0, description="share of training images of which a random part is noise"
    )
    mixup: Annotated[NotNegative, RESULT] = Field(
        default=0.0, description="alpha of MixUp; where cutmix is above 0 too, each takes every other batch at random"
    )
    cutmix: Annotated[NotNegative, RESULT] = Field(default=0.0, description="alpha of CutMix; 0: none")
    ignore_index: Annotated[int, RESULT] = Field(
        default=255, description="value of masks that is neither learnt nor measured"
    )
    channels: Annotated[Channels, RESULT] = Field(
        default="auto",
        description="1: grey, colours are made so; 3: grey is repeated; auto: as many as the model takes, where it "
        "tells, else as the data has, three of files",
        examples=[1],
    )
    value_range: Annotated[PixelRange | None, RESULT] = Field(
        default=None,
        description="pixel values that become black and white; null: those of their type, such as 0 and 65535",
        examples=["[0, 4095]"],
    )
    mean: Annotated[PerChannel | None, RESULT] = Field(
        default=None,
        description="per channel, of pixels in [0, 1]; null: the model's as image_size, else the data's own",
        examples=["[0.49, 0.48, 0.45]"],
    )
    std: Annotated[PositivePerChannel | None, RESULT] = Field(
        default=None,
        description="per channel, of pixels in [0, 1]; null: the model's as image_size, else the data's own",
        examples=["[0.25, 0.24, 0.26]"],
    )
    validation: Annotated[BelowOne | None, RESULT] = Field(
        default=None,
        description="share of the training images that is held out, by seed, and tested; null: the data's test part",
        examples=[0.1],
    )
    probe_size: Annotated[Count, RESULT] = Field(
        default=50, description="held-out training inputs that neurons are observed on"
    )
    workers: Annotated[int, Field(ge=0), SURROUNDINGS] = Field(
        default=2, description="processes that load images; 0: none; those that are kept are read once, by all cores"
    )
    cache: Annotated[Cache, SURROUNDINGS] = Field(
        default="auto", description="where decoded images are kept: in memory, on the device; auto: where they fit"
    )
    kwargs: Annotated[dict[str, Any], RESULT] = Field(
        default_factory=dict, description="further arguments of the dataset or callable", examples=["{split: digits}"]
    )

    @field_validator("channels", mode="before")
    @classmethod
    def _no_truth(cls, value: Any) -> Any:
        if isinstance(value, bool):  # which Python has for 1 and 0
            raise ValueError(f"{str(value).lower()} is not 1, 3 or auto")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> DataSection:
        exactly_one_source(self.name, self.entrypoint)
        if self.mean is not None and self.std is not None and len(self.mean) != len(self.std):
            raise AtOdds(
                f"mean has {len(self.mean)} values and std {len(self.std)}; give each one value per channel",
                "mean",
                "std",
            )
        if self.value_range is not None and not self.value_range[0] < self.value_range[1]:
            said = f"value_range {self.value_range} is not from a lower to a higher value; turn it round"
            raise AtOdds(said, "value_range")
        if self.base_size is not None and self.image_size is not None and self.base_size < self.image_size:
            raise AtOdds(
                f"base_size {self.base_size} is less than image_size {self.image_size}, which is cut from it; raise it",
                "base_size",
                "image_size",
            )
        return self

    @property
    def folder(self) -> Path:
        """``root`` with ~ and $VARIABLES expanded."""
        return Path(os.path.expandvars(self.root)).expanduser()

    @property
    def asked_channels(self) -> int | None:
        """How many channels images are brought to, None where they keep those that they come in."""
        return None if self.channels == "auto" else self.channels

    @property
    def pixel_range(self) -> tuple[float, float] | None:
        """The pixel values that become 0 and 1, None where it is those of their type."""
        return None if self.value_range is None else (self.value_range[0], self.value_range[1])
