"""The record of a finished epoch: what metrics.csv has a column for, in the file's order, and every layer's state."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from neq_cli.events import EpochRecord, LayerState
from neq_cli.freezing import Freezer, LayerFlops, Observation
from neq_cli.freezing.passed import Passed
from neq_cli.training.loop.running_epoch import RunningEpoch

_NOTHING = LayerFlops(0.0, 0.0, 0.0, 0.0)


@dataclass(frozen=True)
class Scores:
    """What an epoch came to: losses and metrics by name, NaN where not measured."""

    train: Mapping[str, float]
    test: Mapping[str, float]


def epoch_record(
    trained: RunningEpoch,
    scores: Scores,
    freezer: Freezer,
    *,
    place: Mapping[str, float | int],
    by_step: bool,
    epoch_seconds: float,
    probe_seconds: float,
    energy: Mapping[str, float],
) -> EpochRecord:
    """Return the record of the epoch that ``freezer.step()`` has just ended.

    ``place`` are columns that say where; ``by_step``: the learning rate changes within it; the last is told too;
    ``energy``: columns of what it took, none where that is not measured.
    """
    passed = passed_of(freezer)
    layers = layer_states(freezer, passed)
    metrics = {
        "epoch": trained.epoch,
        **place,
        "lr": trained.lr,
        **({"lr_last": trained.last_lr} if by_step else {}),
        **{f"train_{name}": value for name, value in scores.train.items()},
        **{f"test_{name}": value for name, value in scores.test.items()},
        **what_trained(layers, passed),
        "bytes_per_step": trained.bytes_sent / max(1, trained.steps),
        "images_per_second": trained.images / max(trained.train_seconds, 1e-9),
        "epoch_seconds": epoch_seconds,
        "probe_seconds": probe_seconds,
        "data_wait_seconds": trained.data_seconds,
        **energy,
    }
    return EpochRecord(trained.epoch, metrics, layers)


def passed_of(freezer: Freezer) -> Passed:
    """Return the epoch that ``freezer.step()`` has just ended."""
    assert freezer.passed is not None, "step() comes first"
    return freezer.passed


def what_trained(layers: tuple[LayerState, ...], passed: Passed) -> dict[str, float | int]:
    """Return the columns that tell how many neurons were frozen during the epoch, and what that cost."""
    return {
        "neurons": sum(layer.neurons for layer in layers),
        "frozen": sum(layer.frozen for layer in layers),
        "flops_paper": passed.flops.paper,
        "flops_executed": passed.flops.executed,
        "flops_paper_dense": passed.flops.paper_dense,
        "flops_executed_dense": passed.flops.executed_dense,
        "flops_forward": passed.flops.forward,
    }


def layer_states(freezer: Freezer, passed: Passed) -> tuple[LayerState, ...]:
    """Return every layer's state after the epoch, in forward order; one that joined just now trained wholly in it."""
    return tuple(
        _layer_state(
            name,
            freezer.layers[name].kind,
            passed.trained.get(name, torch.ones_like(observation.trainable)),
            observation,
            passed.flops.layers.get(name, _NOTHING),
        )
        for name, observation in passed.observations.items()
    )


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
