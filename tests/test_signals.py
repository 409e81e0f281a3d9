"""Signals end any command: at once where the main thread sees them, by a thread of our own where it sees nothing."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from neq_cli import signals

Start = Callable[..., Any]

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="locks and processes as Linux has them")

# The main thread waits in the C library for ever, as it does in C++ while another thread compiles the backward pass:
# Python is given no turn to take notice of a signal.
STUCK = """
import ctypes, multiprocessing, threading, time
{patience}
import {module} as module


def stuck(*arguments, **options):
    multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,), daemon=True).start()
    lock = ctypes.create_string_buffer(64)
    threading.Timer(0.2, lambda: open("stuck", "w").close()).start()
    for _ in range(2):
        ctypes.CDLL(None).pthread_mutex_lock(lock)


module.{name} = stuck
"""
IMPATIENT = "import neq_cli.signals; neq_cli.signals._CLEANING_UP = 0.3"
COMMANDS = {
    "train": (("train", "rich.yaml"), "neq_cli.recipe.load", "load_recipe"),
    "sweep": (("sweep", "rich.yaml", "seed=1,2"), "neq_cli.jobs.sweep.plan", "plan_sweep"),
    "bench": (("bench", "rich.yaml"), "neq_cli.training.bench.measure", "bench"),
    "flops": (("flops", "rich.yaml"), "neq_cli.training.estimate", "estimate_flops"),
    "validate": (("validate", "rich.yaml"), "neq_cli.recipe.load", "load_recipe"),
    "inspect": (("inspect", "run"), "neq_cli.runs.store.run", "read_run"),
    "list": (("list", "."), "neq_cli.runs.store.folders", "find_runs"),
    "compare": (("compare", "run"), "neq_cli.runs.store.run", "read_run"),
    "report": (("report", "run", "-o", "page.html"), "neq_cli.runs.store.run", "read_run"),
    "export": (("export", "run", "-o", "weights.safetensors"), "neq_cli.runs.store.run", "read_run"),
    "evaluate": (("evaluate", "run"), "neq_cli.runs.store.run", "read_run"),
    "predict": (("predict", "run", "."), "neq_cli.training.prediction", "image_files"),
    "recipes": (("recipes",), "neq_cli.recipe.shipped", "list_recipes"),
    "init": (("init", "digits"), "neq_cli.recipe.shipped", "copy_recipe"),
    "schema": (("schema",), "neq_cli.recipe.schema", "schema_text"),
}


def stuck(neq: Start, folder: Path, command: str, patience: str = "") -> Any:
    arguments, module, name = COMMANDS[command]
    process = neq(*arguments, before=STUCK.format(module=module, name=name, patience=patience))
    assert process.until((folder / "stuck").exists), process.text
    return process


@pytest.mark.parametrize("command", COMMANDS)
def test_a_second_interrupt_ends_a_command_whatever_it_is_doing(neq: Start, folder: Path, command: str) -> None:
    process = stuck(neq, folder, command)
    for _ in range(2):
        process.kill(signal.SIGINT)
        time.sleep(0.02)  # two at once may arrive as one
    assert process.wait(20) == 130
    assert process.lines == ["interrupted"]
    process.until_alone()


@pytest.mark.parametrize("number", [signal.SIGTERM, *(pytest.param(one, marks=pytest.mark.slow) for one in (1, 10))])
def test_a_second_signal_of_any_other_kind_does_so_after_a_second(neq: Start, folder: Path, number: int) -> None:
    process = stuck(neq, folder, "bench")
    process.kill(number)
    process.kill(number)  # a launcher's copy of the first
    assert not process.ended(1.2)
    process.kill(number)
    assert process.wait(20) == 143
    assert process.lines == [f"ended by {signal.Signals(number).name}"]
    process.until_alone()


def test_a_first_signal_ends_what_has_nothing_to_save_though_it_does_not_answer(neq: Start, folder: Path) -> None:
    process = stuck(neq, folder, "bench", IMPATIENT)
    process.kill(signal.SIGTERM)
    assert process.wait(20) == 143
    assert process.lines == ["ended by SIGTERM"]
    process.until_alone()


CATCHES_ALL = f"""
{IMPATIENT}
import os, signal, time
import neq_cli.training.bench.measure as module


def bench(*arguments):
    while True:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(600)
        except BaseException:
            time.sleep(600)


module.bench = bench
"""


def test_code_that_catches_every_exception_does_not_keep_a_command_alive(neq: Start, folder: Path) -> None:
    process = neq("bench", "rich.yaml", before=CATCHES_ALL)
    assert process.wait(20) == 143
    assert process.lines == ["ended by SIGTERM"]


WHERE_EXCEPTIONS_ARE_DROPPED = """
import os, signal, time
import neq_cli.{module} as module


class Dropping:
    def __del__(self):
        os.kill(os.getpid(), {number})
        sum(range(10))


def drop(*arguments, **options):
    Dropping()
    time.sleep(600)


module.{name} = drop
"""


@pytest.mark.parametrize(
    ("command", "module", "name"), [("bench", "training.bench.measure", "bench"), ("train", "jobs.train", "prepared")]
)
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_in_a_finaliser_is_not_lost(
    neq: Start, folder: Path, command: str, module: str, name: str, number: int, code: int
) -> None:
    before = WHERE_EXCEPTIONS_ARE_DROPPED.format(module=module, name=name, number=int(number))
    began = time.monotonic()
    process = neq(command, "rich.yaml", before=before)
    assert process.wait(30) == code, process.text
    assert time.monotonic() - began < signals._CLEANING_UP  # nor ended by the patience of the other thread
    assert process.lines == [signals.last_words(signal.Signals(number).name)]


def test_a_training_that_does_not_answer_waits_for_the_second_signal(
    neq: Start, folder: Path, at_step: Callable[[int, str], str]
) -> None:
    action = "import ctypes, threading; threading.Timer(0.2, lambda: open('stuck', 'w').close()).start(); "
    action += "lock = ctypes.create_string_buffer(64); "
    action += "[ctypes.CDLL(None).pthread_mutex_lock(lock) for _ in range(2)]"
    process = neq("train", "rich.yaml", "-o", "run", before=f"{IMPATIENT}\n" + at_step(5, action))
    assert process.until((folder / "stuck").exists), process.text
    process.kill(signal.SIGTERM)
    assert not process.ended(1.5)
    process.kill(signal.SIGTERM)
    assert process.wait(20) == 143
    assert process.lines[-1] == "ended by SIGTERM"


def test_a_second_sigterm_leaves_a_training_step_at_once(
    neq: Start, folder: Path, at_step: Callable[[int, str], str]
) -> None:
    process = neq("train", "rich.yaml", "-o", "run", before=at_step(5, "open('asleep', 'w').close(); time.sleep(600)"))
    assert process.until((folder / "asleep").exists), process.text
    process.kill(signal.SIGTERM)
    assert not process.ended(1.2)
    process.kill(signal.SIGTERM)
    assert process.wait(20) == 143
    assert process.lines[-1] == "ended by SIGTERM"
    assert '"SIGTERM"' in (folder / "run" / "status.json").read_text()


@pytest.mark.slow
def test_a_second_signal_that_is_answered_leaves_time_to_clean_up(
    neq: Start, folder: Path, at_step: Callable[[int, str], str]
) -> None:
    slow = "import neq_cli.jobs.recorder as r; stock = r.status_of\n"
    slow += "from neq_cli.runs.store.writer import RunWriter; interrupted = RunWriter.interrupted\n"
    slow += "RunWriter.interrupted = lambda self, reason: (time.sleep(3), interrupted(self, reason))[1]\n"
    action = "open('asleep', 'w').close(); time.sleep(600)"
    process = neq("train", "rich.yaml", "-o", "run", before=f"import time\n{slow}" + at_step(5, action))
    assert process.until((folder / "asleep").exists), process.text
    for _ in range(2):
        process.kill(signal.SIGINT)
        time.sleep(0.1)
    assert process.wait(20) == 130
    assert '"SIGINT"' in (folder / "run" / "status.json").read_text()


CONVERTING = """
import os, signal
import neq_cli.training.bench.measure as module


def bench(*arguments):
    try:
        os.kill(os.getpid(), signal.SIGTERM)
    except BaseException as error:
        raise ImportError("half imported") from error


module.bench = bench
"""


def test_an_end_that_became_another_error_is_still_that_end(neq: Start, folder: Path) -> None:
    process = neq("bench", "rich.yaml", before=CONVERTING)
    assert process.wait(20) == 143
    assert process.lines == ["ended by SIGTERM"]


def test_an_error_after_a_signal_that_waits_is_told(
    neq: Start, folder: Path, at_step: Callable[[int, str], str]
) -> None:
    action = f"os.kill(os.getpid(), {int(signal.SIGTERM)}); raise ValueError('odd')"
    process = neq("train", "rich.yaml", "-o", "run", before=at_step(5, action))
    assert process.wait() == 1
    assert "ValueError: odd" in process.lines[-1]


def test_a_launchers_copy_of_a_signal_is_no_second_one(
    neq: Start, folder: Path, at_step: Callable[[int, str], str]
) -> None:
    send = f"os.kill(os.getpid(), {int(signal.SIGTERM)})"
    process = neq("train", "rich.yaml", "-o", "run", before=at_step(5, f"{send}; {send}"))
    assert process.wait() == 143
    assert "SIGTERM: saving epoch 1, step 6" in process.text


def test_what_only_repeats_a_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert [signals.repeats(signal.SIGTERM, seconds) for seconds in (0.5, 1.5)] == [True, False]
    assert not signals.repeats(signal.SIGINT, 0.0)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    assert [signals.repeats(signal.SIGTERM, seconds) for seconds in (0.5, 1.5, 6)] == [True, True, False]


def environment(**more: str) -> dict[str, str]:
    path = os.pathsep.join(filter(None, (str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **more}


def test_the_signals_are_taken_over_before_anything_heavy_is_imported() -> None:
    code = """
import sys
before = set(sys.modules)
from neq_cli.cli import main
print(*sorted(name for name in set(sys.modules) - before if "." not in name))
"""
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True)
    heavy = {"typer", "rich", "torch", "numpy", "pydantic", "difflib", "dataclasses", "inspect", "traceback", "pathlib"}
    assert heavy.isdisjoint(done.stdout.split())


def catches(process: int, number: int) -> bool:
    """Whether a process has said what is to happen upon a signal, as Linux tells of it."""
    fields = dict(line.split(":\t", 1) for line in Path(f"/proc/{process}/status").read_text().splitlines())
    return bool(int(fields.get("SigCgt", "0"), 16) >> (number - 1) & 1)


def begun(*arguments: str, folder: Path, **more: str) -> subprocess.Popen[str]:
    """Start `neq` as its script does, and return once it has begun."""
    command = [sys.executable, "-c", "import sys; from neq_cli.cli import main; sys.exit(main())", *arguments]
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        command, cwd=folder, env=environment(**more), stdout=pipe, stderr=pipe, text=True, start_new_session=True
    )
    end = time.monotonic() + 60
    while not catches(process.pid, signal.SIGTERM) and time.monotonic() < end:
        pass
    return process


SLOW_DELAYS = [0.001 * number for number in (*range(1, 30), *range(30, 100, 5), *range(100, 1000, 50))]


@pytest.mark.parametrize("seconds", [0.0, 0.15, *(pytest.param(one, marks=pytest.mark.slow) for one in SLOW_DELAYS)])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_as_it_starts_is_one_line(folder: Path, seconds: float, number: int, code: int) -> None:
    process = begun("train", "rich.yaml", "-o", "run", "epochs=1000", folder=folder)
    try:
        time.sleep(seconds)
        process.send_signal(number)
        out, said = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (process.returncode, out) == (code, ""), said
    assert said == signals.last_words(signal.Signals(number).name) + "\n"


def in_session(session: int) -> list[int]:
    """The processes of a session that still live, its first one left out."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] not in "ZX" and int(path.parent.name) != session:
            found.append(int(path.parent.name))
    return found


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("seconds", [0.5, 3.0, 8.0])
@pytest.mark.parametrize(("numbers", "code"), [((signal.SIGTERM,), 143), ((signal.SIGINT, signal.SIGINT), 130)])
def test_a_signal_while_torch_compiles(folder: Path, seconds: float, numbers: tuple[int, ...], code: int) -> None:
    arguments = ("bench", "digits", "compile=true", "batch_size=4", "channels_last=false", "device=cpu")
    process = begun(*arguments, folder=folder, TORCHINDUCTOR_CACHE_DIR=str(folder / "cache"))
    try:
        end = time.monotonic() + 60
        while not (folder / "cache").exists() and time.monotonic() < end:
            time.sleep(0.05)
        time.sleep(seconds)
        for number in numbers:
            process.send_signal(number)
            time.sleep(0.1)
        began = time.monotonic()
        _, said = process.communicate(timeout=60)
        assert time.monotonic() - began < 15
    finally:
        process.kill()
    assert process.returncode == code, said
    assert "Traceback" not in said
    assert said.splitlines()[-1] == signals.last_words(signal.Signals(numbers[-1]).name)
    end = time.monotonic() + 20
    while (left := in_session(process.pid)) and time.monotonic() < end:
        time.sleep(0.05)
    assert not left
