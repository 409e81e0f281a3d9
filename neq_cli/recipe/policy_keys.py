"""The keys of every kind of policy; a new policy's are added here.

``p: match:RUN_DIR`` is read and written by this module alone.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from neq_cli.recipe.values import DRAW, RESULT, Entrypoint, NotNegative, Section, Share, Words

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


def matched_run(p: object) -> str | None:
    """Return the RUN_DIR of ``p: match:RUN_DIR``, None where p is a share or anything else."""
    word, colon, run = str(p).partition(":")
    return run if colon and word == MATCH else None


def match_with(run: object) -> str:
    """Return the p that ``matched_run`` reads as ``run``."""
    return f"{MATCH}:{run}"


class StochasticPolicy(Section):
    """Freezes a random share of every layer's neurons, drawn anew each epoch."""

    kind: Annotated[Literal["stochastic"], RESULT] = "stochastic"
    p: Annotated[Share | MatchedRun, RESULT] = Field(
        description="share of neurons; match:RUN_DIR takes the p with that run's mean paper FLOPs", examples=[0.5]
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
    | Annotated[CustomPolicy, Tag("entrypoint")],
    Discriminator(lambda policy: str(policy_kind(policy))),
]
