"""All that the rest of a run depends on, taken out of a trainer and put into another, on any number of processes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from neq_cli.training.loop.checkpoint import random_states, restore_formats, restore_random_states
from neq_cli.training.loop.running_epoch import RunningEpoch

if TYPE_CHECKING:
    from neq_cli.training.loop.trainer import Trainer


def state_of(trainer: Trainer) -> dict[str, Any]:
    """See ``Trainer.state_dict``."""
    averaged, so_far = trainer.step.averaged, trainer.so_far
    own = {"random": random_states(), "totals": None if so_far is None else so_far.totals.cpu()}
    return {
        "epoch": trainer.epoch,
        "passes": trainer.passes,
        "updates": trainer.updates,
        "model": trainer.model.state_dict(),
        "averaged": averaged.state_dict() if averaged is not None else None,
        "optimizer": trainer.optimizer.state_dict(),
        "scheduler": trainer.schedule.state_dict(),
        "scaler": trainer.step.scaler.state_dict(),
        "freezer": trainer.freezer.state_dict(),
        "so_far": None if so_far is None else so_far.to_plain(),
        "stream": None if so_far is None else trainer.loaders.position(so_far.pass_images),  # plain numbers
        "processes": trainer.processes.gathered(own),
    }


def restore(trainer: Trainer, state: Mapping[str, Any]) -> None:
    """See ``Trainer.load_state_dict``."""
    if trainer.divided is not None:
        state = trainer.divided.state(state, trainer.model, trainer.optimizer)
    trainer.epoch = int(state["epoch"])
    trainer.passes, trainer.updates = int(state["passes"]), int(state["updates"])
    trainer.batches = None
    trainer.model.load_state_dict(state["model"])
    if trainer.step.averaged is not None:
        trainer.step.averaged.load_state_dict(state["averaged"])
    trainer.optimizer.load_state_dict(state["optimizer"])
    restore_formats(trainer.optimizer)
    trainer.schedule.load_state_dict(state["scheduler"])
    trainer.step.scaler.load_state_dict(state["scaler"])
    trainer.freezer.load_state_dict(state["freezer"])
    own = state["processes"]
    trainer.so_far = None
    if state["so_far"] is not None:
        trainer.so_far = RunningEpoch(totals=_own_totals(trainer, own), **state["so_far"])
        trainer.loaders.go_on_at(state.get("stream"))  # which runs of earlier versions lack, and can do without
    if trainer.processes.rank < len(own):  # else it goes on with the numbers of its own seed
        restore_random_states(own[trainer.processes.rank]["random"])


def _own_totals(trainer: Trainer, by_process: list[Mapping[str, Any]]) -> Tensor:
    totals = trainer.task.new_totals(trainer.device)
    saved = [one["totals"] for one in by_process]
    if len(saved) == trainer.processes.count:
        return totals.copy_(saved[trainer.processes.rank])
    return totals.copy_(torch.stack(saved).sum(0)) if trainer.processes.first else totals
