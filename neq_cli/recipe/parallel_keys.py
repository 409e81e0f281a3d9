"""The keys of a model that several processes hold together, in parts; how many there are is torchrun's to say."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from neq_cli.recipe.values import SURROUNDINGS, Section


class FsdpSection(Section):
    """How `parallel: fsdp` divides the model over the processes."""

    blocks: Annotated[Annotated[list[str], Field(min_length=1)] | None, SURROUNDINGS] = Field(
        default=None,
        description="globs of the modules whose weights are gathered together while they run; null: those of the class "
        "that is repeated most",
        examples=["['encoder.layers.*']"],
    )
