"""The record of a finished epoch: what metrics.csv has a column for, in the file's order, and every layer's state."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from neq_cli.events import EpochRecord, LayerState
from neq_cli.freezing import Freezer, LayerFlops, Observation
from neq_cli.freezing.flops import Flops
from neq_cli.training.loop.running_epoch import RunningEpoch


@dataclass(frozen=True)
class Scores:
    """What an epoch was trained with and came to; losses and metrics by name, NaN where not measured."""

    learning_rate: float
    train: Mapping[str, float]
    test: Mapping[str, float]


def epoch_record(
    trained: RunningEpoch,
    scores: Scores,
    freezer: Freezer,
    observations: Mapping[str, Observation],
    in_force: Mapping[str, Tensor],
    flops: Flops,
    *,
    epoch_seconds: float,
    probe_seconds: float,
) -> EpochRecord:
    """Return the record of the epoch that ``freezer.step()`` has just ended, with these ``observations``.

    ``in_force``: the sets by layer (bool, [neurons]) that the epoch trained with, and ``flops`` what it cost with them.
    """
    layers = tuple(
        _layer_state(name, freezer.layers[name].kind, in_force[name], observation, flops.layers[name])
        for name, observation in observations.items()
    )
    metrics = {
        "epoch": trained.epoch,
        "lr": scores.learning_rate,
        **{f"train_{name}": value for name, value in scores.train.items()},
        **{f"test_{name}": value for name, value in scores.test.items()},
        "neurons": sum(layer.neurons for layer in layers),
        "frozen": sum(layer.frozen for layer in layers),
        "flops_paper": flops.paper,
        "flops_executed": flops.executed,
        "flops_paper_dense": flops.paper_dense,
        "flops_executed_dense": flops.executed_dense,
        "flops_forward": flops.forward,
        "bytes_per_step": trained.bytes_sent / max(1, trained.steps),
        "images_per_second": trained.images / max(trained.train_seconds, 1e-9),
        "epoch_seconds": epoch_seconds,
        "probe_seconds": probe_seconds,
    }
    return EpochRecord(trained.epoch, metrics, layers)


def _layer_state(name: str, kind: str, trained: Tensor, observation: Observation, flops: LayerFlops) -> LayerState:
    return LayerState(
        name=name,
        kind=kind,
        phi=observation.phi.numpy(),
        delta_phi=observation.delta_phi.numpy(),
        velocity=observation.velocity.numpy(),
        trained=trained.numpy(),
        trainable=observation.trainable.numpy(),
        flops_paper=flops.paper,
        flops_executed=flops.executed,
    )
