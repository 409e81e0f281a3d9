"""The keys of every kind of policy; a new policy's are added here.

``p: match:RUN_DIR`` is read and written by this module alone.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from neq_cli.recipe.values import DRAW, RESULT, Entrypoint, NotNegative, Scope, Section, Share, Words

ShareAboveZero = Annotated[float, Field(gt=0, le=1)]
MATCH = "match"  # alone, where a sweep is to find the run
MatchedRun = Annotated[str, Field(pattern=f"^{MATCH}:.+"), Words(f"{MATCH}:RUN_DIR")]


class BaselinePolicy(Section):
    """Freezes nothing."""

    kind: Annotated[Literal["baseline"], RESULT] = "baseline"


class NEqPolicy(Section):
    """Freezes neurons at equilibrium (Eq. 1, 3, 4, 6)."""

    kind: Annotated[Literal["neq"], RESULT] = "neq"
    epsilon: Annotated[NotNegative, RESULT] = Field(
        default=0.001, description="frozen when |velocity| < epsilon (Eq. 6)"
    )
    mu: Annotated[float, Field(ge=0, lt=1), RESULT] = Field(
        default=0.5, description="damping of the velocity (Eq. 4); safe up to 0.5"
    )
    definition: Annotated[Literal["paper", "reference"], RESULT] = Field(
        default="paper", description="paper: its equations; reference: what the authors' code computes"
    )
    scope: Annotated[Scope, RESULT] = Field(
        default="neuron",
        description="neuron: the paper's; layer: whole layers; front: whole layers before which nothing trains",
    )
    share: Annotated[ShareAboveZero, RESULT] = Field(
        default=1.0, description="a layer of which this share is at equilibrium freezes whole", examples=[0.8]
    )
    thaw_at_lr_drop: Annotated[Annotated[float, Field(gt=1)] | None, RESULT] = Field(
        default=None,
        description="all trains for an epoch when the learning rate has fallen by this factor; null: never",
        examples=[10],
    )
    front_mode: Annotated[Literal["train", "inference"], RESULT] = Field(
        default="train",
        description="inference: a frozen front runs as at inference, batch norms folded; an approximation",
    )


def matched_run(p: object) -> str | None:
    """Return the RUN_DIR of ``p: match:RUN_DIR``, None where p is a share or anything else."""
    word, colon, run = str(p).partition(":")
    return run if colon and word == MATCH else None


def match_with(run: object) -> str:
    """Return the p that ``matched_run`` reads as ``run``."""
    return f"{MATCH}:{run}"


class StochasticPolicy(Section):
    """Freezes at random, drawn anew each epoch: a share of every layer's neurons, whole layers, or a front."""

    kind: Annotated[Literal["stochastic"], RESULT] = "stochastic"
    p: Annotated[Share | MatchedRun, RESULT] = Field(
        description="share frozen; match:RUN_DIR takes the p with that run's mean paper FLOPs", examples=[0.5]
    )
    scope: Annotated[Scope, RESULT] = Field(
        default="neuron", description="neuron: p of every layer's; layer, front: whole layers of p of the FLOPs"
    )
    matched_p: Annotated[Share | None, DRAW] = Field(
        default=None, description="what match: came to; written into the resolved recipe", examples=[0.38]
    )

    @property
    def share(self) -> float | None:
        """p itself, or what ``match:`` came to; None where that is yet to be found."""
        return self.p if isinstance(self.p, float) else self.matched_p

    @property
    def run_to_match(self) -> str | None:
        """The run directory whose FLOPs p is yet to be matched to, None where the share is known."""
        return matched_run(self.p) if self.share is None else None


class FrontPolicy(Section):
    """Freezes the leading layers by a schedule, as FreezeOut and Composer's LayerFreezing do; a yardstick."""

    kind: Annotated[Literal["front"], RESULT] = "front"
    start: Annotated[float, Field(ge=0, lt=1), RESULT] = Field(
        default=0.5, description="share of the epochs after which the first layers freeze"
    )
    level: Annotated[ShareAboveZero, RESULT] = Field(
        default=1.0, description="share of the layers that is frozen in the last epoch"
    )


class BudgetPolicy(Section):
    """Freezes the neurons of the lowest |velocity| until a share of the paper's FLOPs trains."""

    kind: Annotated[Literal["budget"], RESULT] = "budget"
    flops: Annotated[ShareAboveZero, RESULT] = Field(
        description="share of the paper's FLOPs that trains from epoch 2 on", examples=[0.5]
    )
    mu: Annotated[float, Field(ge=0, lt=1), RESULT] = Field(
        default=0.5, description="damping of the velocity (Eq. 4); safe up to 0.5"
    )


class CustomPolicy(Section):
    """Any policy of your own."""

    kind: Annotated[Literal["entrypoint"], RESULT] = "entrypoint"
    entrypoint: Annotated[Entrypoint, RESULT] = Field(
        description="callable that returns a Policy", examples=["my_policies:coin_toss"]
    )
    kwargs: Annotated[dict[str, Any], RESULT] = Field(
        default_factory=dict, description="arguments of the callable", examples=["{share: 0.5}"]
    )


DEFAULT_POLICY_KIND = "neq"
POLICIES: dict[str, type[Section]] = {
    "baseline": BaselinePolicy,
    "neq": NEqPolicy,
    "stochastic": StochasticPolicy,
    "front": FrontPolicy,
    "budget": BudgetPolicy,
    "entrypoint": CustomPolicy,
}


def policy_kind(policy: Any) -> Any:
    """Return a policy section's kind, written or default, of a mapping or a validated section."""
    if isinstance(policy, dict):
        return policy.get("kind", DEFAULT_POLICY_KIND)
    return getattr(policy, "kind", DEFAULT_POLICY_KIND)


PolicySection = Annotated[
    Annotated[BaselinePolicy, Tag("baseline")]
    | Annotated[NEqPolicy, Tag("neq")]
    | Annotated[StochasticPolicy, Tag("stochastic")]
    | Annotated[FrontPolicy, Tag("front")]
    | Annotated[BudgetPolicy, Tag("budget")]
    | Annotated[CustomPolicy, Tag("entrypoint")],
    Discriminator(lambda policy: str(policy_kind(policy))),
]
