"""Checkpoints and weights from strangers: read, or refused in one line, soon, and in no more memory than they fill."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from neq_cli.cli import main
from neq_cli.errors import RunDirectoryError
from neq_cli.training.loop.checkpoint import load_state, random_states, read_weights, save_state, save_weights

STATE = {
    "epoch": 3,
    "model": {"weight": torch.arange(6.0).reshape(2, 3), "count": torch.tensor(7), "on": torch.tensor([True, False])},
    "averaged": None,
    "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "groups": [{"lr": 0.1, "betas": (0.9, 0.99)}]},
}


def reads_or_refuses(path: Path) -> str:
    """Return what is said of the file, nothing where it can be read."""
    said = ""
    for read in (load_state, read_weights):
        started = time.perf_counter()
        try:
            read(path)
        except RunDirectoryError as error:
            said = str(error)
            assert str(path) in said
            assert said.isprintable()
            assert len(said) < 500
        assert time.perf_counter() - started < 5
    return said


def forged(header: bytes, content: bytes) -> bytes:
    """Return a file with the right checksum, as somebody who means harm would make it."""
    start = b'{"__metadata__":{"checksum":"'
    blank = len(header).to_bytes(8, "little") + header + content
    if not header.startswith(start):
        return blank
    at = 8 + len(start)
    blank = blank[:at] + b"00000000" + blank[at + 8 :]
    return blank[:at] + b"%08x" % zlib.crc32(blank) + blank[at + 8 :]


def parts(path: Path) -> tuple[bytes, bytes]:
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    return content[8:end], content[end:]


def fuzz(check: Callable[..., object], examples: int, *strategies: st.SearchStrategy[Any]) -> None:
    settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))(
        given(*strategies)(check)
    )()


SPLICES = (
    *(b"", b"\x00", b"\xff", b"\n", b'"', b"{", b"}", b"[", b"]", b"[" * 3000, b",", b"-", b"1e9", b"NaN", b"null"),
    *(b'"F64"', b'"U8"', b'"F4"', b'"tensor"', b'\\"tensor\\"', b'\\"tuple\\"', b'\\"items\\"', b'\\"counter\\"'),
    *(b"9" * 5000, b"true"),
    *(b"[0,4]", b"[4,0]", b"[-1,3]", b"[4611686018427387904,4]", b"4294967296", b"\\ud800", b"\\u001b"),
    b"/model/weight",
)
OPERATIONS = st.lists(
    st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 40), st.sampled_from(SPLICES) | st.binary(max_size=3)),
    min_size=1,
    max_size=4,
)


def mutated(content: bytes, operations: list[tuple[float, int, bytes]]) -> bytes:
    for where, length, splice in operations:
        at = int(where * len(content))
        content = content[:at] + splice + content[at + length :]
    return content


@pytest.mark.parametrize("forge", [False, True])
@pytest.mark.parametrize("examples", [250, pytest.param(20000, marks=pytest.mark.slow)])
def test_damaged_files(tmp_path: Path, examples: int, forge: bool) -> None:
    path = tmp_path / "last.safetensors"
    save_state(STATE, path)
    header, content = parts(path)

    def check(operations: list[tuple[float, int, bytes]]) -> None:
        if forge:  # beyond the first bytes, without which there is no checksum to fit
            path.write_bytes(forged(header[:40] + mutated(header[40:], operations), content))
        else:
            damaged = mutated(len(header).to_bytes(8, "little") + header + content, operations)
            path.write_bytes(damaged)
        reads_or_refuses(path)

    fuzz(check, examples, OPERATIONS)


NAMES = st.sampled_from(["tensor", "items", "a", "\x1b", "\ud800"])
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | NAMES
ODD = [{"tensor": "a"}, {"tensor": ["a"]}, {"items": 3}, {"tuple": "abc"}, {"counter": [[1, "x"]]}]
NODES = st.recursive(
    LEAVES | st.sampled_from(ODD),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["items", "tuple", "tensor", "counter", "x"]), inner, max_size=2)
        | st.builds(lambda pairs: {"items": pairs}, st.lists(st.tuples(LEAVES, inner).map(list), max_size=3))
    ),
    max_leaves=10,
)


@pytest.mark.parametrize("examples", [150, pytest.param(20000, marks=pytest.mark.slow)])
def test_any_structure(tmp_path: Path, examples: int) -> None:
    path = tmp_path / "last.safetensors"

    def check(node: Any, model: Any) -> None:
        for structure in (node, {"items": [["model", model], ["averaged", node]]}):
            metadata = {"checksum": "00000000", "version": "2", "structure": json.dumps(structure)}
            entry = {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}
            header = json.dumps({"__metadata__": metadata, **entry}, separators=(",", ":")).encode()
            path.write_bytes(forged(header, b"\0\0\0\0"))
            reads_or_refuses(path)

    fuzz(check, examples, NODES, NODES)


def header_of(structure: str, entries: str = "") -> bytes:
    return (
        b'{"__metadata__":{"checksum":"00000000","version":"2","structure":'
        + json.dumps(structure).encode()
        + b"}"
        + entries.encode()
        + b"}"
    )


def entry(name: str, shape: str, begin: int, end: int, dtype: str = "F32") -> str:
    return f',"{name}":{{"dtype":"{dtype}","shape":{shape},"data_offsets":[{begin},{end}]}}'


BOMBS: dict[str, Callable[[], tuple[bytes, bytes]]] = {
    "nested": lambda: (header_of("[" * 10**6), b""),
    "millions of values": lambda: (header_of("[" + "[]," * 1_100_000 + "1]"), b""),
    "millions of entries": lambda: (header_of("{}", "".join(entry(f"t{i}", "[0]", 0, 0) for i in range(260_000))), b""),
    "one tensor a million times": lambda: (
        header_of("[" + '{"tensor":"a"},' * 10**6 + "1]", entry("a", "[1]", 0, 4)),
        b"\0" * 4,
    ),
    "a tensor twice": lambda: (header_of('[{"tensor":"a"},{"tensor":"a"}]', entry("a", "[1]", 0, 4)), b"\0" * 4),
    "no such tensor": lambda: (header_of('{"tensor":"b"}', entry("a", "[1]", 0, 4)), b"\0" * 4),
    "a tensor left over": lambda: (header_of("1", entry("a", "[1]", 0, 4)), b"\0" * 4),
    "digits": lambda: (header_of("[" + "9" * 10**6 + "]"), b""),
    "product": lambda: (header_of("1", entry("a", "[4294967296,4294967296]", 0, 0)), b""),
    "product of nothing": lambda: (header_of("1", entry("a", f"[0,{2**61},{2**61}]", 0, 0)), b""),
    "many dimensions": lambda: (header_of("1", entry("a", "[" + "1," * 10**5 + "1]", 0, 4)), b"\0" * 4),
    "huge dimensions": lambda: (header_of("1", entry("a", f"[{'9' * 4000},{'9' * 4000}]", 0, 4)), b"\0" * 4),
    "overlap": lambda: (header_of("1", entry("a", "[2]", 0, 8) + entry("b", "[1]", 4, 8)), b"\0" * 8),
    "gap": lambda: (header_of("1", entry("a", "[1]", 4, 8)), b"\0" * 8),
    "claims more": lambda: (header_of("1", entry("a", "[1099511627776]", 0, 2**42)), b"\0" * 8),
    "a dtype": lambda: (header_of("1", entry("a", "[1]", 0, 4, "F4")), b"\0" * 4),
    "no truth value": lambda: (header_of('{"tensor":"a"}', entry("a", "[1]", 0, 1, "BOOL")), b"\2"),
    "a large header": lambda: (b"{" + b" " * 2**26 + b"}", b""),
    "a long name": lambda: (header_of("1", entry("a" * 2**24, "[1]", 0, 5)), b"\0" * 4),
    "metadata of numbers": lambda: (b'{"__metadata__":{"checksum":"00000000","version":2,"structure":{}}}', b""),
    "metadata of lists": lambda: (b'{"__metadata__":[]}', b""),
    "no checksum": lambda: (b'{"__metadata__":{"version":"2","structure":"1"}}', b""),
    "checksum elsewhere": lambda: (b'{"__metadata__":{"version":"2","checksum":"00000000","structure":"1"}}', b""),
    "deep counter": lambda: (header_of('{"counter":[[1,{"items":[]}]]}'), b""),
}

READER = r"""
import json, resource, sys, time, torch
from pathlib import Path
from neq_cli.errors import RunDirectoryError
from neq_cli.training.loop.checkpoint import load_state, read_weights, save_state
state = {str(number): torch.ones(2**22) for number in range(16)}  # 256 MiB
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
save_state(state, Path(sys.argv[1]) / "state.safetensors")
grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
del state
pages = int(Path("/proc/self/statm").read_text().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * 4096 + 3 * 2**29,) * 2)
for path in sorted(Path(sys.argv[1]).glob("bomb*")):
    for read in (load_state, read_weights):
        began, message = time.process_time(), ""
        try:
            read(path)
        except RunDirectoryError as error:
            message = str(error)
        print(json.dumps([path.name, time.process_time() - began, message]), flush=True)
print(json.dumps(["KiB to save", grown, ""]))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits memory as Linux does")
def test_bombs_go_off_soon_and_in_little_memory(tmp_path: Path) -> None:
    names = {}
    for number, (name, make) in enumerate(BOMBS.items()):
        path = tmp_path / f"bomb{number:03d}"
        path.write_bytes(forged(*make()))
        names[path.name] = name
    result = subprocess.run(
        [sys.executable, "-c", READER, str(tmp_path)], capture_output=True, text=True, timeout=200, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(lines) == 2 * len(BOMBS) + 1
    for file, seconds, message in lines[:-1]:
        assert seconds < 10, names[file]
        assert message.startswith(f"{tmp_path / file}: damaged ("), names[file]
        assert message.isprintable()
        assert len(message) < 500
    assert lines[-1][1] < 64 * 1024  # beside 256 MiB of tensors


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "loop", "nowhere"])
def test_what_is_no_file_is_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "last.safetensors"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to({"device": "/dev/zero", "loop": path.name, "nowhere": "nowhere"}[kind])
    assert reads_or_refuses(path)


def test_pickles_are_never_opened(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return (os.mkdir, (str(tmp_path / "sprung"),))

    path = tmp_path / "last.safetensors"
    path.write_bytes(pickle.dumps(Trap()))
    assert reads_or_refuses(path)
    torch.save(Trap(), path)
    assert reads_or_refuses(path)
    assert not (tmp_path / "sprung").exists()


def test_stored_random_states_survive_strangers(tmp_path: Path) -> None:
    save_state(random_states(), tmp_path / "r.safetensors")
    assert set(load_state(tmp_path / "r.safetensors")) == {"torch", "cuda", "python", "numpy"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The least that export takes for a run."""
    path = tmp_path_factory.mktemp("exported") / "run"
    (path / "checkpoints").mkdir(parents=True)
    columns = "epoch,neurons,frozen,flops_paper,flops_executed,flops_paper_dense,flops_executed_dense,epoch_seconds"
    (path / "recipe.yaml").write_text("epochs: 1\nmodel: {entrypoint: evil:make}\n")
    (path / "evil.py").write_text("raise SystemExit(99)\n")
    (path / "metrics.csv").write_text(f"{columns},probe_seconds\n1,1,1,1,1,1,1,1,1\n")
    (path / "environment.json").write_text(json.dumps({"recipe_name": "../\x1b[31m\ud800"}))
    return path


def test_export_of_a_strangers_run(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def export(source: str, name: str) -> tuple[int, str]:
        out, err = io.StringIO(), io.StringIO()
        command = ["export", str(run), "--from", source, "-o", str(tmp_path / name)]
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as ended:
            main(command)
        return int(ended.value.code or 0), err.getvalue()

    monkeypatch.setenv("NEQ_TRACEBACK", "1")
    monkeypatch.chdir(run)
    save_state(STATE, run / "checkpoints" / "last.safetensors")
    save_weights({"../x\x1b": torch.ones(2)}, run / "weights.safetensors", {})
    assert export("last", "last.safetensors") == (0, "")
    assert read_weights(tmp_path / "last.safetensors").keys() == STATE["model"].keys()  # type: ignore[attr-defined]
    assert export("final", "final.safetensors") == (0, "")
    assert export("final", "final.pt") == (0, "")
    for junk in (b"", b"\x80\x02junk", forged(*BOMBS["one tensor a million times"]())):
        (run / "checkpoints" / "best.safetensors").write_bytes(junk)
        code, said = export("best", "best.safetensors")
        assert code == 2
        assert said.count("\n") == 1
        assert said.strip().isprintable()
        assert not (tmp_path / "best.safetensors").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"last.safetensors", "final.safetensors", "final.pt"}
