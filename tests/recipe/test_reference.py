"""The table of keys: rows written by hand, and every key of every model."""

import pytest

from neq_cli.recipe.keys import Recipe
from neq_cli.recipe.policy_keys import POLICIES
from neq_cli.recipe.reference import recipe_reference


@pytest.mark.parametrize(
    "row",
    [
        "| key | type | default | meaning |",
        "| `epochs` | whole number above 0 | required | passes over the training data |",
        "| `model.name` | text, or null | `null` |",
        "| `data.augment` | one of none, crop, cifar, imagenet, randaugment, segmentation | `none` |",
        "| `data.std` | list of one or more numbers above 0, or null | `null` |",
        "| `optimizer.groups.N.weight_decay` | number of at least 0, or null | `null` |",
        "| `policy.kind` | one of baseline, neq, stochastic, front, budget, entrypoint | `neq` |",
        "| `policy.epsilon` | number of at least 0 | `0.001` | (neq) frozen when \\|velocity\\| < epsilon (Eq. 6) |",
        "| `policy.mu` | number from 0 to below 1 | `0.5` | (neq) ",
        "| `policy.p` | number from 0 to 1, or match:RUN_DIR | required | (stochastic) ",
        "| `channels_last` | one of true, false, auto | `auto` |",
        "| `ema` | number above 0 and below 1, or null | `null` |",
        "| `exclude` | list of texts | `[]` |",
        "| `description` | text | `''` |",
    ],
)
def test_rows(row: str) -> None:
    assert [line for line in recipe_reference().splitlines() if line.startswith(row)]


def test_every_key_has_its_rows_of_four_filled_cells() -> None:
    rows = [line.replace("\\|", "/").strip("|").split(" | ") for line in recipe_reference().splitlines()[2:]]
    keys = [row[0].strip(" `") for row in rows]
    expected = [*Recipe.model_fields, "policy.kind"]
    expected += [
        f"{name}.{key}"
        for name, field in Recipe.model_fields.items()
        for key in getattr(field.annotation, "model_fields", {})
    ]
    # A key that several kinds of policy have stands once for each.
    expected += [f"policy.{key}" for model in POLICIES.values() for key in model.model_fields if key != "kind"]
    expected += [f"optimizer.groups.N.{key}" for key in ("parameters", "lr", "weight_decay")]
    assert sorted(keys) == sorted(expected)
    for row in rows:
        assert len(row) == 4
        assert all(cell.strip() for cell in row), row
