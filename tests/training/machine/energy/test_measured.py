"""Rows of a training against meters whose every reading is written down; interruptions, failures, several processes."""

from __future__ import annotations

import json
import math
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from neq_cli.errors import RecipeValueError
from neq_cli.events import EpochRecord, Pause
from neq_cli.recipe import Recipe
from neq_cli.training.loop.checkpoint import load_state, save_state
from neq_cli.training.loop.trainer import SAVE, STOP, Trainer
from neq_cli.training.machine.energy import measured as measuring
from neq_cli.training.machine.energy.measured import Energy, energy_of, measured
from neq_cli.training.machine.energy.meter import Meter, Unmeasured
from neq_cli.training.processes.joined import Processes
from neq_cli.training.session import prepare

CPU = torch.device("cpu")


def recipe(**changes: Any) -> Recipe:
    values = {
        "model": {"name": "resnet8", "kwargs": {"num_classes": 10, "in_channels": 1, "width": 4}},
        "data": {"name": "digits", "workers": 0, "probe_size": 1200},
        "epochs": 3,
        "batch_size": 64,
        "optimizer": {"name": "sgd", "lr": 0.1},
        "channels_last": False,
        "device": "cpu",
    }
    return Recipe.model_validate(values | changes)


def by_hand(*amounts: float | Exception) -> Meter:
    """A meter that has spent these amounts whenever it is asked again."""
    left: Iterator[float | Exception] = iter(amounts)

    def spent() -> float:
        amount = next(left)
        if isinstance(amount, Exception):
            raise amount
        return amount

    return Meter("cpu", "a meter by hand", spent)


def trainer_with(energy: Energy, **changes: Any) -> Trainer:
    trainer = prepare(recipe(**changes), "test").trainer
    trainer.energy = energy
    return trainer


def rows(trainer: Trainer) -> list[dict[str, float]]:
    return [dict(record.metrics) for record in trainer.run() if isinstance(record, EpochRecord)]


def test_a_row_is_what_was_spent_between_its_begin_and_its_end() -> None:
    # Two readings a row; what goes by between two rows, as checkpoints are written, is no row's, nor of its seconds.
    trainer = trainer_with(Energy([by_hand(1, 10, 100, 1e3, 1e4, 1e5), by_hand(*[0.5] * 6)], asked=True))
    found = rows(trainer)
    assert [row["joules"] for row in found] == [10.5, 1000.5, 100_000.5]
    assert all(list(row)[-1] == "joules" for row in found)


def test_grams_are_of_kilowatt_hours() -> None:
    trainer = trainer_with(Energy([by_hand(0, 3.6e6, 0, 7.2e6)], asked=True, grams_per_kwh=56), epochs=2)
    assert [list(row.items())[-2:] for row in rows(trainer)] == [
        [("joules", 3.6e6), ("co2_grams", 56.0)],
        [("joules", 7.2e6), ("co2_grams", 112.0)],
    ]


def test_observations_by_steps_are_rows_of_their_own() -> None:
    trainer = trainer_with(Energy([by_hand(*range(100))], asked=True), epochs=1, probe_every=1)
    found = rows(trainer)
    assert [(row["step"], row["joules"]) for row in found] == [(1, 1), (2, 3), (3, 5)]


def test_without_being_asked_for_nothing_is_read_or_told() -> None:
    trainer = trainer_with(Energy([by_hand()]), epochs=1)
    assert not {"joules", "co2_grams"} & rows(trainer)[0].keys()


def interrupted(trainer: Trainer, steps: int, path: Path) -> dict[str, Any]:
    """Train so many steps, and return what was saved where it was stopped."""
    trainer.wish = lambda: STOP if trainer.updates >= steps else 0
    for record in trainer.run():
        if isinstance(record, Pause):
            save_state(trainer.state_dict(), path)
            return dict(load_state(path))
    raise AssertionError("no pause")


def test_what_was_spent_before_an_interruption_counts(tmp_path: Path) -> None:
    begun = trainer_with(Energy([by_hand(1, 20)], asked=True), epochs=1)
    state = interrupted(begun, 2, tmp_path / "last")
    resumed = trainer_with(Energy([by_hand(4, 700)], asked=True), epochs=1)
    resumed.load_state_dict(state)
    assert [row["joules"] for row in rows(resumed)] == [720]


def test_a_checkpoint_within_a_row_is_counted_once() -> None:
    trainer = trainer_with(Energy([by_hand(1, 20, 700)], asked=True), epochs=1)
    wishes = iter([SAVE, 0, 0])
    trainer.wish = lambda: next(wishes)
    assert [row["joules"] for row in rows(trainer)] == [720]


def test_a_row_that_was_measured_in_part_is_not_known(tmp_path: Path) -> None:
    begun = trainer_with(Energy(), epochs=1)
    state = interrupted(begun, 2, tmp_path / "last")
    resumed = trainer_with(Energy([by_hand(4, 700, 5, 6)], asked=True), epochs=2)
    resumed.load_state_dict(state)
    first, second = rows(resumed)
    assert (math.isnan(first["joules"]), second["joules"]) == (True, 6)


def test_a_meter_that_fails_leaves_empty_cells_and_one_note() -> None:
    energy = Energy([by_hand(1, 10, 100, OSError("gone\nfor good"))], asked=True, grams_per_kwh=1)
    trainer = trainer_with(energy)
    told, found = [], []
    for record in trainer.run():
        if isinstance(record, EpochRecord):
            found.append(dict(record.metrics))
            told.append(energy.failure_note(f"epoch {record.epoch}"))
    assert len(found) == 3
    assert found[0]["joules"] == 10
    assert all(math.isnan(row["joules"]) and math.isnan(row["co2_grams"]) for row in found[1:])
    failed = "energy: a meter by hand failed (OSError: gone) in epoch 2; its joules, and all after it, are not known"
    assert told == [None, failed, None]


@pytest.fixture
def sources(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Put these in the place of what the machine has; None: it cannot be measured."""

    def put(
        cpu: Meter | None, gpu: Meter | None = None, card: str | None = None, estimate: Meter | None = None
    ) -> None:
        def opened(meter: Meter | None, why: str) -> Meter:
            if meter is None:
                raise Unmeasured(why)
            return meter

        def estimated(why: str) -> Meter:
            assert estimate is not None, "nothing is to be estimated"
            assert why == ("no card; no counters" if card else "no counters")
            return estimate

        monkeypatch.setattr(measuring, "rapl_meter", lambda folder: opened(cpu, "no counters"))
        monkeypatch.setattr(measuring, "nvml_meter", lambda card: opened(gpu, "no card"))
        monkeypatch.setattr(measuring, "card_of", lambda device: card)
        monkeypatch.setattr(measuring, "estimating_meter", estimated)

    return put


def meter_of(source: str, how: str) -> Meter:
    return Meter(source, how, lambda: 1.0)


def test_how_it_is_taken_is_told(sources: Callable[..., None]) -> None:
    sources(meter_of("cpu", "RAPL package-0"), meter_of("gpu", "NVML total energy, A"), "GPU-a")
    energy = measured(CPU, Processes(), 56)
    how = {"gpu": "NVML total energy, A", "cpu": "RAPL package-0"}
    assert energy.environment == {"energy": {**how, "grams_per_kwh": 56}}
    assert energy.notes == (
        "energy: gpu: NVML total energy, A; cpu: RAPL package-0; of whole processors and cards, with what other "
        "programs do on them",
    )
    energy.begin()
    assert energy.lap() == 2


def test_without_a_card_the_processor_alone_counts(sources: Callable[..., None]) -> None:
    sources(meter_of("cpu", "RAPL package-0"))
    energy = measured(CPU, Processes(), None)
    assert energy.environment == {"energy": {"gpu": "not used", "cpu": "RAPL package-0"}}


def test_a_source_that_is_not_there_is_told_and_not_estimated(sources: Callable[..., None]) -> None:
    sources(None, meter_of("gpu", "NVML total energy, A"), "GPU-a")
    energy = measured(CPU, Processes(), None)
    assert energy.environment == {"energy": {"gpu": "NVML total energy, A", "cpu": "not measured"}}
    assert energy.notes[1:] == ("energy: cpu is not measured: no counters",)


def test_where_nothing_is_measured_it_is_estimated(sources: Callable[..., None]) -> None:
    sources(None, None, "GPU-a", meter_of("cpu", "an estimate"))
    energy = measured(CPU, Processes(), None)
    assert energy.environment == {"energy": {"gpu": "not measured", "cpu": "an estimate"}}
    estimated, missing = energy.notes[1:]
    assert estimated == "energy: estimated, as nothing measures it here: no counters"
    assert missing == "energy: gpu is not measured: no card"


def test_what_is_missing_is_the_keys_mistake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(measuring, "DOMAINS", tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "codecarbon", None)
    with pytest.raises(RecipeValueError, match=r"^energy: nothing here measures it: no RAPL package .* pip install"):
        energy_of(recipe(energy=True), CPU, Processes())
    assert not energy_of(recipe(), CPU, Processes()).asked


TWO = """
import neq_cli.training.machine.energy.measured as measuring
from neq_cli.training.machine.energy.meter import Meter
import os
rank = int(os.environ["RANK"])
cards = {cards}
measuring.rapl_meter = lambda folder: Meter("cpu", "RAPL of one machine", lambda: 1.0)
measuring.card_of = lambda device: cards[rank]
measuring.nvml_meter = lambda card: Meter("gpu", f"NVML, {{card[:1]}}", lambda: {{"A1": 10.0, "A2": 200.0}}[card])
if {fails} and rank == 1:
    answers = iter([200.0] * 3)
    measuring.nvml_meter = lambda card: Meter("gpu", "NVML, A", lambda: next(answers))
"""


@pytest.mark.parametrize(
    ("cards", "fails", "joules", "how"),
    [
        # Each process its card, the first one the processor of the machine that both are on.
        (["A1", "A2"], False, ["211.0", "211.0"], {"gpu": "2 x NVML, A", "cpu": "RAPL of one machine"}),
        (["A1", "A1"], False, ["11.0", "11.0"], {"gpu": "NVML, A", "cpu": "RAPL of one machine"}),
        (["A1", "A2"], True, ["211.0", ""], {"gpu": "2 x NVML, A", "cpu": "RAPL of one machine"}),
    ],
    ids=["a card each", "a card shared", "the other's fails"],
)
def test_of_two_processes_the_sum_is_told(
    neq: Callable[..., Any], tmp_path: Path, cards: list[str], fails: bool, joules: list[str], how: dict[str, str]
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    path = tmp_path / "small.yaml"
    path.write_text(json.dumps(recipe(epochs=2, energy=True).model_dump(exclude_unset=True)))
    before = TWO.format(cards=cards, fails=fails)
    world = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    both = [
        neq("train", path, "-o", "run", before=before, environment={**world, "RANK": rank, "LOCAL_RANK": rank})
        for rank in "01"
    ]
    for process in both:
        assert process.wait() == 0, process.text
    header, *lines = [line.split(",") for line in (tmp_path / "run" / "metrics.csv").read_text().splitlines()]
    assert [line[header.index("joules")] for line in lines] == joules
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert environment["energy"] == how
    failed = "energy: the meter of another process failed in epoch 2; its joules, and all after it, are not known"
    assert (failed in environment["notes"]) == fails
    assert os.path.lexists(tmp_path / "run" / "weights.safetensors")
