"""``neq schema``: the JSON Schema of recipes, by which editors complete and check them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def schema(
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="FILE", help="the file to write, over an earlier schema of neq's too"),
    ] = None,
) -> None:
    """Print the JSON Schema of recipes, by which editors complete and check them."""
    from neq_cli.recipe.schema import schema_text

    if output is None:
        print(schema_text(), end="")
        return
    from neq_cli.recipe.schema_file import Found, refuse_foreign
    from neq_cli.runs.store.disk import atomic_write, writing

    mend = "choose another with -o"
    with writing(output, mend):
        if refuse_foreign(output, mend) is not Found.SAME:
            atomic_write(output, schema_text().encode())
    print(output)
