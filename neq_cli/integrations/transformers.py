"""NEqCallback freezes neurons in transformers' Trainer and Seq2SeqTrainer; not under FSDP or DeepSpeed.

The Trainer observes its own course after its callbacks: what it logs and evaluates at a step comes after the step's
hook. So an observation is a row of the run directory once the next step begins, or a checkpoint is saved.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from neq_cli.errors import FreezingError, TrainingError, did_you_mean
from neq_cli.freezing import Freezer, NEq, Observation, Policy
from neq_cli.freezing.backward.sliced import BackwardMode
from neq_cli.freezing.rows.optimizers import largest_learning_rate, unwrap_optimizer
from neq_cli.integrations.earlier_run import goes_on
from neq_cli.integrations.held_places import BROKEN_OFF, check_alone, give_back, let_go_of, record_at, take
from neq_cli.integrations.probe_rows import check_batches, check_probe, columns_taken, ready_batches
from neq_cli.integrations.trainer_arguments import check_arguments, evaluates, judged_by, settings_of
from neq_cli.integrations.trainer_files import fingerprint, load_into, save_beside
from neq_cli.integrations.trainer_freezer import freezer_of
from neq_cli.integrations.trainer_rows import Rows
from neq_cli.jobs.recorder import Recorder

try:
    from transformers import TrainerCallback
    from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
except ImportError as error:
    raise ImportError(
        f"NEqCallback needs transformers and accelerate ({error}): pip install 'neq[transformers]'"
    ) from error

_OWN_OPTIONS = {"model", "optimizer", "probe_loader", "policy", "backward", "wrapped", "process_group"}
_FREEZER_OPTIONS = inspect.signature(Freezer).parameters.keys() - _OWN_OPTIONS
_HOW = "trainer.train(resume_from_checkpoint=...)"


class NEqCallback(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Observes every neuron after each epoch, or every so many optimiser steps, and freezes what a policy chooses.

    ``probe``: held-out rows as train_dataset's are, put together by the trainer's data collator, or ``data_collator``,
    ``batch_size`` at a time; with ``batch_size=None`` a list of ready batches. Several processes share the batches.
    ``every``: "epoch", or a number of optimiser steps. ``freezer_options`` go to the Freezer: ``exclude``, ``dispatch``
    (several processes choose kernels by rule), ``probe_snapshot``, ``call`` and so on.

    ``run_directory`` records each observation as a row with the columns ``step``, ``passed_epochs`` and ``lr``, and
    what the trainer logged (``train_loss``) and evaluated since the row before. ``columns`` names what evaluation tells
    later than in the first row. ``metric`` is the column that judges the model, by default the trainer's
    metric_for_best_model, else eval_loss where it evaluates, else train_loss; ``lower_is_better`` by default where it
    ends in "loss", or as greater_is_better says. ``name`` (default: the model's class) and ``settings``, beside the
    main training arguments, tell runs apart.

    Checkpoints hold neq.safetensors and neq.json; a trainer that resumes finds them in ``output_dir``, or in
    ``checkpoint`` where it resumes from elsewhere. One without them is refused, unless ``begin_anew``: then everything
    trains and phi compares with the weights of that moment. With it, what trains from no checkpoint is also recorded in
    the ``run_directory`` of a run that is not finished, whose rows it removes: one that was killed before its first
    checkpoint. When training ends, ``freezer`` is detached and ``observations`` are the last ones.

    Raises FreezingError, one line, before training begins.
    """

    def __init__(
        self,
        probe: Any = None,
        policy: Policy | None = None,
        *,
        backward: BackwardMode = "exact",
        every: Literal["epoch"] | int = "epoch",
        run_directory: str | Path | None = None,
        batch_size: int | None = 8,
        data_collator: Callable[[list[Any]], Any] | None = None,
        name: str | None = None,
        settings: Mapping[str, Any] | None = None,
        metric: str | None = None,
        lower_is_better: bool | None = None,
        columns: Sequence[str] = (),
        checkpoint: str | Path | None = None,
        begin_anew: bool = False,
        **freezer_options: Any,
    ) -> None:
        if every != "epoch" and (type(every) is not int or every < 1):
            raise FreezingError(f'every: {every!r} is neither "epoch" nor a positive whole number of optimiser steps')
        for option in freezer_options.keys() - _FREEZER_OPTIONS:
            hint = did_you_mean(option, _FREEZER_OPTIONS) or f"; there are {', '.join(sorted(_FREEZER_OPTIONS))}"
            raise FreezingError(f"NEqCallback: no option {option!r}{hint}")
        check_probe(probe, batch_size)
        self.probe, self.batch_size, self.data_collator = probe, batch_size, data_collator
        self.policy: Policy = NEq() if policy is None else policy
        self.backward: BackwardMode = backward
        self.every: Literal["epoch"] | int = every
        self.run_directory, self.name, self.settings = run_directory, name, settings
        self.metric, self.lower_is_better, self.columns = metric, lower_is_better, columns
        self.checkpoint, self.begin_anew = checkpoint, begin_anew
        self.freezer_options = freezer_options
        self.freezer: Freezer | None = None
        self.observations: dict[str, Observation] = {}
        self._observed = 0  # the step of the last observation
        self._learning_rate = float("nan")  # of the last optimiser step
        self._rows: Rows | None = None
        self._unended: weakref.finalize[..., Any] | None = None

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Refuse what cannot work when the Trainer is made."""
        check_arguments(args)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Make the Freezer, with the state of the checkpoint that the trainer resumes from."""
        check_arguments(args)
        if state.is_hyper_param_search:
            raise FreezingError(
                "NEqCallback: a hyperparameter search trains many models; give each a trainer of its own"
            )
        self.end(TrainingError(BROKEN_OFF))  # if there was one
        model, optimizer = kwargs["model"], unwrap_optimizer(kwargs["optimizer"])
        check_alone(optimizer)
        try:
            self._begin(args, state, model, kwargs["optimizer"], kwargs["train_dataloader"])
        except BaseException as error:
            self.end(error)
            raise
        take(optimizer, self)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep the learning rate of the step: the scheduler moves on before the step's end is told."""
        self._learning_rate = largest_learning_rate(kwargs["optimizer"])

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the row of the observation before, now that all is logged and evaluated."""
        self._write_row(state)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Observe after every so many steps; at the end of an epoch with that epoch's own hook."""
        if self.every != "epoch" and self._is_due(state) and not _ends_epoch(state):
            self._observe(state)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Observe after the epoch."""
        if self._observed < state.global_step and (self.every == "epoch" or self._is_due(state)):
            self._observe(state)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Put the state into the checkpoint that the trainer has just written."""
        self._write_row(state)
        if self.freezer is None or not args.should_save:
            return
        values = {
            "step": state.global_step,
            "observed": self._observed,
            "lr": self._learning_rate,
            "weights": fingerprint(self.freezer.model),
            "dispatch": self.freezer.dispatch.state_dict(),
            "columns": self._rows.columns if self._rows else [],
            "late": self._rows.late if self._rows else [],
        }
        save_beside(_folder(args, state), self.freezer.state_dict(), values)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the last row, end the run and put model and optimiser back as they were."""
        self._write_row(state)
        self.end()

    def _begin(self, args: Any, state: Any, model: Any, optimizer: Any, train_dataloader: Any) -> None:
        kept = columns_taken(model, args.label_names or ()) if args.remove_unused_columns else None
        collate = self.data_collator or train_dataloader.collate_fn
        batches = ready_batches(model, self.probe, self.batch_size, collate, kept, args.seed)
        if "call" not in self.freezer_options:
            check_batches(batches)
        self.freezer = freezer_of(args, model, optimizer, batches, self.policy, self.backward, self.freezer_options)
        self._observed, self.observations = 0, {}
        found: dict[str, Any] = {}
        if state.global_step:
            folder = Path(self.checkpoint) if self.checkpoint is not None else _folder(args, state)
            found = load_into(self.freezer, folder, begin_anew=self.begin_anew, step=state.global_step)
            self._observed = found.get("observed", state.global_step)
            self._learning_rate = found.get("lr", self._learning_rate)
        if self.run_directory is not None:
            path = Path(self.run_directory)
            anew = self.begin_anew and not state.global_step
            if found or anew:
                let_go_of(path.resolve())
            resume = goes_on(path, loaded=bool(found), begin_anew=anew, how=_HOW)
            self._rows = self._record(self.freezer, args, found, path, resume=resume)
            self._unended = record_at(path.resolve(), self, self._rows.recorder)
        # A checkpoint of an epoch's last step is written before that epoch's hook, which a resumed trainer leaves out.
        if state.global_step > self._observed and found and self._is_due(state):
            self._observe(state)

    def _record(self, freezer: Freezer, args: Any, found: Mapping[str, Any], path: Path, *, resume: bool) -> Rows:
        metric, lower = judged_by(args, self.metric, self.lower_is_better)
        recorder = Recorder(
            freezer,
            path,
            name=self.name or type(freezer.model).__name__,
            metric=metric,
            seed=args.seed,
            settings={**settings_of(args), "every": self.every, **(self.settings or {})},
            lower_is_better=lower,
            resume=resume,
        )
        expected = [metric, *(["eval_loss"] if evaluates(args) else []), *self.columns]
        return Rows(recorder, expected, self._observed, list(found.get("columns", ())), list(found.get("late", ())))

    def _is_due(self, state: Any) -> bool:
        return _ends_epoch(state) if self.every == "epoch" else state.global_step % self.every == 0

    def _observe(self, state: Any) -> None:
        if self.freezer is None:
            return
        self._write_row(state)
        self.observations = self.freezer.step()
        self._observed = state.global_step
        if self._rows is not None:
            self._rows.expect(state.global_step, state.epoch, self._learning_rate)

    def _write_row(self, state: Any) -> None:
        if self._rows is not None:
            self._rows.write(state.log_history)

    def end(self, error: BaseException | None = None) -> None:
        """Close the run, as failed by an ``error``, and let go of model and optimiser."""
        rows, freezer = self._rows, self.freezer
        self._rows = None
        if freezer is not None:
            give_back(freezer.optimizer, self)
            freezer.detach()
        if rows is not None:
            if self._unended is not None:
                self._unended.detach()
            rows.recorder.__exit__(None if error is None else type(error), error, None)


def _ends_epoch(state: Any) -> bool:
    """Return whether the last step was its epoch's: the trainer divides by the number of its batches."""
    return state.epoch is not None and float(state.epoch).is_integer()


def _folder(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
