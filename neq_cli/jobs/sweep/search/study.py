"""An optuna study in the folder of a sweep: one trial a run, both objectives minimised, resumable after any kill.

Trials are chosen by optuna's default sampler, TPE, made anew for each with a seed of the search's and the trial's
number: with one run at a time the same command chooses the same runs, however often it was stopped.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from neq_cli.errors import NeqError, RunDirectoryError, one_line
from neq_cli.jobs.sweep.search.space import Choice, Range, Space
from neq_cli.runs.store.disk import check_own
from neq_cli.text import printable

_NAME = "neq"
_DEFINITION = "definition"


def optuna() -> Any:
    """Return the library optuna, quiet. NeqError where it is missing."""
    try:
        import optuna as library
        from optuna.storages.journal import JournalFileBackend  # noqa: F401, since 4.0
    except ImportError as error:
        raise NeqError(f"--sampler optuna needs optuna ({one_line(error)}); pip install 'neq[optuna]'") from error
    library.logging.set_verbosity(library.logging.ERROR)
    return library


class SearchStudy:
    """The study kept in the file ``path``; one process at a time has it."""

    def __init__(self, path: Path, space: Space, seed: int) -> None:
        """Open or begin it. RunDirectoryError where the file is damaged, or another search's."""
        self.space = space
        self.seed = seed
        library = optuna()
        from optuna.storages.journal import JournalFileBackend

        try:
            check_own(path)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                storage = library.storages.JournalStorage(JournalFileBackend(str(path)))
                self._study = library.create_study(
                    storage=storage, study_name=_NAME, directions=["minimize", "minimize"], load_if_exists=True
                )
            known = self._study.user_attrs.get(_DEFINITION)
            if known is None:
                self._study.set_user_attr(_DEFINITION, space.definition)
        except NeqError:
            raise
        except Exception as error:  # whatever optuna makes of lines that it did not write
            mend = "remove it, or choose another folder with -o"
            raise RunDirectoryError(f"{printable(path)}: no search to go on with: {one_line(error)}; {mend}") from error
        if known not in (None, space.definition):
            raise RunDirectoryError(
                f"{printable(path)}: a search among other values, {printable(known, 300)}; give those, or choose "
                "another folder with -o"
            )

    def chosen(self) -> dict[int, Mapping[str, Any]]:
        """Return what was chosen for every trial so far, by its number, where a kill did not cut the choice short."""
        keys = {one.key for one in self.space.dimensions}
        return {
            trial.number: trial.params
            for trial in self._study.get_trials(deepcopy=False)
            if trial.params.keys() == keys
        }

    def told(self) -> dict[int, bool]:
        """Return of every trial that has ended for good whether it came to something, by its number."""
        state = optuna().trial.TrialState
        trials = self._study.get_trials(deepcopy=False)
        return {trial.number: trial.state == state.COMPLETE for trial in trials if trial.state.is_finished()}

    @property
    def next_number(self) -> int:
        """The number of the trial that is asked for next."""
        return len(self._study.get_trials(deepcopy=False))

    def ask(self) -> tuple[int, Mapping[str, Any]]:
        """Return a new trial's number, and what is chosen for it."""
        library = optuna()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._study.sampler = library.samplers.TPESampler(seed=_mixed(self.seed, self.next_number))
            trial = self._study.ask(_distributions(self.space.dimensions))
        return trial.number, trial.params

    def tell(self, number: int, flops: float, metric: float, lower_is_better: bool) -> None:
        """Say what a trial came to; a metric that is not finite is a failure."""
        if not (math.isfinite(flops) and math.isfinite(metric)):
            self.tell_failed(number)
            return
        self._study.tell(number, [metric if lower_is_better else -metric, flops])

    def tell_failed(self, number: int) -> None:
        """Say that a trial came to nothing, and would again."""
        self._study.tell(number, state=optuna().trial.TrialState.FAIL)

    def give_up_those_cut_short(self) -> None:
        """Say of trials for which not everything was chosen when the process was killed that they came to nothing."""
        for number in set(range(self.next_number)) - self.chosen().keys() - self.told().keys():
            self.tell_failed(number)


def _distributions(dimensions: Sequence[Range | Choice]) -> dict[str, Any]:
    kinds = optuna().distributions
    found: dict[str, Any] = {}
    for one in dimensions:
        if isinstance(one, Choice):
            found[one.key] = kinds.CategoricalDistribution(one.ends)
        elif one.whole:
            found[one.key] = kinds.IntDistribution(int(one.low), int(one.high), log=one.log)
        else:
            found[one.key] = kinds.FloatDistribution(one.low, one.high, log=one.log)
    return found


def _mixed(seed: int, number: int) -> int:
    """Return a seed for the sampler that is another for every trial of every search."""
    import numpy as np

    return int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
