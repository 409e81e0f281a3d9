from __future__ import annotations

import builtins
import io
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from neq_cli.errors import NeqError
from neq_cli.runs.compare.curves import study
from neq_cli.runs.store.run import Run, read_run
from neq_cli.runs.views.report.axes import far_ticks
from neq_cli.runs.views.report.drawing import MARK, PRINT
from neq_cli.runs.views.report.fields import Scale
from neq_cli.runs.views.report.files import write_pictures
from neq_cli.runs.views.report.page import build_report
from neq_cli.runs.views.report.pictures import Picture, line, parts, pictures

HOSTILE = "../../</script><img src=x onerror=alert(1)> $x^{$ _a"
FROZEN = {"conv1": [[0, 2], [2]], "bn1": [[], [1]]}


@pytest.fixture
def runs(make_run: Callable[..., Run], recipe: Any) -> list[Run]:
    top1 = [{"test_top1": 20.0 + epoch, "lr": 0.1 if epoch < 2 else 0.01} for epoch in range(3)]
    made = [make_run(f"n{seed}", recipe(seed=seed), metrics=top1, frozen=FROZEN) for seed in (1, 2)]
    return [*made, make_run("b", recipe(policy={"kind": "baseline"}), metrics=top1)]


def test_files_of_a_study(runs: list[Run], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    written = write_pictures(build_report(runs).pictures, tmp_path / "figures", "png")
    assert [path.name for path in written] == [
        "accuracy-against-paper-flops.png",
        "accuracy-against-executed-flops.png",
        "flops-paper-by-epoch.png",
        "flops-executed-by-epoch.png",
        "updated-neurons-by-epoch.png",
        "accuracy-by-epoch.png",
        "frozen-by-layer-2-neq-eps-0.001-mu-0.5.png",
        "phi-by-epoch-2-neq-eps-0.001-mu-0.5.png",
        "delta-phi-by-epoch-2-neq-eps-0.001-mu-0.5.png",
        "velocity-by-epoch-2-neq-eps-0.001-mu-0.5.png",
    ]
    assert sorted(path.name for path in (tmp_path / "figures").iterdir()) == sorted(path.name for path in written)
    for path in written:
        content = path.read_bytes()
        assert content.startswith(b"\x89PNG")
        # 3.4 inches at 300 dots.
        assert int.from_bytes(content[16:20], "big") == 1020


@pytest.mark.parametrize("form", ["png", "svg"])
def test_the_same_runs_give_the_same_bytes(runs: list[Run], tmp_path: Path, form: Any) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    some = [picture for picture in pictures(study(runs)) if picture.name.startswith(("accuracy-by", "frozen", "phi"))]
    first = [path.read_bytes() for path in write_pictures(some, tmp_path, form)]
    with matplotlib.rc_context({"font.size": 30, "text.usetex": True, "axes.facecolor": "red"}):
        again = [path.read_bytes() for path in write_pictures(some, tmp_path, form)]
        assert matplotlib.rcParams["font.size"] == 30
    assert len(first) == 3
    assert first == again


def test_other_files_are_not_replaced(runs: list[Run], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    theirs = tmp_path / "flops-paper-by-epoch.svg"
    theirs.write_text("<svg>mine</svg>")
    with pytest.raises(NeqError, match=r"flops-paper-by-epoch\.svg: already exists and was not written by neq"):
        write_pictures(build_report(runs).pictures, tmp_path, "svg")
    assert theirs.read_text() == "<svg>mine</svg>"
    theirs.unlink()
    target = tmp_path / "target"
    target.write_text(MARK)
    theirs.symlink_to(target)
    with pytest.raises(NeqError, match="already exists"):
        write_pictures(build_report(runs).pictures, tmp_path, "svg")
    assert target.read_text() == MARK


def test_a_folder_that_cannot_be_made_is_one_line(runs: list[Run], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "file").write_text("")
    with pytest.raises(NeqError, match="file/figures: cannot be written: Not a directory") as caught:
        write_pictures(build_report(runs).pictures, tmp_path / "file" / "figures", "svg")
    assert "\n" not in str(caught.value)


def test_hostile_names_stay_in_the_folder_and_text(make_run: Callable[..., Run], recipe: Any, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    policy = {"kind": "entrypoint", "entrypoint": "a:b", "kwargs": {}}
    plain = recipe(policy=policy)
    plain["policy"]["entrypoint"] = HOSTILE
    run = make_run("h", plain, sizes={HOSTILE: 4, "-->": 2}, frozen={HOSTILE: [[1], [2]]})
    folder = tmp_path / "figures"
    for path in write_pictures(build_report([run]).pictures, folder, "svg"):
        assert path.parent == folder
        assert path.name.isascii()
        assert "<script" not in path.read_text()
        assert "<img" not in path.read_text()


def test_without_matplotlib(runs: list[Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, failure = builtins.__import__, ImportError()

    def without(name: str, *arguments: Any, **named: Any) -> Any:
        if name.split(".")[0] == "matplotlib":
            raise failure
        return real(name, *arguments, **named)

    monkeypatch.setattr(builtins, "__import__", without)
    failure = ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib")
    message = r"^neq report needs matplotlib; install it with: pip install 'neq\[report\]'$"
    with pytest.raises(NeqError, match=message):
        build_report(runs)
    with pytest.raises(NeqError, match=message):
        write_pictures(build_report(runs).pictures, tmp_path, "png")
    # One that is there is not to be installed, but mended.
    for broken in (ImportError("numpy.core.multiarray failed"), ModuleNotFoundError("No module 'PIL'", name="PIL")):
        failure = broken
        with pytest.raises(NeqError, match=r"^neq report needs matplotlib, which is there but fails to import \("):
            build_report(runs)


def test_neither_torch_nor_pyplot_is_imported(runs: list[Run]) -> None:
    pytest.importorskip("matplotlib")
    code = (
        "import sys; from pathlib import Path; from neq_cli.runs.store.run import read_run;"
        "from neq_cli.runs.views.report import drawing, page;"
        f"picture = page.build_report([read_run(Path({str(runs[0].path)!r}))]).pictures[0];"
        "drawing.drawn(picture.draw, drawing.PAGE, 3.0, 'a', 'svg');"
        "print([name for name in ('torch', 'matplotlib.pyplot') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_figures_show_the_runs_numbers(runs: list[Run]) -> None:
    figure_module = pytest.importorskip("matplotlib.figure")
    by_name = {picture.name: picture for picture in pictures(study(runs))}
    figure = figure_module.Figure()
    by_name["updated-neurons-by-epoch"].draw(figure, PRINT)
    baseline, neq, *marks = figure.axes[0].lines
    np.testing.assert_array_equal(baseline.get_ydata(), [9, 9, 9])
    np.testing.assert_array_equal(neq.get_ydata(), [9, 7, 7])
    np.testing.assert_array_equal(neq.get_xdata(), [1, 2, 3])
    # The learning rate falls with epoch 3.
    assert [mark.get_xdata()[0] for mark in marks] == [2.5]
    figure = figure_module.Figure()
    by_name["accuracy-against-paper-flops"].draw(figure, PRINT)
    points = [
        (float(bar.lines[0].get_xdata()[0]), float(bar.lines[0].get_ydata()[0])) for bar in figure.axes[0].containers
    ]
    assert points == [(1, 22), (1, 22)]  # thousands


@pytest.mark.parametrize("lower", [False, True])
def test_a_line_joins_the_front(make_run: Callable[..., Run], recipe: Any, lower: bool) -> None:
    """2 is beaten by 1, which costs as much; 4 costs more than 3 for less; a run alone is joined to nothing."""
    figure_module = pytest.importorskip("matplotlib.figure")
    came_to = [(1e6, 80.0), (1e6, 70.0), (2e6, 90.0), (3e6, 85.0), (4e6, 95.0)]
    runs = []
    for number, (flops, top1) in enumerate(came_to):
        metrics = [{"flops_paper": flops, "flops_executed": flops, "test_top1": 100 - top1 if lower else top1}]
        policy = {"kind": "neq", "epsilon": 0.001 * (number + 1), "mu": 0.5, "definition": "paper"}
        one = make_run(
            f"run{number}", recipe(epochs=1, policy=policy), metrics=metrics, metric="test_top1", lower=lower
        )
        runs.append(one)
    picture = {picture.name: picture for picture in pictures(study(runs))}["accuracy-against-executed-flops"]
    figure = figure_module.Figure()
    picture.draw(figure, PRINT)
    (front,) = [one for one in figure.axes[0].lines if len(one.get_xdata()) > 1]
    expected = [80.0, 90.0, 95.0]
    assert list(front.get_xdata()) == [1, 2, 4]  # millions
    assert list(front.get_ydata()) == [100 - top1 if lower else top1 for top1 in expected]
    assert "where no other is as good in both: 1, 3, 5." in picture.caption

    alone = {picture.name: picture for picture in pictures(study(runs[:1]))}["accuracy-against-executed-flops"]
    figure = figure_module.Figure()
    alone.draw(figure, PRINT)
    assert all(len(one.get_xdata()) == 1 for one in figure.axes[0].lines)


@dataclass(frozen=True)
class Written:
    """What stands beside the axes of a figure as it is saved."""

    horizontal: str
    vertical: str
    across: list[str]
    up: list[str]


def written(picture: Picture) -> Written:
    """Draw a picture as it is printed; return its labels, and the numbers within the axes."""
    figure = pytest.importorskip("matplotlib.figure").Figure(
        figsize=(PRINT.width, picture.height), layout="constrained"
    )
    picture.draw(figure, PRINT)
    figure.savefig(io.BytesIO(), format="png")  # axes settle their numbers when they are drawn
    axes = figure.axes[0]

    def numbers(axis: Any) -> list[str]:
        low, high = sorted(axis.get_view_interval())
        ticks = zip(axis.get_ticklocs(), axis.get_ticklabels(), strict=True)
        return [label.get_text().replace("−", "-") for place, label in ticks if low <= place <= high]

    return Written(axes.get_xlabel(), axes.get_ylabel(), numbers(axes.xaxis), numbers(axes.yaxis))


@pytest.mark.parametrize(
    ("flops", "unit", "largest"),
    [(900.0, "", 900), (5e3, " (K)", 5), (8e4, " (K)", 80), (3e6, " (M)", 3), (4e9, " (G)", 4), (7e12, " (T)", 7)],
)
def test_axes_say_the_unit_of_flops(
    make_run: Callable[..., Run], recipe: Any, flops: float, unit: str, largest: float
) -> None:
    metrics = [{"flops_paper": flops, "flops_executed": flops, "test_top1": 90.0}] * 2
    by_name = {
        picture.name: picture for picture in pictures(study([make_run("run", recipe(epochs=2), metrics=metrics)]))
    }
    for accounting in ("paper", "executed"):
        found = written(by_name[f"flops-{accounting}-by-epoch"])
        assert found.vertical == f"{accounting} FLOPs per iteration{unit}"
        # The numbers reach up to what was counted, in that unit, and are short enough to stand side by side.
        assert 0.7 * largest < max(map(float, found.up)) <= 1.05 * largest
        found = written(by_name[f"accuracy-against-{accounting}-flops"])
        assert found.horizontal == f"{accounting} FLOPs per iteration{unit}"
        assert 0.7 * largest < max(map(float, found.across)) <= 1.15 * largest
        assert max(map(len, found.across)) <= 4


@pytest.mark.parametrize("top1", [[100.0], [99.98, 100.0], [100.0, 100.0, 100.0], [0.0], [99.5, 99.9], [0.0, 100.0]])
def test_no_accuracy_above_100_percent_or_below_0_is_written(
    make_run: Callable[..., Run], recipe: Any, top1: list[float]
) -> None:
    metrics = [{"test_top1": value} for value in top1]
    runs = [
        make_run(
            f"run{seed}",
            recipe(epochs=len(top1), seed=seed),
            metrics=[{"test_top1": max(v - 5 * seed, 0)} for v in top1],
        )
        for seed in (1, 2)
    ]  # whose bars reach beyond both ends
    alone = make_run("alone", recipe(epochs=len(top1), seed=3), metrics=metrics)
    for some in ([alone], [*runs, alone]):
        for picture in pictures(study(some)):
            if picture.name.startswith("accuracy"):
                numbers = [float(number) for number in written(picture).up]
                assert len(numbers) >= 2
                assert min(numbers) >= 0
                assert max(numbers) <= 100


def test_a_metric_of_the_users_own_has_no_limits(make_run: Callable[..., Run], recipe: Any) -> None:
    run = make_run("run", recipe(epochs=2), metrics=[{"test_top1": 240.0}, {"test_top1": 310.0}])
    by_name = {picture.name: picture for picture in pictures(study([run]))}
    assert max(float(number) for number in written(by_name["accuracy-by-epoch"]).up) > 250


def test_numbers_are_written_out_and_neurons_whole(make_run: Callable[..., Run], recipe: Any) -> None:
    metrics = [{"test_top1": 99.99990 + epoch / 1e5} for epoch in range(2)]
    run = make_run("run", recipe(epochs=2), metrics=metrics, sizes={"fc": 2})
    by_name = {picture.name: picture for picture in pictures(study([run]))}
    assert written(by_name["updated-neurons-by-epoch"]).up == ["0", "1", "2"]
    # Nothing is to be added to the numbers from a corner of the figure.
    assert all(number.startswith(("99.999", "100.0")) for number in written(by_name["accuracy-by-epoch"]).up)


@pytest.mark.parametrize("linear", [1e-9, 1e-4, 1e-3, 0.1, 1.0])
@pytest.mark.parametrize("highest", [1.0, 20.0, 3e4])
def test_numbers_of_a_wide_axis_leave_room_for_each_other(linear: float, highest: float) -> None:
    scale = Scale(linear)
    ticks = far_ticks(scale, highest)
    places = scale.place(np.array(ticks)) / (2 * scale.place(np.array(highest)))
    assert 0.0 in ticks
    assert max(ticks) <= highest
    assert (np.diff(places) > 0.069).all()  # a line of text beside an axis of 1.5 inches


def test_more_configurations_than_colours(make_run: Callable[..., Run], recipe: Any) -> None:
    made = [make_run("b", recipe(policy={"kind": "baseline"}))]
    made += [make_run(f"n{i}", recipe(policy={"kind": "neq", "epsilon": 0.001 * (i + 1)})) for i in range(9)]
    found = study(made)
    assert [[each.number for each in part] for part in parts(found)] == [list(range(1, 9)), [1, 9, 10]]
    assert [line(found, each).place for each in found.configurations] == list(range(10))
    for part in parts(found):
        keys = [line(found, each) for each in part]
        assert len({PRINT.colour(key.place) for key in keys}) == len(keys)


def test_palette_is_told_apart_by_the_colour_blind() -> None:
    # Viénot's simulation of deuteranopia and protanopia on linear RGB; distances in its two remaining dimensions.
    def linear(colour: str) -> np.ndarray:
        values = np.array([int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)])
        return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)

    protan = np.array([[0.11238, 0.88762, 0], [0.11238, 0.88762, 0], [0.00401, -0.00401, 1]])
    deutan = np.array([[0.29275, 0.70725, 0], [0.29275, 0.70725, 0], [-0.02234, 0.02234, 1]])
    for matrix in (protan, deutan, np.eye(3)):
        seen = [np.cbrt(np.clip(matrix @ linear(colour), 0, 1)) for colour in PRINT.series]
        gaps = [np.abs(one - other).max() for index, one in enumerate(seen) for other in seen[:index]]
        assert min(gaps) > 0.05


def test_reading_is_shared_by_page_and_files(runs: list[Run], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    report = build_report([read_run(run.path) for run in runs])
    monkeypatch.setattr(Run, "neurons", None)
    assert len(report.pictures) == 10
