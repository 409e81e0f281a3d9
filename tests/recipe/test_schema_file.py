"""The file of a schema, and the line that names it."""

from __future__ import annotations

from pathlib import Path

import pytest

from neq_cli.recipe.load import load_recipe, shipped_directory
from neq_cli.recipe.schema import schema_text
from neq_cli.recipe.schema_file import FIRST_LINE, Found, found_at, with_first_line


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (schema_text(), Found.SAME),
        (schema_text() + " ", Found.OTHER),
        ('{"$id": "urn:neq:recipe:9.9.9"}', Found.OTHER),
        ('{"$id": "https://example.org/schema"}', Found.FOREIGN),
        ("model: {name: resnet18}", Found.FOREIGN),
        ("", Found.FOREIGN),
    ],
)
def test_what_is_there(tmp_path: Path, text: str, found: Found) -> None:
    path = tmp_path / "file"
    assert found_at(path) is Found.NOTHING
    path.write_text(text)
    assert found_at(path) is found


def test_bytes_and_folders_are_no_schema(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"\xff\xfe")
    assert found_at(tmp_path / "file") is Found.FOREIGN
    assert found_at(tmp_path) is Found.FOREIGN


def test_a_recipe_that_names_a_schema_keeps_its_own() -> None:
    recipe = (shipped_directory() / "digits.yaml").read_bytes()
    assert with_first_line(recipe) == FIRST_LINE.encode() + recipe
    assert with_first_line(with_first_line(recipe)) == FIRST_LINE.encode() + recipe
    other = b"# yaml-language-server: $schema=mine.json\n" + recipe
    assert with_first_line(other) == other


def test_a_schema_beside_a_recipe_is_no_recipe(tmp_path: Path) -> None:
    """As it is JSON, it is YAML too, and refused for its keys."""
    path = tmp_path / "neq.schema.json"
    path.write_text(schema_text())
    with pytest.raises(Exception, match=r"neq\.schema\.json:2: \$schema: unknown key"):
        load_recipe(str(path))
