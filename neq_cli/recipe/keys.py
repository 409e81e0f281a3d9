"""Every key of a recipe, its type and its default; names that only torch knows are checked in training."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from neq_cli.events import EPOCH, OBSERVATION
from neq_cli.recipe.data_keys import DataSection
from neq_cli.recipe.optimizer_keys import OptimizerSection, SchedulerSection
from neq_cli.recipe.parallel_keys import FsdpSection
from neq_cli.recipe.policy_keys import POLICIES, NEqPolicy, PolicySection
from neq_cli.recipe.values import (
    COURSE,
    DRAW,
    RESULT,
    SURROUNDINGS,
    BackwardMode,
    BelowOne,
    Change,
    Count,
    Device,
    Entrypoint,
    NotNegative,
    Positive,
    ProbeEvery,
    Section,
    Snapshot,
    Task,
    Trackers,
    exactly_one_source,
)
from neq_cli.text import counted


@dataclass(frozen=True)
class Problem:
    """Something wrong with a recipe: ``key`` is a dotted path from its top ("optimizer.momentun"), "" the whole.

    ``others`` are the keys that are to blame where it is not that one alone.
    """

    key: str
    message: str
    others: tuple[str, ...] = ()


# Called with a section's name and the section, with "device" and its text, or with "" and the whole recipe.
Check = Callable[[str, Any], Iterable[Problem]]


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
        exactly_one_source(self.name, self.entrypoint)
        return self


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
    parallel: Annotated[Literal["ddp", "fsdp"], SURROUNDINGS] = Field(
        default="ddp",
        description="ddp: every process has all of the model; fsdp: weights, gradients and optimiser state are divided "
        "over them; without effect where there is one",
    )
    fsdp: FsdpSection = Field(default_factory=lambda: FsdpSection(), examples=["{blocks: ['encoder.layers.*']}"])
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
    if recipe.fsdp.blocks is not None and recipe.parallel != "fsdp":
        found.append(f"fsdp.blocks: do nothing with parallel {recipe.parallel}; add parallel: fsdp")
    if recipe.scheduler.warmup_epochs > recipe.epochs:
        warmup = counted(recipe.scheduler.warmup_epochs, "epoch")
        found.append(
            f"scheduler.warmup_epochs: {warmup} of warm-up, but the run ends after {recipe.epochs}, before its "
            "learning rate is reached"
        )
    return tuple(found)
