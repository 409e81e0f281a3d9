"""A callback for Lightning's Trainer: freezes, records, resumes from its checkpoints; parameters in pieces are refused.

`lightning` or `pytorch_lightning`, whichever the program uses, is imported with this module and by no other.
"""

from __future__ import annotations

import copy
import importlib
import math
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from neq_cli.errors import FreezingError, NeqError, Terminated, one_line
from neq_cli.freezing import Freezer, NEq, Policy
from neq_cli.freezing.backward.dispatch import Dispatch
from neq_cli.freezing.backward.sliced import BackwardMode
from neq_cli.freezing.rows.optimizers import largest_learning_rate
from neq_cli.integrations.lightning_checks import check_arguments, check_trainer
from neq_cli.integrations.logged import LoggedMetrics, lower_is_better
from neq_cli.jobs.recorder import Recorder


def _callback_class() -> Any:
    """Return the Callback of the package that the program uses: what it has imported, else what is installed."""
    packages = sorted(("lightning", "pytorch_lightning"), key=lambda name: name not in sys.modules)
    for package in packages:
        try:
            return importlib.import_module("lightning.pytorch" if package == "lightning" else package).Callback
        except ModuleNotFoundError as error:
            if error.name not in ("lightning", "lightning.pytorch", "pytorch_lightning"):
                raise
    raise ImportError("neq_cli.integrations.lightning needs Lightning; pip install 'neq[lightning]'")


if TYPE_CHECKING:
    Callback = object
else:
    Callback = _callback_class()


class NEqCallback(Callback):
    """Stops updating neurons at equilibrium while Lightning's Trainer trains, one Freezer for each optimiser.

    ``probe``: held-out batches, inputs or (inputs, targets...), that the module's ``forward`` is called with; the same
    in every process, which share them out, and each time they are iterated. ``policy`` and ``backward`` are the
    Freezer's, as are the further options ``call``, ``exclude``, ``probe_autocast``, ``probe_snapshot``, ``row_wise``
    and ``sample``. ``every``: "epoch" observes at the end of each training epoch, a number after so many optimiser
    steps (``trainer.global_step``), at the end of the batch in which they are reached.

    ``run_directory``: a row is recorded there at each observation, for `neq inspect`, `compare` and `report`; with
    several optimisers in folders optimizer_0, optimizer_1... of it. Columns are ``step``, ``passed_epochs`` and the
    metrics logged by the first observation, or in the sanity check: a metric that was not logged since the observation
    before is an empty cell. What the module logs in its own ``on_train_epoch_end`` comes too late. ``metric``, by
    which the run is judged, is the sanity check's first unless given, "train_loss" where there was none;
    ``lower_is_better`` unless given where its name has "loss", "error" or "perplexity". ``name`` (the module's class),
    ``seed`` (that of ``seed_everything``) and ``settings`` are the Recorder's.

    Made when training starts, after optimisers and checkpoints are loaded, and detached when it ends; ``freezers``
    holds them. Kernels are timed, but chosen by rule under ``Trainer(deterministic=True)`` and several processes, so
    that a run gone on with by ``trainer.fit(ckpt_path=...)`` is the uninterrupted one, bit for bit, where it is saved
    at the end of an epoch, or the data goes on in its middle. A ``fit`` without a checkpoint starts anew.

    Raises FreezingError, before training starts, for what cannot work.
    """

    _loaded: dict[str, Any] | None
    _kept: dict[str, Any] | None

    def __init__(
        self,
        probe: Iterable[Any] | None = None,
        policy: Policy | None = None,
        backward: BackwardMode = "exact",
        every: Literal["epoch"] | int = "epoch",
        run_directory: str | Path | None = None,
        *,
        name: str | None = None,
        metric: str | None = None,
        lower_is_better: bool | None = None,
        seed: int | None = None,
        settings: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        check_arguments(probe, every, options)
        self.probe: Any = probe
        self.policy: Policy = NEq() if policy is None else policy
        self.backward: BackwardMode = backward
        self.every = every
        self.run_directory = None if run_directory is None else Path(run_directory)
        self.metric, self.lower_is_better = metric, lower_is_better
        self.name, self.seed, self.settings = name, seed, settings
        self._options = options
        self._begin()

    @property
    def freezers(self) -> list[Freezer]:
        """One for each of the Trainer's optimisers, in their order; none before training starts."""
        return [watch.freezer for watch in self._watches]

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Refuse what cannot work."""
        if stage == "fit":
            check_trainer(trainer, pl_module, NEqCallback)
            self._begin()

    def on_sanity_check_end(self, trainer: Any, pl_module: Any) -> None:
        """Take down which metrics validation logs, which are columns from the first row on."""
        self._logged.expect(trainer.callback_metrics)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Look at the model; hold what was frozen when the checkpoint was saved."""
        optimizers = [one for one in trainer.optimizers if isinstance(one, torch.optim.Optimizer) and one.param_groups]
        state = self._loaded
        if not optimizers:
            raise FreezingError("NEqCallback: configure_optimizers returns no optimiser, so that nothing trains")
        if state is not None and len(state["freezers"]) != len(optimizers):
            told = f"{len(state['freezers'])} optimisers, the module has {len(optimizers)}"
            raise FreezingError(f"NEqCallback: the checkpoint is of {told}; load one that this module saved")
        if state is not None:
            self._logged.load_state_dict(state["logged"])
        for number, optimizer in enumerate(optimizers):
            watch = _Watch(self._freezer(trainer, optimizer), largest_learning_rate(optimizer))
            self._watches.append(watch)
            if state is not None:
                watch.freezer.dispatch.load_state_dict(state["dispatch"][number])
                watch.freezer.load_state_dict(state["freezers"][number])
                watch.learning_rate = state["learning_rates"][number]
            if self.run_directory is not None:
                path = self.run_directory / f"optimizer_{number}" if len(optimizers) > 1 else self.run_directory
                watch.recorder = self._recorder(watch.freezer, path, type(pl_module).__name__)
        self._reached, self._training = self._due(trainer), True

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Take down the learning rates, which schedulers have changed when the epoch ends."""
        if self.every == "epoch":
            self._look_at_learning_rates()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Hold frozen rows at what others made of them between epochs, as StochasticWeightAveraging does at the end."""
        if batch_idx == 0:
            for freezer in self.freezers:
                freezer.hold.keeper.forget()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Observe where ``every`` further steps have been made."""
        # A step of each of several optimisers counts: a multiple may be passed by.
        if self.every != "epoch" and self._due(trainer) > self._reached:
            self._reached = self._due(trainer)
            batches = trainer.num_training_batches  # infinity where the data set has no length
            share = (batch_idx + 1) / batches if batches < float("inf") else float("nan")
            self._observe(trainer, trainer.current_epoch + share)
            self._look_at_learning_rates()

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Observe at the end of an epoch, before a checkpoint is saved."""
        if self.every == "epoch":
            self._observe(trainer, trainer.current_epoch + 1)
        else:
            self._look_at_metrics(trainer)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Take down what was logged, which a checkpoint saved now has to hold."""
        if self._training:  # not in the sanity check
            self._look_at_metrics(trainer)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Put model and optimisers back as they were; the run is finished."""
        self._end(None)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Put model and optimisers back as they were; the run tells why it ended."""
        # Of Lightning's own, by name: that the process was asked to end is no failure.
        asked = type(exception).__name__ == "SIGTERMException"
        self._end(Terminated("SIGTERM") if asked else exception)

    def state_dict(self) -> dict[str, Any]:
        """Return all that further observations depend on: tensors and plain values, in dictionaries and lists."""
        if not self._training:
            return self._kept or self._loaded or {}
        return {
            "freezers": [freezer.state_dict() for freezer in self.freezers],
            "dispatch": [freezer.dispatch.state_dict() for freezer in self.freezers],
            "learning_rates": [watch.learning_rate for watch in self._watches],
            "logged": self._logged.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state for ``on_train_start``: Lightning loads callbacks before it loads optimisers."""
        self._loaded = state_dict

    def _begin(self) -> None:
        self._watches: list[_Watch] = []
        self._logged = LoggedMetrics(self.metric)
        self._reached = 0  # multiples of `every`
        self._training = False
        self._loaded = None
        self._kept = None  # the state at the end of training, for what is saved later

    def _freezer(self, trainer: Any, optimizer: torch.optim.Optimizer) -> Freezer:
        several = trainer.world_size > 1
        try:
            return Freezer(
                trainer.strategy.model,  # within DistributedDataParallel where that trains
                optimizer,
                _Share(self.probe, trainer.global_rank, trainer.world_size, trainer.precision_plugin.convert_input),
                copy.deepcopy(self.policy),  # which has a state, of one run and optimiser
                backward=self.backward,
                dispatch=Dispatch(fixed=several or torch.are_deterministic_algorithms_enabled()),
                process_group=torch.distributed.group.WORLD if several else None,
                **self._options,
            )
        except NeqError:
            raise
        except Exception as error:  # of the module's own forward
            mend = "its items are what forward takes, else give call=lambda module, item: ..."
            raise FreezingError(f"NEqCallback: probe: the module fails on it ({one_line(error)}); {mend}") from error

    def _recorder(self, freezer: Freezer, path: Path, module: str) -> Recorder:
        metric, lower, seed = self._logged.judged_by(), self.lower_is_better, self.seed
        if seed is None and os.environ.get("PL_GLOBAL_SEED", "").isdecimal():
            seed = int(os.environ["PL_GLOBAL_SEED"])  # where seed_everything leaves it
        return Recorder(
            freezer,
            path,
            name=self.name or module,
            metric=metric,
            seed=seed,
            settings=self.settings,
            lower_is_better=lower_is_better(metric) if lower is None else lower,
            resume=self._loaded is not None,
        )

    def _due(self, trainer: Any) -> int:
        return 0 if isinstance(self.every, str) else trainer.global_step // self.every

    def _look_at_learning_rates(self) -> None:
        for watch in self._watches:
            watch.learning_rate = largest_learning_rate(watch.freezer.optimizer)

    def _look_at_metrics(self, trainer: Any) -> None:
        if self.run_directory is not None:
            self._logged.look(trainer.callback_metrics)

    def _observe(self, trainer: Any, passed_epochs: float) -> None:
        for watch in self._watches:
            watch.freezer.step()
        if self.run_directory is None:
            return
        # In all processes, since Lightning may reduce what is logged over all of them.
        metrics = self._logged.row(trainer.callback_metrics)
        place = {"step": trainer.global_step, "passed_epochs": passed_epochs}
        for watch in self._watches:
            if watch.recorder is not None:
                watch.recorder.epoch(lr=watch.learning_rate, **place, **metrics)
                if watch.freezer.epoch == 1 and math.isnan(metrics[watch.recorder.metric]):
                    told = ", ".join(name for name in metrics if not math.isnan(metrics[name])) or "nothing"
                    judged = f"metric: {watch.recorder.metric!r}, which the run is judged by"
                    watch.recorder.note(f"{judged}, was not logged by the first observation; {told} was")

    def _end(self, error: BaseException | None) -> None:
        if self._training:
            # Copies: some of its tensors are the model's own, which others may change from now on.
            self._kept, self._training = copy.deepcopy(self.state_dict()), False
        for watch in self._watches:
            if watch.recorder is not None:
                watch.recorder.__exit__(None if error is None else type(error), error, None)
                watch.recorder = None
            watch.freezer.detach()


@dataclass
class _Watch:
    """What belongs to one optimiser; ``learning_rate`` is that with which the time up to the next row began."""

    freezer: Freezer
    learning_rate: float
    recorder: Recorder | None = None


@dataclass(frozen=True)
class _Share:
    """One process's share of the probe, in the precision that the Trainer gives its model."""

    items: Iterable[Any]
    process: int
    processes: int
    convert: Any

    def __iter__(self) -> Iterator[Any]:
        return map(self.convert, islice(self.items, self.process, None, self.processes))
