"""What `neq train` and the Recorder write of a run alike: machine and versions, choices of kernels, how it ended."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from neq_cli.errors import Terminated, TrainingError, described
from neq_cli.runs.store.writer import RunWriter

if TYPE_CHECKING:
    import torch

    from neq_cli.freezing import Freezer
    from neq_cli.freezing.backward.dispatch import Dispatch


def environment_of(freezer: Freezer, device: torch.device, processes: int) -> dict[str, Any]:
    """Return what environment.json says of the machine, the versions, and what of the model are neurons."""
    from neq_cli.training.machine.device import environment

    return {**environment(device), "processes": processes, "coverage": freezer.coverage().to_dict()}


def keep_kernel_choices(freezer: Freezer, writer: RunWriter) -> None:
    """Have every choice of a kernel written before it is first used, and what is dense whatever the choice."""

    def write(dispatch: Dispatch) -> None:
        dense = {} if freezer.backward == "dense" else freezer.anatomy.dense_because
        writer.write_dispatch({"backward": freezer.backward, "dense": dense, "choices": dispatch.state_dict()})

    write(freezer.dispatch)
    freezer.dispatch.on_choice = write


@contextmanager
def status_of(writer: RunWriter | None) -> Iterator[None]:
    """Say in status.json how what happens inside ended."""
    if writer is None:
        yield
        return
    try:
        yield
    except KeyboardInterrupt:
        writer.interrupted("SIGINT")
        raise
    except Terminated as error:
        writer.interrupted(error.signal)
        raise
    except BaseException as error:
        # A full disk fails this too; the first error is the one to show.
        with suppress(TrainingError):
            writer.failed(described(error))
        raise
    else:
        writer.finish()
