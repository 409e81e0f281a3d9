"""What a recipe may say: the one home of every key, its type and its default. Needs no torch."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Section(BaseModel):
    """A block of a recipe: unknown keys are refused, values are not coerced across types."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class ModelSection(Section):
    """Which network is trained: a torchvision builder or CIFAR ResNet by name, or a Python callable."""

    name: str | None = Field(None, description="torchvision builder, or resnet20/32/44/56/110 for CIFAR")
    entrypoint: str | None = Field(None, description="pkg.mod:callable that returns a torch.nn.Module")
    weights: str | None = Field(None, description="torchvision weights, such as DEFAULT; null starts from scratch")
    checkpoint: str | None = Field(None, description="file of weights to start from: .safetensors, .pt or .pth")
    kwargs: dict[str, Any] = Field(default_factory=dict, description="arguments of the builder or callable")


class DataSection(Section):
    """Which images it is trained on."""

    name: str | None = Field(None, description="digits, image_folder, or a torchvision dataset such as CIFAR10")
    entrypoint: str | None = Field(None, description="pkg.mod:callable that returns (train, test) datasets")
    root: str = Field("~/data", description="folder of the data; ~ and $VARIABLES are expanded")
    download: bool = Field(True, description="let torchvision fetch what is missing, where it can")
    image_size: Annotated[int, Field(gt=0)] | None = Field(None, description="pixels of a side; null: the data's own")
    augment: Literal["none", "crop", "cifar", "imagenet"] = Field(
        "none", description="crop: pad and crop; cifar: crop and mirror; imagenet: resized crop and mirror"
    )
    mean: list[float] | None = Field(None, description="per channel, of pixels in [0, 1]; null: the data's own")
    std: list[float] | None = Field(None, description="per channel, of pixels in [0, 1]; null: the data's own")
    probe_size: Annotated[int, Field(gt=0)] = Field(50, description="held-out training inputs that neurons are observed on")
    workers: Annotated[int, Field(ge=0)] = Field(2, description="processes that load images; 0: none")
    kwargs: dict[str, Any] = Field(default_factory=dict, description="further arguments of the dataset or callable")


class ParameterGroup(Section):
    """Parameters with optimiser settings of their own, such as no weight decay, or a head's learning rate."""

    parameters: list[str] = Field(description="globs of parameter names: '*.bias', 'fc.*'")
    lr: Annotated[float, Field(ge=0)] | None = None
    weight_decay: Annotated[float, Field(ge=0)] | None = None


class OptimizerSection(Section):
    """A torch.optim optimiser. Further keys are its arguments."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True)

    name: str = Field("sgd", description="torch.optim class, in any case: sgd, adam, adamw, rmsprop")
    lr: Annotated[float, Field(ge=0)] | None = Field(None, description="null: the optimiser's default")
    groups: list[ParameterGroup] = Field(default_factory=list, description="parameters with settings of their own")

    @property
    def kwargs(self) -> dict[str, Any]:
        """The optimiser's arguments beyond ``lr``, as written in the recipe."""
        return dict(self.model_extra or {})


class SchedulerSection(Section):
    """A torch.optim.lr_scheduler, stepped once per epoch. Further keys are its arguments."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True)

    name: str = Field("constant", description="constant, multistep, cosine, step, polynomial, ... or the class's name")
    warmup_epochs: Annotated[int, Field(ge=0)] = Field(0, description="epochs of linear warm-up before it")

    @property
    def kwargs(self) -> dict[str, Any]:
        """The scheduler's arguments, as written in the recipe."""
        return dict(self.model_extra or {})


class BaselinePolicy(Section):
    """Freezes nothing."""

    kind: Literal["baseline"]


class NEqPolicy(Section):
    """Freezes neurons at equilibrium (Eq. 1, 3, 4, 6)."""

    kind: Literal["neq"]
    epsilon: Annotated[float, Field(ge=0)] = Field(0.001, description="frozen when |velocity| < epsilon (Eq. 6)")
    mu: Annotated[float, Field(ge=0, lt=1)] = Field(0.5, description="damping of the velocity (Eq. 4); safe to 0.5")
    definition: Literal["paper", "reference"] = Field("paper", description="the paper's equations, or the authors' code")


class StochasticPolicy(Section):
    """Freezes a random share of every layer's neurons, drawn anew each epoch."""

    kind: Literal["stochastic"]
    p: Annotated[float, Field(ge=0, le=1)] | Annotated[str, Field(pattern=r"^match:.+")] = Field(
        description="share of neurons; match:RUN_DIR takes the p with that run's mean paper FLOPs"
    )
    matched_p: Annotated[float, Field(ge=0, le=1)] | None = Field(
        None, description="what match: came to; written into the resolved recipe"
    )


class CustomPolicy(Section):
    """Any policy of your own."""

    kind: Literal["entrypoint"]
    entrypoint: str = Field(description="pkg.mod:callable that returns a Policy")
    kwargs: dict[str, Any] = Field(default_factory=dict, description="arguments of the callable")


PolicySection = Annotated[
    BaselinePolicy | NEqPolicy | StochasticPolicy | CustomPolicy, Field(discriminator="kind")
]


class Recipe(Section):
    """A whole recipe."""

    description: str = Field("", description="one line for `neq recipes`")
    model: ModelSection
    data: DataSection
    task: str = Field("classification", description="classification, or pkg.mod:callable")
    epochs: Annotated[int, Field(gt=0)]
    batch_size: Annotated[int, Field(gt=0)] = Field(100, description="per process")
    optimizer: OptimizerSection
    scheduler: SchedulerSection = Field(default_factory=SchedulerSection)
    policy: PolicySection = Field(default_factory=lambda: NEqPolicy(kind="neq"))
    exclude: list[str] = Field(default_factory=list, description="globs of layers that are never frozen")
    backward: Literal["dense"] = Field("dense", description="dense: compute every gradient, discard the frozen rows'")
    precision: Literal["fp32", "bf16", "fp16"] = Field("fp32", description="bf16, fp16: autocast; fp16 scales the loss")
    channels_last: bool | Literal["auto"] = Field("auto", description="memory layout of images and convolutions")
    compile: bool = Field(False, description="torch.compile the model")
    gradient_accumulation: Annotated[int, Field(gt=0)] = Field(1, description="batches per optimiser step")
    clip_grad_norm: Annotated[float, Field(gt=0)] | None = Field(None, description="largest gradient norm")
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    ema: Annotated[float, Field(gt=0, lt=1)] | None = Field(None, description="decay of averaged weights, which are tested")
    eval_every: Annotated[int, Field(gt=0)] = Field(1, description="epochs between tests; the last is always tested")
    seed: Annotated[int, Field(ge=0)] = 1
    deterministic: bool = Field(False, description="same recipe, same machine, same bits")
    device: str = Field("auto", description="auto takes cuda, then mps, then cpu; or a torch device")

    @model_validator(mode="after")
    def _one_source(self) -> Recipe:
        for key, section in (("model", self.model), ("data", self.data)):
            if (section.name is None) == (section.entrypoint is None):
                raise ValueError(f"{key}: give either name or entrypoint")
        return self
