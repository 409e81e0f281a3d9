"""The command line as its users meet it: exit codes, one-line errors, and a run from start to export."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.numpy import load_file

from neq_cli import __version__
from neq_cli.cli import main
from neq_cli.commands.app import app
from neq_cli.runs.store.run import read_run

VERBS = (
    *("train", "inspect", "compare", "evaluate", "predict", "flops", "bench", "validate", "recipes", "init", "schema"),
    *("list", "export"),
)
SHORT = ("data.probe_size=1000", "model.name=resnet8", "model.kwargs.width=4")
CHECKOUT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def away_from_the_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def environment() -> dict[str, str]:
    path = os.pathsep.join(filter(None, (str(CHECKOUT), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "COLUMNS": "100"}


def start(*arguments: str, folder: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "neq_cli", *arguments]
    return subprocess.Popen(
        command, cwd=folder, env=environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def call(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    assert isinstance(ended.value.code, int)
    return ended.value.code


def complaint(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that the command ends with, code 2."""
    assert call(*arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.endswith("\n")
    assert err.count("\n") == 1, err
    assert "Traceback" not in err
    return err.strip()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    folder = tmp_path_factory.mktemp("trained")
    process = start("train", "digits", "epochs=2", *SHORT, "--device", "cpu", folder=folder)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return folder / out.strip(), out, err


@pytest.mark.parametrize("verb", VERBS)
def test_help_ends_with_an_example_that_parses(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    texts = []
    for option in ("-h", "--help"):
        assert call(verb, option) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    last = texts[0].strip().splitlines()[-1].strip()
    words = shlex.split(last.removeprefix("Example: "))
    assert words[:2] == ["neq", verb]
    # Parsed by the very command, which is then not run.
    import typer.main

    command = typer.main.get_command(app).commands[verb]  # type: ignore[attr-defined]
    assert command.make_context(verb, words[2:])


@pytest.mark.parametrize("width", [60, 80, 200])
def test_help_cuts_no_command_s_sentence(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    import typer.main

    monkeypatch.setenv("COLUMNS", str(width))
    assert call("--help") == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= width
    assert not [line for line in lines if line != line.rstrip()]
    text = " ".join(" ".join(lines).split())
    for name, command in typer.main.get_command(app).commands.items():  # type: ignore[attr-defined]
        sentence = " ".join(command.help.split(".")[0].split())
        assert f" {name} {sentence}." in text


def test_usage_has_the_brackets_that_we_give_it(capsys: pytest.CaptureFixture[str]) -> None:
    for verb, usage in (
        ("train", "neq train [OPTIONS] RECIPE [KEY=VALUE]..."),
        ("compare", "neq compare [OPTIONS] RUN_DIR..."),
        ("init", "neq init [OPTIONS] [NAME] [DESTINATION]"),
    ):
        assert call(verb, "--help") == 0
        assert capsys.readouterr().out.splitlines()[0] == f"Usage: {usage}"


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("--version") == 0
    assert capsys.readouterr().out == f"neq {__version__}\n"


def test_what_to_cite(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("--citation") == 0
    printed = capsys.readouterr().out
    assert re.findall(r"^@(\w+)\{(\w+),$", printed, flags=re.MULTILINE) == [
        ("inproceedings", "bragagnolo2022update"),
        ("software", "neq"),
    ]
    assert printed.count("{") == printed.count("}")
    assert f"  version = {{{__version__}}}\n" in printed


def test_a_shell_is_given_words_and_no_complaint(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("_NEQ_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", "neq tr")
    monkeypatch.setenv("COMP_CWORD", "1")
    assert call() == 0
    out, err = capsys.readouterr()
    assert (out.split(), err) == (["train"], "")


def test_neq_alone_shows_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert call() == 0
    alone = capsys.readouterr()
    assert call("-h") == 0
    assert alone == capsys.readouterr()
    assert all(f"  {verb} " in alone.out for verb in VERBS)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--nope"], ["No such option", "--nope", "neq --help"]),
        (["frobnicate"], ["No such command 'frobnicate'"]),
        (["train"], ["neq train: Missing argument 'RECIPE'", "neq train --help"]),
        (["train", "digits", "--nope"], ["No such option", "--nope"]),
        (["train", "digits", "--progress", "loud"], ["--progress", "'loud'", "'plain'"]),
        (["inspect", "x", "--epoch", "two"], ["--epoch", "two", "integer"]),
        (["export", "x"], ["'-o'"]),
        (["train", "nothere.yaml"], ["nothere.yaml: no such file", "known: cifar10-folder, deeplabv3"]),
        (["train", "digits", "optimzer.lr=1"], ["optimzer: unknown key; did you mean 'optimizer'?"]),
        (["train", "digits", "epochs=two"], ["epochs=two", "'two' is not a whole number", "250"]),
        (["train", "digits", "epochs"], ["epochs: not KEY=VALUE"]),
        (["train", "digits", "model.name=resnet21"], ["no torchvision model 'resnet21'", "did you mean"]),
        (["train", "digits", "model.entrypoint=no_module:make"], ["no module 'no_module'", "PYTHONPATH"]),
        (["train", "entrypoint", "model.kwargs={chanels: 3}"], ["'chanels'", "did you mean 'channels'?"]),
        (["train", "digits", "optimizer.name=lbfgs"], ["LBFGS", "use sgd"]),
        (["train", "digits", "batch_size=5000"], ["command line: batch_size=5000: 5000", "1388", "lower it"]),
        (["train", "digits", "data.probe_size=1438"], ["data.probe_size=1438: 1438 probe", "lower it"]),
        (["train", "digits", "exclude=[nothing]"], ["command line: exclude=[nothing]: 'nothing' matches no layer"]),
        (["train", "cifar10-folder", "data.root=missing"], ["command line: data.root=missing: no folder 'missing'"]),
        (["train", "digits", "model.checkpoint=missing.pt"], ["no file 'missing.pt'; give"]),
        (
            ["train", "digits", "policy={kind: stochastic, p: 'match:missing'}"],
            ["command line: policy={", "policy.p: missing: no such run directory"],
        ),
        (["inspect", "missing"], ["missing: no such run directory"]),
        (["compare", "missing"], ["missing: no such run directory"]),
        (["compare", "a", "--json", "--csv"], ["exclude each other"]),
        (["export", "missing", "-o", "a.safetensors"], ["missing: no such run directory"]),
        (["init", "digitz"], ["did you mean 'digits'?"]),
        (["flops", "cifar10-folder", "data.image_size=null", "data.augment=none"], ["data.image_size"]),
        (["bench", "digits", "--fractions", "0,2"], ["--fractions", "'2' is not a share from 0 to 1"]),
        (["bench", "digits", "--modes", "exakt"], ["--modes", "did you mean 'exact'?"]),
        (["bench", "digits", "--orders", "back"], ["--orders", "use random, front"]),
        (["bench", "digits", "--rounds", "0"], ["--rounds", "'0'"]),
        (["bench", "digits", "--layers", "0.3"], ["--layers 0.3 is not measured"]),
        (["bench", "digits", "optimzer.lr=1"], ["optimzer: unknown key; did you mean 'optimizer'?"]),
        (
            ["bench", "cifar10-folder", "data.image_size=null", "data.augment=none", "data.root=missing"],
            ["data.root=missing: no folder"],
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: list[str], parts: list[str]
) -> None:
    line = complaint(capsys, *arguments)
    for part in parts:
        assert part in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA")
def test_cuda_asked_for_and_absent(capsys: pytest.CaptureFixture[str]) -> None:
    line = complaint(capsys, "train", "digits", "--device", "cuda")
    assert line == "command line: --device cuda: 'cuda', but no CUDA device is available; use device=auto"


def test_folders_without_images(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for part in ("train", "test"):
        (tmp_path / "images" / part / "cat").mkdir(parents=True)
    line = complaint(capsys, "train", "cifar10-folder", "data.root=images")
    assert line == "command line: data.root=images: 'images/train' has no images for the classes 'cat'"


def test_all_problems_of_a_recipe_at_once(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text(
        "model: {name: resnet81}\ndata: {name: digitz}\nepochs: many\noptimizer: {name: sgd, lr: 0.1, momentun: 0.9}\n"
        "policy: {kind: neq, epsilom: 0.1}\ndevice: gpu\n"
    )
    assert call("validate", "bad.yaml") == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert [line.split(": ")[:2] for line in err.splitlines()] == [
        ["bad.yaml:1", "model.name"], ["bad.yaml:2", "data.name"], ["bad.yaml:3", "epochs"],
        ["bad.yaml:4", "optimizer.momentun"], ["bad.yaml:5", "policy.epsilom"], ["bad.yaml:6", "device"],
    ]  # fmt: skip
    assert "did you mean 'epsilon'?" in err


def test_an_open_bracket_is_found_in_its_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "open.yaml").write_text("epochs: [\n")
    assert complaint(capsys, "validate", "open.yaml") == "open.yaml:1: a [ or { that is not closed; close it"


def test_a_directory_that_exists_is_refused_before_torch_is_imported(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    code = (
        "import sys\nfrom neq_cli.cli import main\n"
        "try: main(['train', 'digits', '-o', 'taken'])\n"
        "except SystemExit as end: print(end.code, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True)
    assert done.stdout == "2 False\n"
    assert done.stderr == "taken: already exists and is not empty; choose another with -o\n"


@pytest.mark.parametrize(
    "arguments", [["--help"], ["train", "--help"], ["recipes"], ["schema"], ["--version"], ["--citation"], []]
)
def test_what_needs_no_torch_imports_none(arguments: list[str]) -> None:
    code = (
        f"import sys\nfrom neq_cli.cli import main\ntry: main({arguments!r})\n"
        "except SystemExit as end: print(end.code, 'torch' in sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True)
    assert done.stderr == "0 False\n"


def test_a_schema_is_printed_written_and_renewed(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert call("schema") == 0
    printed = capsys.readouterr().out
    assert json.loads(printed)["$id"].endswith(__version__)
    file = tmp_path / "neq.schema.json"
    for before in (None, printed, printed.replace(__version__, "0.0.1")):
        if before is not None:
            file.write_text(before)
        assert call("schema", "-o", file.name) == 0
        assert capsys.readouterr().out == "neq.schema.json\n"
        assert file.read_text() == printed
    file.write_text("{}")
    assert complaint(capsys, "schema", "-o", file.name).endswith("no schema of neq's; choose another with -o")
    assert file.read_text() == "{}"
    line = complaint(capsys, "schema", "-o", "no/folder.json")
    assert line == "no/folder.json: cannot be written: No such file or directory; choose another with -o"


def test_init_lays_a_schema_unless_asked_not_to(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert call("init", "digits", "bare", "--no-schema") == 0
    assert [path.name for path in Path("bare").iterdir()] == ["digits.yaml"]
    assert call("init", "digits", "mine") == 0
    assert call("init", "regression", "mine") == 0
    out, err = capsys.readouterr()
    assert out.split()[1:3] == ["mine/digits.yaml", "mine/neq.schema.json"]
    assert err == ""
    (tmp_path / "mine" / "neq.schema.json").write_text('{"$id": "urn:neq:recipe:0.0.1"}')
    assert call("init", "entrypoint", "mine") == 0
    assert capsys.readouterr().err == (
        "note: mine/neq.schema.json: is not this version's, and stays; neq schema -o mine/neq.schema.json renews it\n"
    )


def test_a_dry_run_writes_nothing(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert call("train", "digits", *SHORT, "-o", "somewhere", "--dry-run", "--device", "cpu") == 0
    out = capsys.readouterr().out
    assert "would write somewhere" in out
    assert "FLOPs per sample and iteration" in out
    assert list(tmp_path.iterdir()) == []


def test_recipes_init_and_validate(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert call("recipes") == 0
    listed = capsys.readouterr().out
    assert {"digits", "entrypoint", "resnet32-cifar10"} <= {line.split()[0] for line in listed.splitlines()}
    assert call("init", "entrypoint", "mine") == 0
    assert capsys.readouterr().out.split() == [
        "mine/entrypoint.yaml", "mine/entrypoint_model.py", "mine/neq.schema.json",
    ]  # fmt: skip
    assert call("validate", "mine/entrypoint.yaml", "epochs=3", "--resolved") == 0
    (tmp_path / "resolved.yaml").write_text(capsys.readouterr().out)
    assert "epochs: 3\n" in (tmp_path / "resolved.yaml").read_text()
    assert "already" in complaint(capsys, "init", "entrypoint", "mine")


@pytest.mark.parametrize(
    ("overrides", "printed", "exact"),
    [
        ([], "138.94M", 138937600.0),
        (["policy.kind=stochastic", "policy.p=0.2"], "112.99M", None),
        (["policy.kind=stochastic", "policy.p=0.5"], "69.75M", None),
    ],
)
def test_the_papers_flops(
    capsys: pytest.CaptureFixture[str], overrides: list[str], printed: str, exact: float | None
) -> None:
    assert call("flops", "resnet32-cifar10", *overrides) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[:2] == ["paper", printed]
    assert call("flops", "resnet32-cifar10", *overrides, "--json") == 0
    estimate = json.loads(capsys.readouterr().out)
    assert list(estimate) == ["flops_paper", "flops_executed", "flops_paper_dense", "flops_executed_dense", "layers"]
    assert f"{estimate['flops_paper'] / 1e6:.2f}M" == printed
    assert exact is None or estimate["flops_paper"] == exact


def test_bench_prints_nothing_but_its_result(capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--fractions", "0,0.5", "--orders", "random", "--rounds", "1")
    recipe = ("digits", *SHORT, "channels_last=false", "deterministic=true")
    assert call("bench", *recipe, *options, "--json") == 0
    torch.use_deterministic_algorithms(False)
    out, err = capsys.readouterr()
    assert err == ""
    found = json.loads(out)
    assert found["recipe"] == "digits"
    keys = [(one["backward"], one["order"], one["frozen_fraction"]) for one in found["measurements"]]
    assert keys == [(mode, "random", share) for mode in ("exact", "truncated") for share in (0.0, 0.5)]
    assert call("bench", *recipe, *options, "--modes", "truncated") == 0
    torch.use_deterministic_algorithms(False)
    out, err = capsys.readouterr()
    assert err == ""
    assert out.startswith("recipe     digits\n")
    assert "truncated, random, 0.5 frozen, layer by layer" in out


def test_flops_by_backward_mode(capsys: pytest.CaptureFixture[str]) -> None:
    """Half of every layer frozen, but for epoch 1 of 250: a quarter, a half or nothing of the work is saved."""
    recipe = ("resnet32-cifar10", "policy.kind=stochastic", "policy.p=0.5")
    for mode, saved in (("exact", 1 / 4), ("truncated", 1 / 2), ("dense", 0)):
        assert call("flops", *recipe, f"backward={mode}", "--json") == 0
        estimate = json.loads(capsys.readouterr().out)
        ratio = estimate["flops_executed"] / estimate["flops_executed_dense"]
        assert ratio == pytest.approx(1 - saved * 249 / 250, abs=0.005)
        assert f"{estimate['flops_paper'] / 1e6:.2f}M" == "69.75M"  # which knows of no mode


def test_training_off_a_terminal_prints_a_line_per_epoch(trained: tuple[Path, str, str]) -> None:
    run, out, err = trained
    assert out.count("\n") == 1
    assert run.is_dir()
    assert run.parent.name == "digits"
    assert "\x1b" not in out + err
    lines = err.splitlines()
    assert [line.split()[1] for line in lines if line.startswith("epoch")] == ["1/2", "2/2"]
    assert lines[0].startswith("digits: resnet8 on digits, neq epsilon=")
    ((said, *why),) = [lines[place:] for place, line in enumerate(lines) if line.startswith("finished")]
    last = read_run(run).column("test_top1")[-1]
    assert said == f"finished: 2 epochs, test_top1 {last:.2f}"
    assert all(line.startswith("nothing saved: ") for line in why)
    assert str(run) not in err  # which stdout tells, once
    assert not [line for line in [*lines, *out.splitlines()] if line != line.rstrip()]
    assert json.loads((run / "environment.json").read_text())["argv"][1:3] == ["train", "digits"]


def test_a_run_is_inspected_compared_and_exported(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, trained: tuple[Path, str, str]
) -> None:
    run = str(trained[0])
    assert call("inspect", run) == 0
    assert "finished" in capsys.readouterr().out
    assert call("inspect", run, "--epoch", "1", "--layer", "layer1*", "--json") == 0
    assert json.loads(capsys.readouterr().out)
    for option in ("--json", "--csv", "--markdown", "--latex"):
        assert call("compare", run, option) == 0
        out = capsys.readouterr().out
        assert json.loads(out) if option == "--json" else "neq" in out.lower()
    assert call("export", run, "-o", "final.safetensors") == 0
    exported, final = load_file("final.safetensors"), load_file(trained[0] / "weights.safetensors")
    assert exported.keys() == final.keys()
    assert all((exported[name] == final[name]).all() for name in final)
    assert call("export", run, "-o", "last.safetensors", "--from", "last") == 0
    assert all((load_file("last.safetensors")[name] == final[name]).all() for name in final)
    capsys.readouterr()
    assert "already exists" in complaint(capsys, "export", run, "-o", "last.safetensors")
    assert "must end in .safetensors" in complaint(capsys, "export", run, "-o", "last.bin")
    assert "3" in complaint(capsys, "inspect", run, "--epoch", "3")
    assert "nolayer" in complaint(capsys, "inspect", run, "--layer", "nolayer")


def test_coverage_of_a_run_is_that_of_its_recipe(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, trained: tuple[Path, str, str]
) -> None:
    run = shutil.copytree(trained[0], tmp_path / "run")
    assert call("inspect", "run", "--coverage") == 0
    printed = capsys.readouterr().out
    assert "never frozen: output layer" in printed
    assert call("validate", "digits", *SHORT, "--coverage") == 0
    assert capsys.readouterr().out == printed
    assert call("inspect", "run", "--coverage", "--json") == 0
    assert json.loads(capsys.readouterr().out)["outside"] == []
    environment = json.loads((run / "environment.json").read_text())
    assert any(note.startswith("coverage: 100 % of ") for note in environment["notes"])
    assert "leave out --plot" in complaint(capsys, "inspect", "run", "--coverage", "--plot")
    for broken in ({"parameters": -1}, [], {**environment["coverage"], "outside": [{"reason": 3}]}):
        (run / "environment.json").write_text(json.dumps({**environment, "coverage": broken}))
        line = complaint(capsys, "inspect", "run", "--coverage")
        assert line.startswith("run/environment.json: coverage: is not what a run records; ")
    del environment["coverage"]
    (run / "environment.json").write_text(json.dumps(environment))
    assert "by an earlier version" in complaint(capsys, "inspect", "run", "--coverage")


@pytest.mark.parametrize("command", [["flops"], ["validate", "--coverage"]])
def test_a_model_that_does_not_take_the_images_is_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, command: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("vit.yaml").write_text(
        "model: {name: vit_b_16}\ndata: {name: image_folder, root: ., image_size: 32}\n"
        "epochs: 1\noptimizer: {name: sgd, lr: 0.1}\n"
    )
    line = complaint(capsys, command[0], "vit.yaml", *command[1:])
    assert line.startswith("vit.yaml:1: model: does not take an image of image_folder, 3x32x32: AssertionError: ")
    assert line.endswith("try another data.image_size, or model.kwargs.img_size or image_size where the model has one")


@pytest.mark.parametrize("verb", ["compare", "inspect"])
def test_a_narrow_window_loses_no_column_of_a_table(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, trained: tuple[Path, str, str], verb: str
) -> None:
    printed = []
    for columns in ("30", "80"):
        monkeypatch.setenv("COLUMNS", columns)
        assert call(verb, str(trained[0])) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]
    monkeypatch.setenv("COLUMNS", "30")
    assert call("inspect", str(trained[0]), "--plot") == 0  # which any width will do for
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 30


def test_no_table_off_a_terminal_is_filled_up_with_blanks(
    capsys: pytest.CaptureFixture[str], trained: tuple[Path, str, str]
) -> None:
    run = str(trained[0])
    small = ("digits", *SHORT, "deterministic=true", "channels_last=false")
    for command in (
        ("inspect", run),
        ("inspect", run, "--plot"),
        ("inspect", run, "--coverage"),
        ("compare", run),
        ("flops", "digits"),
        ("bench", *small, "--fractions", "0.5", "--orders", "random", "--modes", "exact", "--rounds", "1"),
        ("recipes",),
        ("sweep", *small, "seed=1,10", "--dry-run"),
        ("train", *small, "--dry-run"),
        ("validate", "digits"),
    ):
        assert call(*command) == 0
        torch.use_deterministic_algorithms(False)
        lines = capsys.readouterr().out.splitlines()
        assert lines
        assert [line for line in lines if line != line.rstrip()] == [], command


def test_weights_that_are_not_there_are_named_with_those_that_are(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, trained: tuple[Path, str, str]
) -> None:
    run = shutil.copytree(trained[0], tmp_path / "run")
    (run / "weights.safetensors").unlink()
    line = complaint(capsys, "export", "run", "-o", "x.safetensors")
    assert line == "run/weights.safetensors: not there; take --from last"
    (run / "checkpoints" / "last.safetensors").unlink()
    line = complaint(capsys, "export", "run", "-o", "x.safetensors", "--from", "last")
    assert line == "run/checkpoints/last.safetensors: not there; take --from best"
    (run / "checkpoints" / "best.safetensors").unlink()
    line = complaint(capsys, "export", "run", "-o", "x.safetensors")
    assert line == "run/weights.safetensors: not there, and no other weights; train it further or anew"


def test_a_number_of_processes_that_is_none(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "two")
    assert complaint(capsys, "train", "digits").startswith("WORLD_SIZE: 'two' is no number of processes")


def test_a_failure_while_training_is_code_1(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert call("train", "digits", *SHORT, "optimizer.lr=1e+30", "-o", "run", "--progress", "off") == 1
    err = capsys.readouterr().err
    assert err.startswith("epoch 1, step 2: the loss is not a finite number")
    assert err.count("\n") == 1
    line = complaint(capsys, "inspect", "run")
    assert "no finished epoch yet" in line


@pytest.mark.parametrize(
    ("number", "code", "line"),
    [
        (signal.SIGINT, 130, "interrupted; saved; to go on: {again}"),
        (signal.SIGTERM, 143, "ended by SIGTERM; saved; to go on: {again}"),
        (signal.SIGKILL, -signal.SIGKILL, None),
    ],
)
def test_a_run_that_is_stopped_can_be_read(
    neq: Callable[..., Any],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    number: int,
    code: int,
    line: str | None,
) -> None:
    process = neq("train", "digits", *SHORT, "epochs=1000", "-o", "run", "--device", "cpu")
    assert process.until((tmp_path / "run" / "checkpoints" / "last.safetensors").exists), process.text
    process.kill(number)
    assert process.wait() == code
    err = process.text
    assert "Traceback" not in err
    if line is not None:
        again = shlex.join(["train", "digits", *SHORT, "epochs=1000", "--device", "cpu", "--resume", "-o", "run"])
        assert err.splitlines()[-1] in [line.format(again=f"{neq} {again}") for neq in ("neq", "python -m neq_cli")]
        status = json.loads((tmp_path / "run" / "status.json").read_text())
        assert (status["state"], status["reason"]) == ("interrupted", signal.Signals(number).name)
    assert call("inspect", "run") == 0
    assert ("interrupted" if line else "killed") in capsys.readouterr().out
    assert call("compare", "run", "--json") == 0


FAILING_POLICY = """
class Odd:
    def choose(self, observations, epoch):
        return observations["no such layer"]

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass
"""


def test_an_error_in_code_of_the_users_own_is_one_line_with_its_place(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "odd_policy.py").write_text(FAILING_POLICY)
    policy = "policy={kind: entrypoint, entrypoint: 'odd_policy:Odd'}"
    assert call("train", "digits", *SHORT, policy, "-o", "run", "--progress", "off") == 1
    _, err = capsys.readouterr()
    (line,) = err.splitlines()
    assert line.startswith(f"{tmp_path}/odd_policy.py:4: KeyError: 'no such layer'; ")
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "failed"
    # Nor is a job that such code ends done.
    code = FAILING_POLICY.replace('return observations["no such layer"]', "raise SystemExit(0)")
    (tmp_path / "leaving_policy.py").write_text(f"{code}\nprint('no result')\n")
    leaving = "policy={kind: entrypoint, entrypoint: 'leaving_policy:Odd'}"
    assert call("train", "digits", *SHORT, leaving, "-o", "left", "--progress", "off") == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"no result\n{tmp_path}/leaving_policy.py:4: SystemExit: 0; ")
    assert json.loads((tmp_path / "left" / "status.json").read_text())["reason"] == "SystemExit: 0"
    monkeypatch.setenv("NEQ_TRACEBACK", "1")
    with pytest.raises(KeyError, match="no such layer"):
        main(["train", "digits", *SHORT, policy, "-o", "again", "--progress", "off"])


WARNING_MODEL = """
import warnings
from torch import nn


def make(num_classes=10):
    warnings.warn("so it is\\nnot any more")
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Linear(16, num_classes))
"""


def test_warnings_are_lines_like_others_and_said_once(neq: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "warning_model.py").write_text(WARNING_MODEL)
    model = "model={entrypoint: 'warning_model:make'}"
    process = neq("train", "digits", model, SHORT[0], "epochs=1", "policy.mu=0.9", "-o", "run", "--progress", "off")
    assert process.wait() == 0, process.text
    mu, own = process.lines
    assert mu.startswith("warning: policy.mu: 0.9 is above 0.5, ")
    assert own == f"warning: so it is not any more ({tmp_path}/warning_model.py:7)"
