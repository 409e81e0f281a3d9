"""Models of libraries that are not there, or not fit to be imported, and names that no library has."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from neq_cli.errors import RecipeValueError
from neq_cli.recipe import ModelSection
from neq_cli.training.checks import check_section
from neq_cli.training.models.build import build_model


@pytest.mark.parametrize("library", ["timm", "transformers"])
def test_a_missing_library_is_one_line_with_the_command_that_installs_it(
    library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, library, None)  # as Python remembers what it did not find
    section = ModelSection(name=f"{library}/resnet18")
    line = f"'{library}/resnet18' needs {library}; pip install 'neq[{library}]'"
    assert [(problem.key, problem.message) for problem in check_section("model", section)] == [("model.name", line)]
    with pytest.raises(RecipeValueError) as raised:
        build_model(section, 10)
    assert str(raised.value) == f"model.name: {line}"


def test_a_library_that_fails_to_import_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "timm.py").write_text("import not_there_at_all\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    for module in [name for name in sys.modules if name.partition(".")[0] == "timm"]:
        monkeypatch.delitem(sys.modules, module)
    with pytest.raises(RecipeValueError) as raised:
        build_model(ModelSection(name="timm/resnet18"), 10)
    assert str(raised.value) == (
        "model.name: 'timm/resnet18' needs timm, which fails to import (ModuleNotFoundError: No module named "
        "'not_there_at_all'); pip install --upgrade 'neq[timm]'"
    )


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("tim/resnet18", "no library 'tim' of models; did you mean 'timm'?"),
        ("torch/resnet18", "no library 'torch' of models; known are timm and transformers"),
        ("/resnet18", "no library '' of models; known are timm and transformers"),
    ],
)
def test_a_library_that_nobody_knows(name: str, says: str) -> None:
    with pytest.raises(RecipeValueError) as raised:
        build_model(ModelSection(name=name), 10)
    assert str(raised.value) == f"model.name: {says}"


def test_neither_library_is_imported_for_a_recipe_that_names_none_of_theirs() -> None:
    code = (
        "import sys\n"
        "from neq_cli.commands.shared import load\n"
        "assert load('digits', []).recipe.model.name\n"
        "print({'timm', 'transformers', 'huggingface_hub'} & set(sys.modules))\n"
    )
    root = Path(__file__).parents[3]
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True)
    assert ran.stdout == "set()\n"
