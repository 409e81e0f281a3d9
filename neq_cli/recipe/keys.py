"""Every key of a recipe, its type and its default; names that only torch knows are checked in training."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, model_validator

from neq_cli.events import EPOCH, OBSERVATION
from neq_cli.recipe.policy_keys import POLICIES, NEqPolicy, PolicySection
from neq_cli.recipe.values import (
    COURSE,
    DRAW,
    RESULT,
    SURROUNDINGS,
    Augment,
    BackwardMode,
    BelowOne,
    Cache,
    Change,
    Count,
    Device,
    Entrypoint,
    NotNegative,
    PerChannel,
    PixelRange,
    Positive,
    PositivePerChannel,
    ProbeEvery,
    Section,
    Share,
    Snapshot,
    Task,
    Trackers,
)


@dataclass(frozen=True)
class Problem:
    """Something wrong with a recipe: ``key`` is a dotted path from its top ("optimizer.momentun"), "" the whole."""

    key: str
    message: str


# Called with a section's name and the section, with "device" and its text, or with "" and the whole recipe.
Check = Callable[[str, Any], Iterable[Problem]]


def _exactly_one_source(name: str | None, entrypoint: str | None) -> None:
    if name is None and entrypoint is None:
        raise ValueError("neither name nor entrypoint is given; write one of them")
    if name is not None and entrypoint is not None:
        raise ValueError("both name and entrypoint are given; remove one of them")


class ModelSection(Section):
    """Which network is trained: by name or from a Python callable."""

    name: Annotated[str | None, RESULT] = Field(
        default=None,
        description="torchvision builder, timm/NAME, transformers/NAME, or resnet8/20/32/44/56/110 for small images",
        examples=["resnet18", "resnet50", "vit_b_16", "resnet20", "resnet32"],
    )
    entrypoint: Annotated[Entrypoint | None, RESULT] = Field(
        default=None, description="callable that returns a torch.nn.Module, in place of name"
    )
    weights: Annotated[str | None, RESULT] = Field(
        default=None,
        description="weights of torchvision or timm by name, of a checkpoint of transformers; null: random ones",
        examples=["DEFAULT"],
    )
    checkpoint: Annotated[str | None, RESULT] = Field(
        default=None, description="file of weights to start from: .safetensors, .pt or .pth"
    )
    fresh: Annotated[list[str], RESULT] = Field(
        default_factory=list,
        description="globs of tensors that start at random, whatever the weights or the checkpoint have: a new head",
        examples=["['head.*']"],
    )
    weights_backbone: Annotated[str | None, RESULT] = Field(
        default=None,
        description="torchvision weights of a segmentation model's backbone alone; null: random ones",
        examples=["DEFAULT"],
    )
    kwargs: Annotated[dict[str, Any], RESULT] = Field(
        default_factory=dict,
        description="arguments of the builder, callable or configuration",
        examples=["{num_classes: 10}"],
    )

    @model_validator(mode="after")
    def _one_source(self) -> ModelSection:
        _exactly_one_source(self.name, self.entrypoint)
        return self


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

    @model_validator(mode="after")
    def _consistent(self) -> DataSection:
        _exactly_one_source(self.name, self.entrypoint)
        if self.mean is not None and self.std is not None and len(self.mean) != len(self.std):
            raise ValueError(
                f"mean has {len(self.mean)} values and std {len(self.std)}; give each one value per channel"
            )
        if self.value_range is not None and not self.value_range[0] < self.value_range[1]:
            raise ValueError(f"value_range {self.value_range} is not from a lower to a higher value; turn it round")
        if self.base_size is not None and self.image_size is not None and self.base_size < self.image_size:
            raise ValueError(
                f"base_size {self.base_size} is less than image_size {self.image_size}, which is cut from it; raise it"
            )
        return self


class ParameterGroup(Section):
    """Parameters with optimiser settings of their own, such as no weight decay, or a head's learning rate."""

    parameters: Annotated[list[str], Field(min_length=1)] = Field(
        description="globs of parameter names", examples=["['*.bias', 'fc.*']"]
    )
    lr: NotNegative | None = Field(default=None, description="null: the optimiser's", examples=[0.01])
    weight_decay: NotNegative | None = Field(default=None, description="null: the optimiser's", examples=[0.0])


class _ArgumentsSection(Section):
    """A section whose further keys are the arguments of the class it names."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True, allow_inf_nan=False)

    @model_validator(mode="after")
    def _arguments_beside_name(self) -> _ArgumentsSection:
        if "kwargs" in (self.model_extra or {}):
            raise ValueError("arguments stand beside name here; move those under kwargs one level up")
        return self

    @property
    def kwargs(self) -> dict[str, Any]:
        """The class's arguments as written; one that is null is left out, so that the class's own default holds."""
        return {key: value for key, value in (self.model_extra or {}).items() if value is not None}


class OptimizerSection(_ArgumentsSection):
    """A torch.optim optimiser. Further keys are its arguments, such as `momentum`; null stands for its default."""

    name: Annotated[str, RESULT] = Field(
        default="sgd",
        description="torch.optim class, in any case: sgd, adam, adamw, rmsprop",
        examples=["sgd", "adam", "adamw", "rmsprop"],
    )
    lr: Annotated[NotNegative | None, RESULT] = Field(
        default=None, description="null: the optimiser's default", examples=[0.1]
    )
    groups: Annotated[list[ParameterGroup], RESULT] = Field(
        default_factory=list,
        description="parameters with settings of their own",
        examples=["[{parameters: ['*.bias'], weight_decay: 0.0}]"],
    )


class SchedulerSection(_ArgumentsSection):
    """A torch.optim.lr_scheduler. Further keys are its arguments, such as `milestones`, counted in its interval."""

    name: Annotated[str, RESULT] = Field(
        default="constant",
        description="constant, multistep, cosine, onecycle, plateau, ... or the class's name",
        examples=["constant", "multistep", "cosine", "step", "polynomial", "onecycle", "plateau"],
    )
    warmup_epochs: Annotated[int, Field(ge=0), RESULT] = Field(
        default=0, description="epochs of linear warm-up before it"
    )
    interval: Annotated[Literal["epoch", "step"], RESULT] = Field(
        default="epoch", description="the rate changes after every epoch, or every optimiser step; plateau: after tests"
    )

    @property
    def length_argument(self) -> str | None:
        """The argument that says how long the schedule is: where it is not given, it follows from the epochs."""
        lengths = {"cosine": "T_max", "cosineannealing": "T_max", "polynomial": "total_iters", "linear": "total_iters"}
        lengths["onecycle"] = "total_steps"
        return lengths.get(self.name.lower().removesuffix("lr"))


class Recipe(Section):
    """A whole recipe."""

    description: Annotated[str, SURROUNDINGS] = Field(default="", description="one line for `neq recipes`")
    model: ModelSection = Field(examples=["{name: resnet18}"])
    data: DataSection = Field(examples=["{name: CIFAR10}"])
    task: Annotated[Task, RESULT] = Field(
        default="classification", description="what is learnt; a callable of your own defines loss and metric"
    )
    epochs: Annotated[Count, COURSE] = Field(description="passes over the training data", examples=[250])
    batch_size: Annotated[Count, COURSE] = Field(
        default=100, description="images, or other items, per step; per process where there are several"
    )
    optimizer: OptimizerSection = Field(examples=["{name: sgd, lr: 0.1}"])
    scheduler: SchedulerSection = Field(default_factory=lambda: SchedulerSection(), examples=["{name: cosine}"])
    policy: PolicySection = Field(default_factory=lambda: NEqPolicy(), examples=["{kind: neq}"])
    exclude: Annotated[list[str], RESULT] = Field(
        default_factory=list, description="globs of layers that are never frozen", examples=["['conv1', 'layer1.*']"]
    )
    backward: Annotated[BackwardMode, RESULT] = Field(
        default="exact",
        description="exact: no frozen weight gradients; truncated: nor frozen errors, an approximation; dense: all",
    )
    precision: Annotated[Literal["fp32", "bf16", "fp16"], RESULT] = Field(
        default="fp32", description="bf16, fp16: autocast; fp16 scales the loss"
    )
    channels_last: Annotated[bool | Literal["auto"], SURROUNDINGS] = Field(
        default="auto",
        description="memory layout of images and convolutions; auto: timed, channels_last if clearly faster",
    )
    compile: Annotated[bool, COURSE] = Field(default=False, description="torch.compile the model")
    cuda_graph: Annotated[bool, SURROUNDINGS] = Field(
        default=False, description="capture each epoch's training step in a CUDA graph"
    )
    gradient_accumulation: Annotated[Count, RESULT] = Field(default=1, description="batches per optimiser step")
    clip_grad_norm: Annotated[Positive | None, RESULT] = Field(
        default=None, description="largest gradient norm; null: any", examples=[1.0]
    )
    label_smoothing: Annotated[float, Field(ge=0, lt=1), RESULT] = Field(
        default=0.0, description="of the cross-entropy loss"
    )
    ema: Annotated[BelowOne | None, RESULT] = Field(
        default=None, description="decay of averaged weights, which are tested; null: none", examples=[0.999]
    )
    eval_every: Annotated[Count, COURSE] = Field(
        default=1, description="epochs, or observations of probe_every, between tests; the last is always tested"
    )
    checkpoint_minutes: Annotated[Positive, SURROUNDINGS] = Field(
        default=15.0,
        description="minutes between checkpoints within an epoch; one follows every epoch or observation anyway",
    )
    probe_every: Annotated[ProbeEvery, RESULT] = Field(
        default="epoch",
        description="when neurons are observed, sets chosen and rows written: after every epoch, or so many optimiser "
        "steps",
        examples=[500],
    )
    probe_snapshot: Annotated[Snapshot, SURROUNDINGS] = Field(
        default="device",
        description="where the weights that the next probe compares with are kept; cpu: they come to the device for "
        "the probe alone",
    )
    stop_when_frozen: Annotated[Count | None, COURSE] = Field(
        default=None,
        description="end once all that may freeze has been frozen for so many epochs, or observations of "
        "probe_every, after the last drop of the learning rate; null: train all epochs",
        examples=[3],
    )
    sync_batchnorm: Annotated[bool, RESULT] = Field(
        default=False, description="batch norm over the batches of all processes; without effect where there is one"
    )
    # NumPy takes 32-bit seeds only.
    seed: Annotated[int, Field(ge=0, lt=2**32), DRAW] = Field(
        default=1, description="of weights, batches, augmentation and policy"
    )
    deterministic: Annotated[bool, COURSE] = Field(
        default=False, description="same recipe, same machine, same bits; may be slower"
    )
    device: Annotated[Device, SURROUNDINGS] = Field(
        default="auto", description="auto takes cuda, then mps, then cpu; or a torch device"
    )
    track: Annotated[Trackers, SURROUNDINGS] = Field(
        default_factory=list,
        description="trackers that are told of the run beside its directory; each is an extra",
        examples=["[tensorboard]"],
    )
    energy: Annotated[bool, SURROUNDINGS] = Field(
        default=False, description="measure the joules of every row: of the GPUs by NVML, of the processors by RAPL"
    )
    grams_per_kwh: Annotated[NotNegative | None, SURROUNDINGS] = Field(
        default=None, description="CO2 of a kilowatt-hour, which energy then tells too; null: not told", examples=[56]
    )

    @property
    def unit(self) -> str:
        """What rows of metrics.csv are of: EPOCH, or OBSERVATION where there is one every so many optimiser steps."""
        return EPOCH if self.probe_every == "epoch" else OBSERVATION

    @property
    def task_is_own(self) -> bool:
        """Whether what is learnt is a callable's to say, and not one of neq's own tasks."""
        return ":" in self.task


def _changes(model: type[Section], prefix: str = "") -> dict[str, Change]:
    """Return what every dotted key below ``prefix`` says; a list of sections is one key."""
    found: dict[str, Change] = {}
    for name, field in model.model_fields.items():
        sections = [field.annotation] if name != "policy" else list(POLICIES.values())
        for section in sections:
            if isinstance(section, type) and issubclass(section, Section):
                found |= _changes(section, f"{prefix}{name}.")
            else:
                (found[f"{prefix}{name}"],) = [said for said in field.metadata if isinstance(said, Change)]
    return found


CHANGES = _changes(Recipe)
"""What every key says, by its dotted name. Of keys that are no field, such as an optimiser's arguments: RESULT."""
# Whether another batch_size keeps the number of images per update is asked where the number of processes is known.
MAY_CHANGE = tuple(key for key, said in CHANGES.items() if said.may_change)
NAMES_NO_CONFIGURATION = tuple(key for key, said in CHANGES.items() if not said.names_configuration)


def warnings(recipe: Recipe) -> tuple[str, ...]:
    """Return what is allowed but probably not meant, one line each: "policy.mu: 0.9 is above 0.5, ..."."""
    found = []
    if isinstance(recipe.policy, NEqPolicy):
        if recipe.policy.mu > 0.5:
            found.append(
                f"policy.mu: {recipe.policy.mu} is above 0.5, where velocity is no longer sure to stay bounded (Eq. 5) "
                "and old changes keep neurons trainable for longer"
            )
        if recipe.policy.epsilon == 0 and recipe.policy.definition == "paper":
            found.append("policy.epsilon: 0 freezes nothing, for no |velocity| is below it (Eq. 6)")
        if recipe.policy.scope != "neuron" and recipe.policy.share == 1:
            found.append(
                f"policy.share: 1 with scope {recipe.policy.scope}, so that a layer freezes only once every one of its "
                "neurons is at equilibrium; 0.8 is what most need"
            )
        if recipe.policy.front_mode == "inference" and recipe.policy.scope != "front":
            found.append(f"policy.front_mode: inference does nothing with scope {recipe.policy.scope}; use scope front")
        if recipe.policy.thaw_at_lr_drop is not None and recipe.scheduler.name.lower() == "constant":
            found.append("policy.thaw_at_lr_drop: nothing thaws by it, for without a scheduler no learning rate falls")
    if recipe.grams_per_kwh is not None and not recipe.energy:
        found.append("grams_per_kwh: does nothing without energy; add energy: true")
    if recipe.scheduler.warmup_epochs > recipe.epochs:
        found.append(
            f"scheduler.warmup_epochs: {recipe.scheduler.warmup_epochs} epochs of warm-up, but the run ends after "
            f"{recipe.epochs}, before its learning rate is reached"
        )
    return tuple(found)
