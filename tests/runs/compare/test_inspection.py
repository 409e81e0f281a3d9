from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neq_cli.errors import NeqError
from neq_cli.runs.compare.inspection import fold_ranges, inspect_run, to_json
from neq_cli.runs.store.run import Run

# Frozen after each epoch. conv1: 0 freezes after 1, thaws after 3, freezes again after 4; 2 stays; 3 joins after 3.
FROZEN = {"conv1": [[0, 2], [0, 2], [2, 3], [0, 2, 3]], "bn1": [[], [1], [1], []]}


@pytest.fixture
def run(make_run: Callable[..., Run], recipe: Callable[..., dict[str, object]]) -> Run:
    metrics = [
        {"test_top1": 60.0, "flops_paper": 1000.0, "flops_executed": 2000.0, "epoch_seconds": 10.0},
        {"test_top1": 80.0, "flops_paper": 500.0, "flops_executed": 1600.0, "epoch_seconds": 8.0},
        {"test_top1": math.nan, "flops_paper": 300.0, "flops_executed": 1500.0, "epoch_seconds": 8.0},
        {"test_top1": 70.0, "flops_paper": 200.0, "flops_executed": 1500.0, "epoch_seconds": 4.0},
    ]
    return make_run(recipe=recipe(epochs=6), frozen=FROZEN, metrics=metrics, finish=False)


def test_layers_after_the_last_epoch(run: Run) -> None:
    conv, bn, fc = inspect_run(run).layers
    assert (conv.name, conv.kind, conv.neurons, conv.frozen) == ("conv1", "Conv2d", 4, 3)
    # 0 was frozen for epochs 2 and 3, updated in 4 and frozen again for 5; 2 stood still from 2; 3 from 4.
    assert (conv.frozen_indices, conv.frozen_since) == ((0, 2, 3), (5, 2, 4))
    assert (bn.frozen, bn.frozen_indices, bn.frozen_since) == (0, (), ())
    # In epoch 4 itself: 2 since epoch 2, 3 since 4; of bn1, 1 since 3.
    assert (conv.frozen_during, conv.during_indices, conv.during_since) == (2, (2, 3), (2, 4))
    assert (bn.frozen_during, bn.during_indices, bn.during_since) == (1, (1,), (3,))
    # The made-up arrays of epoch 4, conv1: 400..403; phi = 1 - x / 1000, velocity = ± x / 3.
    assert conv.phi_mean == pytest.approx(1 - 401.5 / 1000)
    assert conv.velocity_abs_mean == pytest.approx(401.5 / 3)
    assert fc.kind == "Linear"


def test_layers_after_an_earlier_epoch(run: Run) -> None:
    inspection = inspect_run(run, epoch=3)
    conv, bn, _ = inspection.layers
    assert (conv.frozen_indices, conv.frozen_since) == ((2, 3), (2, 4))
    assert (bn.frozen_indices, bn.frozen_since) == ((1,), (3,))
    assert (inspection.frozen, inspection.neurons) == (3, 9)
    assert (conv.during_indices, conv.during_since) == ((0, 2), (2, 2))
    assert (bn.during_indices, inspection.frozen_during) == ((1,), 3)
    assert conv.phi_mean == pytest.approx(1 - 301.5 / 1000)


def test_changes_count_what_each_decision_froze_and_thawed(run: Run) -> None:
    changes = inspect_run(run).changes
    assert [(change.epoch, change.frozen, change.froze, change.thawed) for change in changes] == [
        (1, 2, 2, 0),
        (2, 3, 1, 0),
        (3, 3, 1, 1),
        (4, 3, 1, 1),
    ]
    assert [change.frozen_during for change in changes] == [0, 2, 3, 3]


@pytest.mark.parametrize("epoch", [1, 2, 3, 4])
def test_frozen_during_is_what_the_metrics_say(run: Run, epoch: int) -> None:
    inspection = inspect_run(run, epoch=epoch)
    assert inspection.frozen_during == run.column("frozen")[epoch - 1]
    assert inspection.frozen_during == sum(len(layer.during_indices) for layer in inspection.layers)


def test_only_after_the_end_of_a_finished_run_nothing_follows(run: Run, make_run: Callable[..., Run]) -> None:
    finished = make_run("finished")
    assert [inspect_run(finished, epoch=epoch).is_last for epoch in (1, 2, 3)] == [False, False, True]
    assert not inspect_run(run).is_last  # it is running


def test_summary_by_hand(run: Run) -> None:
    inspection = inspect_run(run)
    assert (inspection.epochs_done, inspection.epochs_planned, inspection.epoch) == (4, 6, 4)
    # During epochs 1 to 4: 0, 2, 3, 3 of 9 neurons.
    assert inspection.frozen_mean_percent == pytest.approx(100 * (0 + 2 + 3 + 3) / (4 * 9))
    assert (inspection.flops_paper, inspection.flops_paper_percent) == (500.0, 25.0)
    assert (inspection.flops_executed, inspection.flops_executed_percent) == (1650.0, 82.5)
    assert (inspection.metric, inspection.metric_final, inspection.metric_best) == ("test_top1", 70.0, 80.0)
    assert inspection.metric_best_epoch == 2
    assert (inspection.seconds, inspection.probe_percent) == (30.0, pytest.approx(100 * 2.0 / 30))
    assert (inspection.recipe, inspection.description) == ("digits", "resnet32 on CIFAR10")
    assert (inspection.policy, inspection.notes) == ("NEq eps=0.001 mu=0.5", ("a note",))
    assert inspection.status == "running"


def test_summary_of_an_earlier_epoch_ends_there(run: Run) -> None:
    inspection = inspect_run(run, epoch=3)
    assert (inspection.flops_paper, inspection.seconds) == (600.0, 26.0)
    assert (inspection.metric_final, inspection.metric_best_epoch) == (80.0, 2)  # epoch 3 was not tested


def test_a_glob_limits_layers_and_changes_but_not_the_summary(run: Run) -> None:
    inspection = inspect_run(run, layer_glob="b*")
    assert [layer.name for layer in inspection.layers] == ["bn1"]
    assert [(change.froze, change.thawed) for change in inspection.changes] == [(0, 0), (1, 0), (0, 0), (0, 1)]
    assert inspection.frozen == 3


@pytest.mark.parametrize(
    ("glob", "says"),
    [
        ("conv9", "--layer conv9: matches none of the 3 layers of "),
        ("conv9", "; did you mean 'conv1'?"),
        ("zzz*", "; its first layers: conv1, bn1, fc"),
    ],
)
def test_a_glob_without_layers_names_some(run: Run, glob: str, says: str) -> None:
    with pytest.raises(NeqError) as caught:
        inspect_run(run, layer_glob=glob)
    assert says in str(caught.value)


def test_a_block_of_layers_is_hinted_at(make_run: Callable[..., Run]) -> None:
    run = make_run(sizes={"layer1.conv": 2, "layer1.bn": 2, "fc": 1})
    with pytest.raises(NeqError, match=r"give 'layer1.\*'"):
        inspect_run(run, layer_glob="layer1")


@pytest.mark.parametrize("epoch", [0, 5, -1])
def test_an_epoch_that_is_not_there(run: Run, epoch: int) -> None:
    with pytest.raises(NeqError, match=rf"--epoch {epoch}: .* has epochs 1 to 4"):
        inspect_run(run, epoch=epoch)


def test_an_epoch_that_is_not_there_in_a_run_of_one(make_run: Callable[..., Run]) -> None:
    with pytest.raises(NeqError, match="has only epoch 1"):
        inspect_run(make_run(epochs=1), epoch=2)


def test_json_is_plain_and_has_stable_keys(run: Run, tmp_path: Path) -> None:
    plain = to_json(inspect_run(run))
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert " ".join(plain) == (
        "schema path recipe description policy device status status_reason epoch epochs_done epochs_planned "
        "unit step passed_epochs "
        "neurons frozen frozen_during is_last frozen_mean_percent "
        "flops_paper flops_paper_percent flops_executed flops_executed_percent "
        "metric lower_is_better metric_final metric_best metric_best_epoch seconds probe_percent notes layer_glob "
        "layers changes joules co2_grams energy nothing_saved"
    )
    assert plain["path"] == str(tmp_path / "run")
    assert (plain["unit"], plain["step"], plain["passed_epochs"]) == ("epoch", None, None)
    assert list(plain["layers"][0]) == [
        "name", "kind", "neurons", "frozen", "phi_mean", "velocity_abs_mean", "frozen_indices", "frozen_since",
        "frozen_during", "during_indices", "during_since",
    ]  # fmt: skip
    assert plain["layers"][0]["frozen_since"] == [5, 2, 4]
    assert plain["changes"][1] == {"epoch": 2, "frozen": 3, "froze": 1, "thawed": 0, "frozen_during": 2}


def test_what_was_never_measured_is_null(make_run: Callable[..., Run]) -> None:
    plain = to_json(inspect_run(make_run(metrics=[{"test_top1": math.nan, "epoch_seconds": 0.0}] * 3)))
    assert (plain["metric_final"], plain["metric_best_epoch"], plain["probe_percent"]) == (None, None, None)


@pytest.mark.parametrize(
    ("indices", "text"),
    [([], ""), ([5], "5"), ([0, 1], "0-1"), ([0, 1, 2, 3, 7, 12, 13, 14, 15], "0-3, 7, 12-15"), ([1, 3, 5], "1, 3, 5")],
)
def test_ranges_are_folded(indices: list[int], text: str) -> None:
    assert fold_ranges(indices) == text


@given(st.sets(st.integers(0, 60)))
def test_folded_ranges_unfold_to_what_they_were(indices: set[int]) -> None:
    unfolded = []
    for part in filter(None, fold_ranges(sorted(indices)).split(", ")):
        first, _, last = part.partition("-")
        unfolded += range(int(first), int(last or first) + 1)
    assert unfolded == sorted(indices)


@pytest.mark.parametrize(("lower", "best", "epoch"), [(True, 2.0, 2), (False, 9.0, 1)])
def test_the_best_epoch_is_the_one_the_metric_says(
    make_run: Callable[..., Run], lower: bool, best: float, epoch: int
) -> None:
    metrics = [{"test_mae": error} for error in (9.0, 2.0, 4.0)]
    found = inspect_run(make_run(metrics=metrics, metric="test_mae", lower=lower))
    assert (found.metric_final, found.metric_best, found.metric_best_epoch) == (4, best, epoch)
    assert found.lower_is_better == lower


def test_an_observation_says_where_it_stands(make_observed: Callable[..., Run]) -> None:
    plain = to_json(inspect_run(make_observed(), epoch=5))
    assert (plain["unit"], plain["epoch"], plain["epochs_done"], plain["epochs_planned"]) == ("observation", 5, 8, 12)
    assert (plain["step"], plain["passed_epochs"]) == (500, 1.25)
    assert isinstance(plain["step"], int)


def test_an_observation_of_data_without_a_length_has_a_step(make_observed: Callable[..., Run]) -> None:
    plain = to_json(inspect_run(make_observed(metrics=[{"passed_epochs": math.nan}] * 2)))
    assert (plain["step"], plain["passed_epochs"]) == (200, None)


@pytest.mark.parametrize(("rows", "known"), [(8, "observations 1 to 8"), (1, "only observation 1")])
def test_an_observation_that_is_not_there(make_observed: Callable[..., Run], rows: int, known: str) -> None:
    with pytest.raises(NeqError, match=rf"--epoch 9: .* has {known}"):
        inspect_run(make_observed(rows=rows), epoch=9)
