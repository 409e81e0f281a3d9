"""A run directory in which an earlier training has been: gone on with, begun anew where that is asked, else refused."""

from __future__ import annotations

from pathlib import Path

from neq_cli.errors import RunDirectoryError
from neq_cli.freezing.processes.counting import process_number
from neq_cli.runs.store.paths import RunFiles, check_available
from neq_cli.runs.store.untrusted import read_json
from neq_cli.text import printable


def goes_on(path: Path, *, loaded: bool, begin_anew: bool, how: str) -> bool:
    """Return whether a Recorder shall go on with what lies at ``path``; of several processes the first looks.

    It does where the Freezer has ``loaded`` the state of a checkpoint, and where a run that is not finished may be
    begun anew, as one that was killed before its first checkpoint. RunDirectoryError, one line, where anything else
    lies there: ``how`` says how the framework is given a checkpoint.
    """
    if loaded or process_number():
        return loaded
    files = RunFiles(path)
    if not files.recipe.exists() and not files.status.exists():
        try:
            check_available(path)
        except RunDirectoryError as error:
            raise RunDirectoryError(
                str(error).replace("choose another with -o", "give another run_directory")
            ) from None
        return False
    state = read_json(files.status).get("state") if files.status.exists() else "unknown"
    if begin_anew and state != "finished":
        return True
    unfinished = "" if state == "finished" else ", begin_anew=True where it was ended before a checkpoint was saved"
    raise RunDirectoryError(
        f"{printable(path)}: a run is there already ({printable(state)}); {how} goes on with it; else give another "
        f"run_directory{unfinished}"
    )
