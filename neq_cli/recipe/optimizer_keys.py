"""The keys of the optimiser and of its schedule, whose further keys are the arguments of a class of torch."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, model_validator

from neq_cli.recipe.values import (
    RESULT,
    NotNegative,
    Section,
)


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
