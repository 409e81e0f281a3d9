"""README says what is so: the recipe reference, the library example, the file tree, the commands."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from neq_cli.recipe.load import load_recipe
from neq_cli.recipe.reference import recipe_reference
from neq_cli.recipe.shipped import list_recipes

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.DOTALL | re.MULTILINE)


def test_the_recipe_reference_is_that_of_the_models() -> None:
    written = README.split("checked by tests/test_readme.py -->")[1].split("<!-- end of recipe reference -->")[0]
    assert written.strip() == recipe_reference().strip(), (
        "paste: python -c 'from neq_cli.recipe.reference import recipe_reference; print(recipe_reference())'"
    )


def test_the_library_example_runs() -> None:
    (example,) = blocks("python")
    done = subprocess.run([sys.executable, "-c", example], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    frozen, flops = done.stdout.splitlines()
    assert frozen.startswith("{'0': ")
    assert frozen.endswith("'2': 0}"), "the output layer never freezes"
    # Two linear layers of 64x32 and 32x10, two FLOPs per multiply-add.
    assert flops.endswith(f"of {2 * (64 * 32 + 32 * 10)} FLOPs")


def test_the_example_recipe_is_valid(tmp_path: Path) -> None:
    (example,) = blocks("yaml")
    (tmp_path / "example.yaml").write_text(example)
    assert load_recipe(str(tmp_path / "example.yaml")).recipe.epochs == 250


def test_every_shipped_recipe_is_listed_with_its_description() -> None:
    for recipe in list_recipes():
        assert f"| `{recipe.name}` | {recipe.description} |" in README


def test_the_file_tree_has_every_module_and_nothing_else() -> None:
    tree = README.split("## The files")[1].split("```")[1]
    named, folders = set(), [ROOT]
    for line in tree.strip("\n").removeprefix("text\n").splitlines():
        name = line.split()[0]
        depth = (len(line) - len(line.lstrip())) // 2
        path = folders[depth] / name
        folders[depth + 1 :] = [path] if name.endswith("/") else []
        named.add(path)
    package = ROOT / "neq_cli"
    modules = {path for path in package.rglob("*.py") if path.name != "__init__.py"}
    modules |= {path.parent for path in package.rglob("__init__.py")}
    others = {path.name for path in named - modules}
    assert not modules - named
    assert others == {"recipes", "tests", "digits.safetensors", "page.css", "py.typed"}


@pytest.mark.parametrize(
    "command", ["pip install . && neq train recipes/digits.yaml", "pip install '.[test]' && pytest"]
)
def test_the_two_set_up_commands_are_there(command: str) -> None:
    assert command in README
