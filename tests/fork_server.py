"""Runs `neq` in forked children, on the order of a line of JSON each; torch is imported once for all of them."""

from __future__ import annotations

import atexit
import gc
import json
import os
import signal
import sys
import threading
import time
import traceback
from typing import Any


def main() -> None:
    import torch

    import neq_cli.cli
    import neq_cli.jobs.train
    import neq_cli.training.bench.measure
    import neq_cli.training.session  # noqa: F401 - what every child needs

    torch.set_num_threads(1)
    gc.freeze()  # a child's collections would copy every page
    orders, answers = os.fdopen(os.dup(0), "r"), os.fdopen(os.dup(1), "w", buffering=1)
    running: set[int] = set()
    print("ready", file=answers)
    for line in orders:
        order = json.loads(line)
        if "wait" in order:
            answer: Any = wait(order["wait"], order["seconds"])
            if answer is not None:
                running.discard(order["wait"])
        else:
            answer = os.fork()
            if not answer:
                orders.close()
                answers.close()
                become_neq(order)
            running.add(answer)
        print(json.dumps(answer), file=answers)
    for process in running:
        for kill in (os.killpg, os.kill):
            try:
                kill(process, signal.SIGKILL)
            except ProcessLookupError:
                continue


def wait(process: int, seconds: float) -> int | None:
    """Return how the child ended: its exit code, minus the signal's number where one killed it; None: it still runs."""
    end = time.monotonic() + seconds
    while True:
        found, status = os.waitpid(process, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > end:
            return None
        time.sleep(0.001)


def become_neq(order: dict[str, Any]) -> None:
    """Be a process of its own, in a session of its own, as a shell would start `neq`; never returns."""
    os.setsid()
    os.chdir(order["folder"])
    os.environ.update(order["environment"])
    new = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    for descriptor, (path, flags) in enumerate(
        [(os.devnull, os.O_RDONLY), (order["output"], new), (order["errors"], new)]
    ):
        opened = os.open(path, flags, 0o666)
        os.dup2(opened, descriptor)
        os.close(opened)
    sys.argv = ["neq", *order["arguments"]]
    code = 1
    try:
        exec(order["before"], {"__name__": "before"})
        from neq_cli.cli import main as neq

        neq(order["arguments"])
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
    # What the interpreter does at its end, but for taking every object apart, which takes longer than all the rest.
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
