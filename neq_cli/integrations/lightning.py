"""A callback for Lightning's Trainer: freezes, records, resumes from its checkpoints; not for parameters in pieces."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from neq_cli.errors import FreezingError, Terminated
from neq_cli.freezing import Freezer, NEq, Policy
from neq_cli.freezing.backward.sliced import BackwardMode
from neq_cli.freezing.rows.optimizers import largest_learning_rate
from neq_cli.integrations.earlier_run import goes_on
from neq_cli.integrations.lightning_checks import check_arguments, check_trainer
from neq_cli.integrations.lightning_package import callback_class
from neq_cli.integrations.lightning_watch import Watch, freezer_of, probe_of, seed_everywhere
from neq_cli.integrations.logged import LoggedMetrics, lower_is_better
from neq_cli.jobs.recorder import Recorder

if TYPE_CHECKING:
    Callback = object
else:
    Callback = callback_class()

_HOW = "trainer.fit(ckpt_path=...)"


class NEqCallback(Callback):
    """Stops updating neurons at equilibrium while Lightning's Trainer trains, one Freezer for each optimiser.

    ``probe``: held-out batches, inputs or (inputs, targets...), that the module's ``forward`` is called with; the same
    in every process, which share them out, and each time they are iterated; or a function that is given the Trainer
    when training starts, whose data it may need, and returns them. ``policy`` and ``backward`` are the Freezer's, as
    are the further options ``call``, ``compiled``, ``exclude``, ``probe_autocast``, ``probe_snapshot``, ``row_wise``
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
    at the end of an epoch, or the data goes on in its middle. A ``fit`` without a checkpoint starts anew, in a run
    directory of its own; with ``begin_anew`` also in that of a run which is not finished, whose rows it removes: what
    was killed before its first checkpoint. A checkpoint that was saved without this callback is refused, unless
    ``begin_anew``: then everything trains from there, in a run directory of its own.

    Raises FreezingError, before training starts, for what cannot work.
    """

    state_key: str  # Lightning's name for it in checkpoints
    _loaded: dict[str, Any] | None
    _kept: dict[str, Any] | None

    def __init__(
        self,
        # object: so that LightningCLI makes one of any class that a configuration names
        probe: Iterable[Any] | Callable[[Any], Iterable[Any]] | object = None,
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
        begin_anew: bool = False,
        **options: Any,
    ) -> None:
        check_arguments(probe, every, options)
        self.probe = probe
        self.policy: Policy = NEq() if policy is None else policy
        self.backward: BackwardMode = backward
        self.every = every
        self.run_directory = None if run_directory is None else Path(run_directory)
        self.metric, self.lower_is_better = metric, lower_is_better
        self.name, self.seed, self.settings = name, seed, settings
        self.begin_anew = begin_anew
        self._options = options
        self._begin()

    @property
    def freezers(self) -> list[Freezer]:
        """One for each of the Trainer's optimisers, in their order; none before training starts."""
        return [watch.freezer for watch in self._watches]

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Refuse what cannot work."""
        if stage == "fit":
            check_trainer(trainer, NEqCallback)
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
        probe = probe_of(self.probe, trainer)
        for number, optimizer in enumerate(optimizers):
            freezer = freezer_of(trainer, pl_module, optimizer, probe, self.policy, self.backward, **self._options)
            watch = Watch(freezer, largest_learning_rate(optimizer))
            self._watches.append(watch)
            if state is not None:
                watch.freezer.dispatch.load_state_dict(state["dispatch"][number])
                watch.freezer.load_state_dict(state["freezers"][number])
                watch.learning_rate = state["learning_rates"][number]
            if self._foreign:
                freezer.notes.append(f"step {trainer.global_step}: the checkpoint has no state of neq; all trains anew")
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

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: Mapping[str, Any]) -> None:
        """Refuse a checkpoint without a state of this callback, unless everything may begin anew there."""
        self._foreign = trainer.state.fn == "fit" and self.state_key not in checkpoint["callbacks"]
        if self._foreign and not self.begin_anew:
            raise FreezingError(
                "NEqCallback: the checkpoint was saved without it, and does not say what was frozen; fit from one that "
                "was saved with it, or give begin_anew=True, with which everything trains from there"
            )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state for ``on_train_start``: Lightning loads callbacks before it loads optimisers."""
        self._loaded = state_dict

    def _begin(self) -> None:
        self._watches: list[Watch] = []
        self._logged = LoggedMetrics(self.metric)
        self._reached = 0  # multiples of `every`
        self._training = False
        self._loaded = None
        self._foreign = False  # what is gone on with was saved without this callback
        self._kept = None  # the state at the end of training, for what is saved later

    def _recorder(self, freezer: Freezer, path: Path, module: str) -> Recorder:
        metric, lower = self._logged.judged_by(), self.lower_is_better
        begin_anew = self.begin_anew and not self._foreign  # rows of the steps before would be missing
        return Recorder(
            freezer,
            path,
            name=self.name or module,
            metric=metric,
            seed=seed_everywhere() if self.seed is None else self.seed,
            settings=self.settings,
            lower_is_better=lower_is_better(metric) if lower is None else lower,
            resume=goes_on(path, loaded=self._loaded is not None, begin_anew=begin_anew, how=_HOW),
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
