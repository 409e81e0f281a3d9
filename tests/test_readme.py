"""The pages say what is so: examples run, command lines parse, links lead somewhere, tables are those of the code."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from pages import PAGES, ROOT, Block, anchors, blocks, check_generated, neq_arguments, prose, read, shell_lines, spans

from neq_cli.cli import main
from neq_cli.commands.app import app
from neq_cli.commands.citation import CITATION
from neq_cli.recipe.load import load_recipe, shipped_names
from neq_cli.recipe.reference import recipe_reference
from neq_cli.recipe.shipped import list_recipes

NEQ: Any = typer.main.get_command(app)
PYTHON, YAML, SHELL = blocks("python"), blocks("yaml"), blocks("console", "bash", "text")
PLACEHOLDERS = ("RECIPE", "NAME", "photos.yaml")
READY_MADE = {"--help", "-h", "--version", "--citation", "--install-completion", "--show-completion"}
WITH_RECIPE = ("train", "flops", "validate", "bench")


def place(block: Block) -> str:
    return block.place


def lines_of(block: Block) -> str:
    """Return the commands of a block: all of it, or in a picture of a terminal those behind a prompt."""
    if block.language != "text":
        return block.text
    return "\n".join(line for line in block.text.splitlines() if line.startswith("$ "))


COMMANDS = [
    pytest.param(arguments, id=f"{block.place} {' '.join(arguments)[:60]}")
    for block in SHELL
    for command in shell_lines(lines_of(block))
    if (arguments := neq_arguments(command)) is not None
]


def test_the_readme_is_read_in_one_sitting() -> None:
    assert len(read("README.md").splitlines()) <= 250


@pytest.mark.parametrize(
    "command", ["pip install . && neq train recipes/digits.yaml", "pip install '.[test]' && pytest"]
)
def test_the_two_set_up_commands_are_there(command: str) -> None:
    assert command in read("README.md")


def test_the_recipe_reference_is_that_of_the_keys() -> None:
    check_generated(
        "recipes/README.md",
        "<!-- generated: neq_cli.recipe.reference.recipe_reference() -->\n",
        "<!-- end of the keys -->",
        recipe_reference().strip("\n"),
    )


def test_the_table_of_recipes_is_that_of_the_recipes() -> None:
    rows = [f"| [`{recipe.name}`]({recipe.name}.yaml) | {recipe.description} |" for recipe in list_recipes()]
    check_generated("recipes/README.md", "| recipe | what it is |\n| --- | --- |\n", "\n- [What", "\n".join(rows))


def test_the_pages_beside_the_recipes_are_no_recipes() -> None:
    assert not {"README", "studies"} & set(shipped_names())


@pytest.mark.parametrize("block", PYTHON, ids=place)
def test_python_runs(block: Block, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{block.text}"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    if block.place.startswith("README.md"):
        frozen, flops = done.stdout.splitlines()
        assert frozen.startswith("{'0': ")
        assert frozen.endswith("'2': 0}"), "the output layer never freezes"
        # Two linear layers of 64x32 and 32x10, two FLOPs per multiply-add.
        assert flops.endswith(f"of {2 * (64 * 32 + 32 * 10)} FLOPs")


def test_there_is_one_example_of_the_library_in_the_readme() -> None:
    assert len([block for block in PYTHON if block.place.startswith("README.md")]) == 1


@pytest.mark.parametrize("block", YAML, ids=place)
def test_yaml_is_a_recipe(block: Block, tmp_path: Path) -> None:
    (tmp_path / "example.yaml").write_text(block.text)
    assert load_recipe(str(tmp_path / "example.yaml")).recipe.epochs > 0


@pytest.mark.parametrize("block", blocks("bash"), ids=place)
def test_scripts_are_bash(block: Block) -> None:
    done = subprocess.run(["bash", "-n"], input=block.text, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def parsed(arguments: list[str]) -> Any:
    """Return the context of a command line, nothing called; whatever Typer raises where it is none."""
    with NEQ.context_class(NEQ, info_name="neq") as above:
        name, command, rest = NEQ.resolve_command(above, list(arguments))
        return command.make_context(name, rest, parent=above)


def check(arguments: list[str]) -> None:
    """Fail unless a command line is one, and what it changes in a shipped recipe is right; nothing is trained."""
    if arguments[0].startswith("-"):
        assert arguments[0] in READY_MADE
        return
    context = parsed(arguments)
    given = context.params
    recipe = given.get("recipe") or given.get("name")
    if recipe is None or recipe in PLACEHOLDERS or given.get("data"):
        return
    if context.info_name == "sweep":
        search = ["--sampler", "optuna", "--trials", str(given["trials"])] if given["trials"] else []
        if search:
            pytest.importorskip("optuna")
        assert ended("sweep", recipe, *(given["axes"] or []), *search, "--dry-run") == 0
    elif context.info_name in WITH_RECIPE:
        assert ended("validate", recipe, *(given["overrides"] or []), "--resolved") == 0
    else:
        assert recipe in shipped_names()


def ended(*arguments: str) -> int | str | None:
    with pytest.raises(SystemExit) as end:
        main(list(arguments))
    return end.value.code


@pytest.fixture
def _checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in a folder with the shipped recipes in it, as a checkout is, where nothing else lies."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")


@pytest.mark.usefixtures("_checkout")
@pytest.mark.parametrize("arguments", COMMANDS)
def test_command_lines_in_blocks(arguments: list[str]) -> None:
    check(arguments)


def test_command_lines_are_found() -> None:
    """The tests of them are worth nothing where the blocks are not understood."""
    found = [str(parameter.id).split()[1] for parameter in COMMANDS]
    assert {"train", "inspect", "compare", "sweep", "bench"} <= set(found)
    assert len(found) > 20


@pytest.mark.usefixtures("_checkout")
@pytest.mark.parametrize("page", PAGES)
def test_command_lines_in_the_prose(page: str) -> None:
    for span in dict.fromkeys(spans(page)):
        if not re.match(r"neq [a-z-]", span) or "..." in span:
            continue
        ((_, *arguments),) = shell_lines(span)
        verb, *rest = arguments
        if verb.startswith("-") or (rest and not rest[0].startswith("-")):
            check(arguments)
            continue
        assert verb in NEQ.commands, f"{page}: {span}"  # named only, and perhaps an option of it
        assert set(rest) <= {option for parameter in NEQ.commands[verb].params for option in parameter.opts}


def test_the_readme_names_every_command() -> None:
    named = {span.split()[1] for span in spans("README.md") if span.startswith("neq ") and len(span.split()) > 1}
    assert set(NEQ.commands) <= named


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), f"{page}: {target}"
        if anchor:
            assert anchor in anchors(str(file.resolve().relative_to(ROOT))), f"{page}: {target}"


def test_every_page_is_found_from_the_readme() -> None:
    linked = set(re.findall(r"\]\(([^)#\s]+)\)", prose("README.md")))
    assert linked >= set(PAGES) - {"README.md"}


def test_what_to_cite_is_what_the_command_prints() -> None:
    """Which says this version (tests/test_cli.py)."""
    assert [block.text for block in blocks("bibtex")] == [CITATION]


def test_hooks_call_what_ci_calls() -> None:
    if not (ROOT / ".ci").is_dir():
        pytest.skip("no checkout: the hooks and .ci/run are not here")
    (local,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert local["repo"] == "local"
    commands = [" ".join([hook["entry"], *hook.get("args", [])]) for hook in local["hooks"]]
    assert commands
    assert set(commands) <= set((ROOT / ".ci" / "run").read_text().splitlines())
    assert not any(hook["pass_filenames"] for hook in local["hooks"])
