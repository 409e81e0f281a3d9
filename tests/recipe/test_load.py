"""Loading: references, located problems, overrides, checks, and the resolved recipe."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest

from neq_cli.errors import RecipeError
from neq_cli.recipe import Check, DataSection, ModelSection, OptimizerSection, ParameterGroup, SchedulerSection
from neq_cli.recipe.keys import Problem, Recipe
from neq_cli.recipe.load import dump_recipe, load_recipe
from neq_cli.recipe.policy_keys import CustomPolicy, NEqPolicy, StochasticPolicy
from neq_cli.recipe.values import Section

GOOD = """\
model: {name: resnet32, kwargs: {num_classes: 10}}
data:
  name: CIFAR10
  mean: [0.5, 0.5, 0.5]
epochs: 250
optimizer: {name: sgd, lr: 0.1, momentum: 0.9, weight_decay: 5e-4}
scheduler: {name: multistep, milestones: [100, 150], gamma: 0.1, warmup_epochs: 2}
policy:
  kind: neq
  epsilon: 1e-3
"""


@pytest.fixture(autouse=True)
def _in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write(text: str | bytes, name: str = "cifar10.yaml") -> str:
    Path(name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return name


def load(text: str = GOOD, *overrides: str, checks: Sequence[Check] = ()) -> Recipe:
    return load_recipe(write(text), overrides, checks).recipe


def problems(text: str | bytes = GOOD, *overrides: str, checks: Sequence[Check] = ()) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(text), overrides, checks)
    assert all(line.isprintable() for line in caught.value.problems)
    return list(caught.value.problems)


# References


def test_a_path(tmp_path: Path) -> None:
    Path("deep").mkdir()
    loaded = load_recipe(write(GOOD, "deep/mine.v2.yaml"))
    assert loaded.name == "mine.v2"
    assert loaded.directory == tmp_path / "deep"
    assert loaded.path == tmp_path / "deep" / "mine.v2.yaml"
    assert loaded.recipe.optimizer.kwargs == {"momentum": 0.9, "weight_decay": 0.0005}


def test_a_shipped_name_and_a_path_that_wins_over_it() -> None:
    assert load_recipe("digits").recipe.data.name == "digits"
    Path("digits-baseline").mkdir()  # a folder is no recipe, and does not win
    assert load_recipe("digits-baseline").name == "digits-baseline"
    write(GOOD, "digits")
    assert load_recipe("digits").recipe.data.name == "CIFAR10"


def reference_problem(reference: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(reference)
    (line,) = caught.value.problems
    assert line.isprintable()
    return line


def test_a_reference_that_is_nothing() -> None:
    line = reference_problem("dgits")
    assert line.startswith("dgits: no such file, nor a recipe of that name; known: cifar10-folder, deeplabv3_")
    assert line.endswith("; did you mean 'digits'?")
    assert reference_problem("recipes/digits.yaml").endswith("; did you mean 'digits'?")
    assert reference_problem("").startswith("no recipe given")
    assert reference_problem("~nobody-of-that-name/x.yaml").startswith("~nobody-of-that-name/x.yaml: ")
    assert reference_problem("x" * 5000).endswith("file name too long")
    assert reference_problem("a\x1b[31m\n").startswith("a\\x1b[31m\\n: no such file")


def test_a_directory() -> None:
    Path("run").mkdir()
    assert reference_problem("run") == "run: is a directory, not a recipe; give the recipe file in it"
    write(GOOD, "run/recipe.yaml")
    assert reference_problem("run") == "run: is a directory, not a recipe; did you mean 'run/recipe.yaml'?"


def test_a_file_that_cannot_be_read() -> None:
    assert problems(b"a: 1\nb: \xff\n") == ["cifar10.yaml:2: is not UTF-8 text; save it as UTF-8"]
    assert problems(b"a: 1\n" * 200_001) == ["cifar10.yaml: is larger than 1 MB, so not a recipe; give a YAML file"]
    Path("loop.yaml").symlink_to("loop.yaml")
    assert reference_problem("loop.yaml").startswith("loop.yaml: ")


def test_a_byte_order_mark_is_no_problem() -> None:
    assert load_recipe(write(b"\xef\xbb\xbf" + GOOD.encode())).recipe.epochs == 250


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", "cifar10.yaml:1: empty; write keys such as model, data, epochs and optimizer"),
        ("# x\n", "cifar10.yaml:1: empty; write keys such as model, data, epochs and optimizer"),
        ("\n- a\n", 'cifar10.yaml:2: ["a"] is no recipe; write keys such as model, data, epochs and optimizer'),
        ("a\n", "cifar10.yaml:1: 'a' is no recipe; write keys such as model, data, epochs and optimizer"),
        ("a: 1\n\tb: 2\n", "cifar10.yaml:2: a tab in the indentation; use spaces"),
    ],
)
def test_text_that_is_no_recipe(text: str, line: str) -> None:
    assert problems(text) == [line]


# Problems


def test_quotes_are_to_go_only_where_the_number_would_do() -> None:
    wrong = "'{}' is not a whole number above 0; "
    for text, mend in (("100", "remove the quotes"), ("0", "write one such as 250"), ("1.5", "write one such as 250")):
        assert wrong.format(text) + mend in "\n".join(problems(f"epochs: '{text}'\n"))


def test_all_problems_at_once_each_with_place_value_and_mend() -> None:
    text = """\
modle: x
model: resnet18
data:
  entrypoint: nets.make
  augment: imagnet
  workers: -1
  std: [0.1, 0, a]
task: clasification
epochs: ten
epochs: 3
batch_size: "100"
optimizer: {lr: abc, groups: [{parameters: [], lrr: 3}]}
policy:
  kind: neq
  epsilom: 1
  p: 0.5
lr: 0.1
exclude: fc
channels_last: atuo
clip_grad_norm: !mine 3
seed: 1.5
data.root: x
zzz: 1
"""
    assert problems(text) == [
        "cifar10.yaml:1: modle: unknown key; did you mean 'model'?",
        "cifar10.yaml:2: model: 'resnet18' is not a section; write {name: resnet18}",
        "cifar10.yaml:4: data.entrypoint: 'nets.make' is not pkg.mod:callable, or null",
        "cifar10.yaml:5: data.augment: 'imagnet' is not one of none, crop, cifar, imagenet, randaugment, segmentation; "
        "did you mean 'imagenet'?",
        "cifar10.yaml:6: data.workers: -1 is not a whole number of at least 0; write one such as 2",
        "cifar10.yaml:7: data.std.1: 0 is not a number above 0",
        "cifar10.yaml:7: data.std.2: 'a' is not a number above 0",
        "cifar10.yaml:8: task: 'clasification' is not classification, segmentation or pkg.mod:callable; "
        "did you mean 'classification'?",
        "cifar10.yaml:9: epochs: 'ten' is not a whole number above 0; write one such as 250",
        "cifar10.yaml:10: epochs: given twice, first in line 9; remove one",
        "cifar10.yaml:11: batch_size: '100' is not a whole number above 0; remove the quotes",
        "cifar10.yaml:12: optimizer.lr: 'abc' is not a number of at least 0, or null; write one such as 0.1",
        "cifar10.yaml:12: optimizer.groups.0.parameters: [] is not a list of one or more texts; "
        "write one such as ['*.bias', 'fc.*']",
        "cifar10.yaml:12: optimizer.groups.0.lrr: unknown key; did you mean 'lr'?",
        "cifar10.yaml:15: policy.epsilom: unknown key; did you mean 'epsilon'?",
        "cifar10.yaml:16: policy.p: policy neq has no such key; policy stochastic has",
        "cifar10.yaml:17: lr: unknown key; did you mean 'optimizer.lr'?",
        "cifar10.yaml:18: exclude: 'fc' is not a list of texts; write ['fc']",
        "cifar10.yaml:19: channels_last: 'atuo' is not one of true, false, auto; did you mean 'auto'?",
        "cifar10.yaml:20: clip_grad_norm: the tag !mine is not allowed; write the value without it",
        "cifar10.yaml:21: seed: 1.5 is not a whole number from 0 to below 4294967296; write one such as 1",
        "cifar10.yaml:22: data.root: unknown key; write root under data",
        "cifar10.yaml:23: zzz: unknown key; known: description, model, data, task, epochs, batch_size, "
        "optimizer, scheduler, policy, exclude, backward, precision, channels_last, compile, cuda_graph, "
        "gradient_accumulation, "
        "clip_grad_norm, label_smoothing, ema, eval_every, checkpoint_minutes, probe_every, probe_snapshot, "
        "stop_when_frozen, parallel, fsdp, sync_batchnorm, seed, "
        "deterministic, device, track, energy, grams_per_kwh",
    ]


def test_missing_keys_are_located_at_their_section() -> None:
    text = "# comment\ndata:\n  name: digits\nmodel: {}\npolicy:\n  kind: stochastic\n"
    assert problems(text) == [
        "cifar10.yaml:2: epochs: missing; write epochs: 250",
        "cifar10.yaml:2: optimizer: missing; write optimizer: {name: sgd, lr: 0.1}",
        "cifar10.yaml:4: model: neither name nor entrypoint is given; write one of them",
        "cifar10.yaml:5: policy.p: missing; write p: 0.5",
    ]


@pytest.mark.parametrize(
    ("policy", "line"),
    [
        (
            "{kind: stocastic}",
            "policy.kind: 'stocastic' is not one of baseline, neq, stochastic, front, budget, entrypoint; "
            "did you mean 'stochastic'?",
        ),
        ("{kind: [1]}", "policy.kind: [1] is not one of baseline, neq, stochastic, front, budget, entrypoint"),
        ("{kind: null}", "policy.kind: null is not one of baseline, neq, stochastic, front, budget, entrypoint"),
        ("neq", "policy: 'neq' is not a section; write {kind: neq}"),
        ("null", "policy: null is not a section; write one such as {kind: neq}"),
        ("{kind: stochastic, p: half}", "policy.p: 'half' is not a number from 0 to 1, or match:RUN_DIR; "
         "write one such as 0.5"),
        ("{kind: stochastic, p: 1.5}", "policy.p: 1.5 is not a number from 0 to 1, or match:RUN_DIR; "
         "write one such as 0.5"),
        ("{kind: stochastic, p: '0.5'}", "policy.p: '0.5' is not a number from 0 to 1, or match:RUN_DIR; "
         "remove the quotes"),
        ("{kind: entrypoint, entrypoint: x}", "policy.entrypoint: 'x' is not pkg.mod:callable; "
         "write one such as my_policies:coin_toss"),
        ("{kind: entrypoint, entrypoint: 'a:b', kwargs: 3}", "policy.kwargs: 3 is not a section; "
         "write one such as {share: 0.5}"),
        ("{mu: .nan}", "policy.mu: NaN is not a number from 0 to below 1; write one such as 0.5"),
        ("{epochs: 3}", "policy.epochs: unknown key; did you mean 'epochs'?"),
    ],
)  # fmt: skip
def test_policy_problems_are_one_line_each(policy: str, line: str) -> None:
    text = GOOD[: GOOD.index("policy:")] + f"policy: {policy}\n"
    assert problems(text) == [f"cifar10.yaml:8: {line}"]


BAD_VALUES = ["nonsense text", "-7", "1.5", "[[]]", "{x: y}", "null", "true", ".nan", "1e99"]


PLACES: list[tuple[str, type[Section], list[str]]] = [
    ("", Recipe, []),
    ("model.", ModelSection, []),
    ("data.", DataSection, []),
    ("optimizer.", OptimizerSection, []),
    ("optimizer.groups.0.", ParameterGroup, ["optimizer.groups=[{parameters: [x]}]"]),
    ("scheduler.", SchedulerSection, []),
    ("policy.", NEqPolicy, []),
    ("policy.", StochasticPolicy, ["policy.kind=stochastic", "policy.p=0.5"]),
    ("policy.", CustomPolicy, ["policy.kind=entrypoint", "policy.entrypoint=a:b"]),
]


@pytest.mark.parametrize(("prefix", "model", "overrides"), PLACES)
def test_no_value_of_any_key_brings_out_pydantics_own_words(
    prefix: str, model: type[Section], overrides: list[str]
) -> None:
    refused = 0
    for key in model.model_fields:
        for value in BAD_VALUES:
            dotted = prefix + key
            lines = outcome(GOOD, *overrides, f"{dotted}={value}")
            refused += bool(lines)
            # Another kind in place of this one makes its keys unknown; all else is the fault of the override.
            assert key == "kind" or all(line.startswith(f"command line: {dotted}={value}: ") for line in lines)
            assert len(set(lines)) == len(lines)
            for line in lines:
                assert line.isprintable()
                assert not any(word in line for word in ("Input", "should", "pydantic", "constrained", "None"))
    assert refused > 2 * len(model.model_fields)


def outcome(text: str, *overrides: str) -> tuple[str, ...]:
    """Return the problems, none where there are none."""
    try:
        load_recipe(write(text), overrides)
    except RecipeError as error:
        return error.problems
    return ()


# Overrides


def test_overrides_replace_add_and_empty() -> None:
    recipe = load(
        GOOD,
        "policy.epsilon=5e-3",
        "seed=2",
        "scheduler.milestones=[10,20]",
        "model.kwargs.num_classes=100",
        "model.kwargs.deep.er=x",
        "ema=0.99",
        "ema=null",
        "data.mean.1=0.25",
        "data.kwargs.split=a=b",
        "clip_grad_norm=",
    )
    assert recipe.policy.epsilon == 0.005  # type: ignore[union-attr]
    assert recipe.seed == 2
    assert recipe.scheduler.kwargs == {"milestones": [10, 20], "gamma": 0.1}
    assert recipe.model.kwargs == {"num_classes": 100, "deep": {"er": "x"}}
    assert recipe.ema is None
    assert recipe.data.mean == [0.5, 0.25, 0.5]
    assert recipe.data.kwargs == {"split": "a=b"}
    assert recipe.clip_grad_norm is None


def test_another_policy_kind_drops_what_it_does_not_know() -> None:
    assert dump_recipe(load(GOOD, "policy.kind=baseline")).count("epsilon") == 0
    recipe = load(GOOD, "policy.p=match:runs/x", "policy.kind=stochastic")
    assert recipe.policy.model_dump() == {
        "kind": "stochastic", "p": "match:runs/x", "scope": "neuron", "matched_p": None,
    }  # fmt: skip
    assert load(GOOD.replace("1e-3", "0.7"), "policy.kind=baseline", "policy.kind=neq").policy.epsilon == 0.7  # type: ignore[union-attr]
    assert load(GOOD, "policy.kind=neq").policy.epsilon == 0.001  # type: ignore[union-attr]
    assert load("policy: {kind: stochastic, p: 0.5}\n" + GOOD[: GOOD.index("policy:")], "policy.kind=neq")
    assert load(GOOD, "policy={kind: stochastic, p: 0.25}").policy.p == 0.25  # type: ignore[union-attr]


def test_what_the_command_line_says_is_never_dropped() -> None:
    assert problems(GOOD, "policy.kind=baseline", "policy.mu=0.1") == [
        "command line: policy.mu=0.1: policy baseline has no such key; policy neq and budget has"
    ]


def test_a_typo_in_the_file_is_reported_under_another_policy_kind_too() -> None:
    assert problems(GOOD + "  epsilom: 1\n", "policy.kind=baseline") == [
        "cifar10.yaml:11: policy.epsilom: unknown key; known: kind"
    ]


def test_another_scheduler_drops_the_formers_arguments_but_not_the_warm_up() -> None:
    scheduler = load(GOOD, "scheduler.name=cosine").scheduler
    assert (scheduler.name, scheduler.kwargs, scheduler.warmup_epochs) == ("cosine", {}, 2)
    scheduler = load(GOOD, "scheduler.gamma=0.5", "scheduler.step_size=3", "scheduler.name=step").scheduler
    assert scheduler.kwargs == {"gamma": 0.5, "step_size": 3}
    assert load(GOOD, "scheduler.name=multistep").scheduler.kwargs == {"milestones": [100, 150], "gamma": 0.1}


def test_another_optimizer_keeps_its_arguments_and_null_takes_one_out() -> None:
    optimizer = load(GOOD, "optimizer.name=adam", "optimizer.momentum=null").optimizer
    assert (optimizer.name, optimizer.kwargs) == ("adam", {"weight_decay": 0.0005})


def test_an_entrypoint_takes_the_place_of_a_name_and_the_reverse() -> None:
    model = load(GOOD, "model.entrypoint=nets:make").model
    assert (model.name, model.entrypoint, model.kwargs) == (None, "nets:make", {"num_classes": 10})
    data = load(GOOD.replace("name: CIFAR10", "entrypoint: sets:make"), "data.name=digits").data
    assert (data.name, data.entrypoint) == ("digits", None)
    both = "model.entrypoint=a:b model.name=resnet18"
    assert problems(GOOD, *both.split()) == [
        f"command line: {both}: model: both name and entrypoint are given; remove one of them"
    ]


def test_an_override_of_a_section_the_file_does_not_have() -> None:
    text = GOOD[: GOOD.index("policy:")]
    assert load(text, "policy.epsilon=0.5").policy.model_dump()["epsilon"] == 0.5
    assert load(text.replace("optimizer:", "scheduler_:").replace("scheduler_:", "optimizer:"), "policy.mu=0.1")


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("policy.epsilon=abc", "'abc' is not a number of at least 0; write one such as 0.001"),
        ("policy.epsilom=1", "unknown key; did you mean 'epsilon'?"),
        ("polcy.kind=neq", "polcy: unknown key; did you mean 'policy'?"),
        ("policy.kind=stochastic", "policy.p: missing; write p: 0.5"),
        ("policy={kind: neq, epsilom: 1}", "policy.epsilom: unknown key; did you mean 'epsilon'?"),
        ("policy.epsilon", "not KEY=VALUE, such as policy.epsilon=0.005"),
        ("=3", "not KEY=VALUE, such as policy.epsilon=0.005"),
        ("policy..mu=3", "not KEY=VALUE, such as policy.epsilon=0.005"),
        ("epochs=", "null is not a whole number above 0; write one such as 250"),
        ("epochs.x=1", "epochs is not a section"),
        ("data.mean.3=1", "data.mean is a list of 3, counted from 0"),
        ("data.mean.x=1", "data.mean is a list of 3, counted from 0"),
        ("data.mean.0=x", "'x' is not a number"),
        ("scheduler.milestones=[1", "a [ that is not closed; close it with ]"),
        ("exclude=[*.bias]", "*name is not allowed; put text that begins with * in quotes: '*.bias'"),
        ("policy.mu=!x 3", "the tag !x is not allowed; write the value without it"),
        ("model.name=null", "model: neither name nor entrypoint is given; write one of them"),
        ("model.kwargs=3", "3 is not a section; write one such as {num_classes: 10}"),
        ("seed=\x1b", "the character U+001B is not allowed; remove it"),
    ],
)
def test_problems_of_overrides(override: str, line: str) -> None:
    shown = override.replace("\x1b", "\\x1b")
    assert problems(GOOD, override) == [f"command line: {shown}: {line}"]


def test_an_override_that_a_later_one_would_undo_is_refused() -> None:
    said = "is replaced by the policy=... after it; write it last"
    assert problems(GOOD, "policy.epsilon=0.5", "policy={kind: neq}") == [f"command line: policy.epsilon=0.5: {said}"]
    assert load(GOOD, "policy={kind: neq}", "policy.epsilon=0.5").policy.model_dump()["epsilon"] == 0.5


def test_problems_of_the_file_come_first_then_the_command_lines_in_its_order() -> None:
    assert problems(GOOD.replace("1e-3", "x"), "seed=a", "oops=1 ", "epochs=b")[0].startswith("cifar10.yaml:10: ")
    lines = problems(GOOD, "seed=a", "oops", "epochs=b")
    assert [line.split(": ")[1] for line in lines] == ["seed=a", "oops", "epochs=b"]


def test_a_bad_value_of_the_file_is_mended_by_an_override() -> None:
    assert load(GOOD.replace("250", "ten"), "epochs=7").epochs == 7


# Checks


class Recorder:
    """A check that notes what it is called with and answers with given problems."""

    def __init__(self, answers: dict[str, list[Problem]] | None = None) -> None:
        self.answers = answers or {}
        self.called: dict[str, Section] = {}

    def __call__(self, name: str, section: Section) -> Iterable[Problem]:
        assert name not in self.called
        self.called[name] = section
        return iter(self.answers.get(name, []))


def test_checks_see_every_section_and_then_the_whole() -> None:
    recorder = Recorder()
    recipe = load(checks=[recorder])
    assert list(recorder.called) == ["model", "data", "optimizer", "scheduler", "policy", "fsdp", "device", ""]
    assert recorder.called[""] is recipe
    assert recorder.called["policy"] == recipe.policy


def test_checks_see_valid_sections_of_a_broken_recipe_and_their_problems_are_located() -> None:
    recorder = Recorder(
        {
            "model": [Problem("model.name", "no torchvision model 'resnet32'")],
            "optimizer": [Problem("optimizer.momentum", "unknown argument"), Problem("optimizer.eps", "missing")],
            "scheduler": [Problem("scheduler.name", "no such scheduler")],
        }
    )
    lines = problems(GOOD + "  epsilom: 1\n", "data.workers=-1", "scheduler.name=cosin", checks=[recorder])
    valid = ["model", "optimizer", "scheduler", "fsdp", "device"]
    assert list(recorder.called) == valid, "data and policy are not valid"
    assert lines == [
        "cifar10.yaml:1: model.name: no torchvision model 'resnet32'",
        "cifar10.yaml:6: optimizer.momentum: unknown argument",
        "cifar10.yaml:6: optimizer.eps: missing",
        "cifar10.yaml:11: policy.epsilom: unknown key; did you mean 'epsilon'?",
        "command line: data.workers=-1: -1 is not a whole number of at least 0; write one such as 2",
        "command line: scheduler.name=cosin: no such scheduler",
    ]


def test_a_section_the_file_leaves_out_is_checked_with_its_defaults() -> None:
    recorder = Recorder()
    load(GOOD[: GOOD.index("scheduler:")], checks=[recorder])
    assert recorder.called["scheduler"].name == "constant"  # type: ignore[attr-defined]
    assert recorder.called["policy"].kind == "neq"  # type: ignore[attr-defined]


def test_the_whole_recipe_is_checked_only_when_its_sections_are_right() -> None:
    wrong = Recorder({"data": [Problem("data.root", "no such folder")]})
    assert problems(checks=[wrong]) == [
        "cifar10.yaml:2: data.root: no such folder ('~/data' is the default: write data.root)"
    ]
    assert "" not in wrong.called
    whole = Recorder({"": [Problem("", "sections at odds"), Problem("device", "no CUDA")]})
    assert problems(GOOD, "device=cuda", checks=[whole]) == [
        "cifar10.yaml:1: sections at odds",
        "command line: device=cuda: no CUDA",
    ]


# Resolved recipes


@pytest.mark.parametrize("name", ["digits", "digits-stochastic", "entrypoint", "resnet32-cifar10-adam"])
def test_a_resolved_recipe_is_the_same_recipe(name: str) -> None:
    loaded = load_recipe(name, ["optimizer.lr=1e-05", "description='yes: \"é\"'", "optimizer.eps=1e-16"])
    again = load_recipe(write(loaded.resolved_yaml(), "recipe.yaml"))
    assert again.recipe == loaded.recipe
    assert again.recipe.optimizer.lr == 0.00001
    assert again.recipe.description == 'yes: "é"'
    assert again.resolved_yaml() == loaded.resolved_yaml()


def test_a_resolved_recipe_names_every_key() -> None:
    resolved = load_recipe(write(GOOD)).resolved_yaml()
    keys = [line.partition(":")[0] for line in resolved.splitlines() if not line.startswith(" ")]
    assert keys == list(Recipe.model_fields)
