"""Completion as shells ask for it: by environment variables, with words that Bash has cut at "=", and through Bash."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from neq_cli.cli import main
from neq_cli.commands.completion import joined
from neq_cli.recipe.load import shipped_names
from neq_cli.recipe.policy_keys import POLICIES

CHECKOUT = Path(__file__).parents[2]
KINDS = list(POLICIES)
FILES = ("mine.yaml", "other.yml", "notes.txt", ".hidden.yaml", "sub/deep/lonely.yaml", "two/a.yaml", "two/b.yaml")
Ask = Callable[..., list[str]]


@pytest.fixture(autouse=True)
def away_from_the_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in a folder of recipes."""
    for file in FILES:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("epochs: 7\npolicy: {kind: stochastic, p: 0.25}\noptimizer: {momentum: 0.8}\n")
    monkeypatch.chdir(tmp_path)


def answer(capsys: pytest.CaptureFixture[str]) -> list[str]:
    with pytest.raises(SystemExit) as end:
        main([])
    out, err = capsys.readouterr()
    assert (end.value.code, err) == (0, "")
    return [line for line in out.splitlines() if line]


@pytest.fixture
def bash(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Ask:
    """Return what Bash is told for its words, the last of which is to be completed."""

    def ask(*words: str) -> list[str]:
        monkeypatch.setenv("_NEQ_COMPLETE", "complete_bash")
        monkeypatch.setenv("COMP_WORDS", "\n".join(["neq", *words]))
        monkeypatch.setenv("COMP_CWORD", str(len(words)))
        return answer(capsys)

    return ask


@pytest.fixture
def fish(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Ask:
    """Return what Fish is told for a line, whose words stay whole, as Zsh's do: rows of a word, a tab, a meaning."""

    def ask(line: str) -> list[str]:
        monkeypatch.setenv("_NEQ_COMPLETE", "complete_fish")
        monkeypatch.setenv("_TYPER_COMPLETE_FISH_ACTION", "get-args")
        monkeypatch.setenv("_TYPER_COMPLETE_ARGS", line)
        return answer(capsys)

    return ask


@pytest.mark.parametrize("verb", ["train", "validate", "flops", "bench", "sweep"])
def test_recipes_and_files(bash: Ask, verb: str) -> None:
    assert bash(verb, "") == [*shipped_names(), "mine.yaml", "other.yml"]
    assert bash(verb, "digits-") == ["digits-baseline", "digits-stochastic"]
    assert bash(verb, "m") == ["mine.yaml"]
    assert bash(verb, ".") == [".hidden.yaml"]
    assert bash(verb, "two/") == ["two/a.yaml", "two/b.yaml"]
    assert bash(verb, "two/b") == ["two/b.yaml"]
    assert bash(verb, "nothing") == bash(verb, "no/folder") == bash(verb, "~nobody-of-that-name/") == []


def test_a_folder_alone_is_followed_by_what_is_in_it_so_that_no_blank_is(bash: Ask) -> None:
    assert bash("train", "tw") == ["two/a.yaml", "two/b.yaml"]
    assert bash("train", "su") == ["sub/deep/", "sub/deep/lonely.yaml"]


def test_the_home_folder_stays_as_it_is_written(bash: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(Path.cwd()))
    assert bash("train", "~/two/") == ["~/two/a.yaml", "~/two/b.yaml"]


def test_init_is_for_shipped_recipes_alone(bash: Ask) -> None:
    assert bash("init", "") == shipped_names()


@pytest.mark.parametrize("verb", ["train", "validate", "flops", "bench", "sweep"])
def test_keys_and_their_values(bash: Ask, verb: str) -> None:
    keys = bash(verb, "digits", "pol")
    assert {"policy.kind=", "policy.epsilon=", "policy.mu="} < set(keys)
    assert all(key.startswith("policy.") and key.endswith("=") for key in keys)
    assert "epochs=" in bash(verb, "digits", "")
    # One key alone comes with its values: a word that is the only one is followed by a blank.
    assert bash(verb, "digits", "policy.ki") == ["policy.kind=", *(f"policy.kind={kind}" for kind in KINDS)]
    assert bash(verb, "digits", "epo") == ["epochs=", "epochs=30", "epochs=250"]
    assert bash(verb, "digits", "policy.kind", "=") == KINDS
    assert bash(verb, "digits", "policy.kind", "=", "b") == ["baseline", "budget"]
    assert bash(verb, "digits", "seed", "=", "2", "compile", "=", "t") == ["true"]
    assert bash(verb, "digits", "backward", "=", "x") == bash(verb, "digits", "bakward", "=", "") == []


def test_keys_are_those_of_the_recipe_and_of_what_is_changed_before(bash: Ask) -> None:
    assert bash("train", "mine.yaml", "policy.p") == ["policy.p=", "policy.p=0.25", "policy.p=0.5"]
    assert "policy.p=" not in bash("train", "digits", "policy.")
    assert bash("train", "digits", "policy.kind", "=", "budget", "policy.f")[:1] == ["policy.flops="]
    assert bash("train", "mine.yaml", "optimizer.mom") == ["optimizer.momentum=", "optimizer.momentum=0.8"]
    assert bash("train", "mine.yaml", "epochs", "=", "3", "epo") == [], "it is given already"
    assert "policy.kind=" in bash("train", "nothing.yaml", "policy."), "keys are known without a recipe, too"
    assert bash("train", "notes.txt", "epo")[:2] == ["epochs=", "epochs=7"], "whatever the file is called"


def test_the_values_of_a_sweep_follow_each_other(bash: Ask) -> None:
    assert bash("sweep", "digits", "backward", "=", "exact,") == ["exact,truncated", "exact,dense"]
    assert bash("sweep", "digits", "backward", "=", "exact,truncated,d") == ["exact,truncated,dense"]
    assert bash("train", "digits", "backward", "=", "exact,") == []
    # Of which kind the policy is depends on the run.
    assert {"policy.p=", "policy.epsilon="} <= set(bash("sweep", "digits", "policy.kind", "=", "neq,stochastic", "pol"))


def test_whole_words_with_what_they_mean(fish: Ask) -> None:
    assert fish("neq train digits policy.eps") == [
        f"policy.epsilon={value}\tfrozen when |velocity| < epsilon (Eq. 6)" for value in ("", "0.001")
    ]
    assert [row.split("\t")[0] for row in fish("neq train digits seed=3 policy.kind=b")] == [
        "policy.kind=baseline",
        "policy.kind=budget",
    ]
    assert [row.split("\t")[0] for row in fish("neq sweep digits backward=exact,t")] == ["backward=exact,truncated"]
    assert "digits-baseline" in fish("neq flops dig")


def test_damaged_and_huge_files_are_no_complaint(bash: Ask) -> None:
    for name, content in (("a.yaml", b"epochs: ["), ("b.yaml", b"\xff"), ("c.yaml", b"- 1"), ("d.yaml", b"x" * 2**21)):
        Path(name).write_bytes(content)
        assert bash("train", name, "epo")[0] == "epochs="


@pytest.mark.parametrize(
    ("words", "together"),
    [
        (["a=1", "b=2"], ["a=1", "b=2"]),
        (["a", "=", "1", "b", "="], ["a=1", "b="]),
        (["p", "=", "match", ":", "runs/x", "seed", "=", "2"], ["p=match:runs/x", "seed=2"]),
        (["a"], ["a"]),
        ([], []),
    ],
)
def test_words_that_bash_cut_are_joined(words: list[str], together: list[str]) -> None:
    assert joined(words) == together


@pytest.fixture
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return an environment in which `neq` is a program."""
    folder = tmp_path_factory.mktemp("bin")
    (folder / "neq").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m neq_cli "$@"\n')
    (folder / "neq").chmod(0o755)
    python_path = os.pathsep.join(filter(None, (str(CHECKOUT), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": python_path}


def test_bash_itself(environment: dict[str, str]) -> None:
    """The function that Bash is given, called as Bash calls it."""
    script = """
        eval "$(_NEQ_COMPLETE=source_bash neq)"
        COMP_WORDS=(neq train digits policy.kind = b); COMP_CWORD=5
        _neq_completion neq
        printf '%s\\n' "${COMPREPLY[@]}"
    """
    done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert (done.stdout.split(), done.stderr) == (["baseline", "budget"], "")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish", "powershell"])
def test_completing_imports_no_torch(environment: dict[str, str], shell: str) -> None:
    code = (
        "import sys\nfrom neq_cli.cli import main\ntry: main()\n"
        "except SystemExit: print('torch' in sys.modules, file=sys.stderr)"
    )
    line = "neq train digits policy.kind=b"
    asked = {
        "_NEQ_COMPLETE": f"complete_{shell}",
        "COMP_WORDS": "neq\ntrain\ndigits\npolicy.kind=b",
        "COMP_CWORD": "3",
        "_TYPER_COMPLETE_ARGS": line,
        "_TYPER_COMPLETE_WORD_TO_COMPLETE": "policy.kind=b",
        "_TYPER_COMPLETE_FISH_ACTION": "get-args",
    }
    done = subprocess.run(
        [sys.executable, "-c", code], env={**environment, **asked}, capture_output=True, text=True, check=False
    )
    assert done.stderr == "False\n"
    assert {"baseline", "budget"} == set(re.findall(r"baseline|neq\b|stochastic|front|budget", done.stdout))
