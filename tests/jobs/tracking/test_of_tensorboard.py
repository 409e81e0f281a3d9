"""TensorBoard's own reader finds what metrics.csv and the neuron files say, also where a run was rewound."""

from __future__ import annotations

import io
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tracked import TrackedLoop

from neq_cli import read_run
from neq_cli.jobs.tracking import ids
from neq_cli.jobs.tracking.of_tensorboard import wait_for_a_later_name

pytest.importorskip("tensorboard", reason="tensorboard is not installed")


def read(run: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    everything = {"scalars": 0, "histograms": 0, "tensors": 0, "images": 0}
    found = EventAccumulator(str(run / "tracking/tensorboard"), size_guidance=everything)
    return found.Reload()


def assert_all_is_there(path: Path) -> None:
    """Every number of the run, every histogram, each once and by its epoch."""
    run, found = read_run(path), read(path)
    tags = found.Tags()
    for name, column in run.metrics.items():
        expected = [(epoch, value) for epoch, value in enumerate(column.tolist(), 1) if not math.isnan(value)]
        assert (name in tags["scalars"]) == bool(expected), name
        if expected:
            steps, values = zip(*((each.step, each.value) for each in found.Scalars(name)), strict=True)
            assert steps == tuple(epoch for epoch, _ in expected), name
            np.testing.assert_allclose(values, [value for _, value in expected], rtol=1e-6)
    for epoch in range(1, run.epochs + 1):
        for layer, arrays in run.neurons(epoch).items():
            (share,) = [each.value for each in found.Scalars(f"frozen_share/{layer}") if each.step == epoch]
            assert share == pytest.approx(float((~arrays["trained"]).mean()))
            (histogram,) = [
                each.histogram_value for each in found.Histograms(f"log10_velocity/{layer}") if each.step == epoch
            ]
            logarithms = np.log10(np.maximum(np.abs(arrays["velocity"].astype(float)), 1e-12))
            assert histogram.num == len(logarithms)
            for limit, up_to in zip(histogram.bucket_limit, np.cumsum(histogram.bucket), strict=True):
                # Values at an edge count above it, but at the last one.
                assert up_to == ((logarithms < limit) | (limit == histogram.bucket_limit[-1])).sum()


def texts(found: Any, name: str) -> list[tuple[int, str]]:
    return [(each.step, each.tensor_proto.string_val[0].decode()) for each in found.Tensors(f"{name}/text_summary")]


def test_a_run_is_read_back(tmp_path: Path) -> None:
    TrackedLoop().record(tmp_path / "run", 4, ["tensorboard"])
    assert_all_is_there(tmp_path / "run")
    found = read(tmp_path / "run")
    ((step, recipe),) = texts(found, "recipe")
    assert (step, recipe) == (0, f"```yaml\n{(tmp_path / 'run/recipe.yaml').read_text()}```")
    assert "- coverage: " in texts(found, "notes")[0][1]
    assert texts(found, "state") == [(0, "running"), (4, "finished")]
    from tensorboard.plugins.hparams import plugin_data_pb2

    content = found.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    hparams = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info.hparams
    assert hparams["policy.epsilon"].number_value == 0.05
    assert hparams["settings.depth.of"].number_value == 2
    assert hparams["name"].string_value == "mine"


def test_the_pictures_of_the_report(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    from PIL import Image

    TrackedLoop().record(tmp_path / "run", 3, ["tensorboard"])
    found = read(tmp_path / "run")
    names = found.Tags()["images"]
    assert "report/accuracy-by-epoch" in names
    for name in names:
        (image,) = found.Images(name)
        pixels = np.asarray(Image.open(io.BytesIO(image.encoded_image_string)))
        assert pixels.shape == (image.height, image.width, 3)
        assert pixels.std() > 0


@pytest.mark.parametrize("saved", [0, 1, 3])
def test_rows_that_were_rewound_are_not_doubled(tmp_path: Path, saved: int) -> None:
    loop, run = TrackedLoop(), tmp_path / "run"
    with pytest.raises(RuntimeError):
        loop.record(run, 4, ["tensorboard"], fails=True)
    loop.rewind(saved)
    loop.optimizer.param_groups[0]["lr"] = 0.01  # what is trained again comes to other numbers
    loop.record(run, 5, ["tensorboard"], resume=True)
    assert len(list((run / "tracking/tensorboard").iterdir())) == 2
    assert_all_is_there(run)


def test_a_kill_between_an_epoch_and_its_note_doubles_nothing(tmp_path: Path) -> None:
    loop, run = TrackedLoop(), tmp_path / "run"
    loop.record(run, 3, ["tensorboard"])
    kept = ids.read_ids(run / "tracking/ids.json")["tensorboard"]
    ids.write_ids(run / "tracking/ids.json", {"tensorboard": ids.Kept(kept.identity, 1)})
    loop.record(run, 4, ["tensorboard"], resume=True)
    assert_all_is_there(run)


def test_a_file_begins_in_a_second_of_its_own(tmp_path: Path) -> None:
    """Readers take event files by name, in which process numbers follow the second."""
    now = int(time.time())
    (tmp_path / f"events.out.tfevents.{now}.host.99.0").touch()
    (tmp_path / f"events.out.tfevents.{now + 3600}.host.99.0").touch()  # a clock that was wrong
    wait_for_a_later_name(tmp_path)
    assert time.time() < now + 60
    (tmp_path / f"events.out.tfevents.{now + 3600}.host.99.0").unlink()
    (tmp_path / f"events.out.tfevents.{int(time.time())}.host.99.0").touch()
    wait_for_a_later_name(tmp_path)
    newest = max(int(path.name.split(".")[3]) for path in tmp_path.iterdir())
    assert int(time.time()) > newest


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # in TensorBoard's thread
def test_a_disk_that_is_full_ends_the_tracking_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from tensorboard.summary.writer.record_writer import RecordWriter

    written = RecordWriter.write

    def write(self: Any, content: bytes) -> None:
        if b"train_loss" in content:
            raise OSError(28, "No space left on device")
        written(self, content)

    monkeypatch.setattr(RecordWriter, "write", write)
    TrackedLoop().record(tmp_path / "run", 3, ["tensorboard"])
    assert str(read_run(tmp_path / "run").status) == "finished"
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: track: tensorboard failed (No space left on device)")
