"""Run directories from strangers: every command prints clean text or one clean error, soon and in little memory."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from neq_cli.cli import main
from neq_cli.runs.store.paths import RunFiles
from neq_cli.runs.store.run import Run, read_run

FROZEN = {"conv1": [[0, 2], [2], [1, 2, 3]], "bn1": [[], [1], [1]]}
FILES = (
    "recipe.yaml",
    "environment.json",
    "status.json",
    "metrics.csv",
    "layers.csv",
    "neurons/epoch_0002.safetensors",
    "neurons/epoch_0003.safetensors",
)
COMMANDS = (
    ("inspect", "RUN"),
    ("inspect", "RUN", "--json"),
    ("inspect", "RUN", "--epoch", "2", "--layer", "*1"),
    ("inspect", "RUN", "--plot"),
    ("report", "RUN", "OTHER", "-o", "PAGE", "--allow-differences"),
    ("compare", "RUN"),
    ("compare", "RUN", "OTHER", "THIRD", "--allow-differences"),
    ("compare", "RUN", "OTHER", "THIRD", "--baseline", "OTHER"),
    *(("compare", "RUN", "OTHER", "--allow-differences", f"--{form}") for form in ("json", "csv", "markdown", "latex")),
)
SECONDS = 10  # for the commands on one directory, many times what they take
EXAMPLES = [40, pytest.param(5000, marks=pytest.mark.slow)]
STYLE = re.compile("\x1b\\[[0-9;]*m")  # colours, which only rich may set
HOSTILE = (
    *("\x1b]0;title\x07", "\x1b[2J", "\x9b31m", "\u202ereversed", "\u2066", "\ud800", "\x00", "a\nb", "a\tb", "\r"),
    *("[red]x[/red]", "[/]", "[link=http://evil]x[/link]", "[@click=f]", ":boom:", "\\[", "[", "[[", "[1]"),
    *("=1+1", "\\input{x}", "$x$", "%", "|", "<script>", "`", "../../etc/passwd", "", " ", "e\u0301" * 30, "字" * 50),
)


@pytest.fixture
def runs(make_run: Callable[..., Run], recipe: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Path]]:
    monkeypatch.setenv("NEQ_TRACEBACK", "1")  # an unexpected exception goes through
    made = [make_run("run", recipe(), frozen=FROZEN, environment={"data": {"name": "x", "train": 5}})]
    made += [make_run(f"other{seed}", recipe(policy={"kind": "baseline"}, seed=seed)) for seed in (1, 2)]
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # NumPy's would be printed beside the table
        yield [run.path for run in made]


def output_of(arguments: list[str]) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as ended:
        main(arguments)
    return int(ended.value.code or 0), out.getvalue(), err.getvalue()


def commands_end_well(runs: list[Path], commands: Sequence[tuple[str, ...]] = COMMANDS) -> str:
    """Run ``commands``; return all that was printed."""
    started, printed = time.perf_counter(), ""
    for command in commands:
        places = dict(zip(("RUN", "OTHER", "THIRD"), map(str, runs), strict=False))
        places["PAGE"] = str(runs[0].parent / "page.html")
        code, out, err = output_of([places.get(word, word) for word in command])
        assert code in (0, 2)
        assert bool(err) == (code == 2)
        assert not (code == 2 and out)
        for line in (out + err).split("\n"):
            assert STYLE.sub("", line).isprintable(), (command, line)
        if code == 0 and "--json" in command:
            json.loads(out, parse_constant=pytest.fail)
        if code == 2 and command[0] not in ("compare", "report"):
            assert err.count("\n") == 1
        printed += out + err
    assert time.perf_counter() - started < SECONDS
    return printed


def fuzz(check: Callable[..., object], examples: int, *strategies: st.SearchStrategy[Any]) -> None:
    settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))(
        given(*strategies)(check)
    )()


NUMBERS = st.integers() | st.floats() | st.sampled_from([0, -1, 2**31, 2**63, 2**64, 10**300, 1e308, -1e308, 5e-324])
TEXTS = st.sampled_from(HOSTILE) | st.text(max_size=8)
ANY_JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=8,
)


def dotted_keys(document: dict[str, Any], above: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key, value in document.items():
        yield (*above, key)
        if isinstance(value, dict):
            yield from dotted_keys(value, (*above, key))


def put(document: dict[str, Any], key: tuple[str, ...], value: Any) -> dict[str, Any]:
    if not key:
        return value
    inner = document.get(key[0])
    return {**document, key[0]: put(inner if isinstance(inner, dict) else {}, key[1:], value)}


@pytest.mark.parametrize("examples", EXAMPLES)
def test_any_value_at_any_key(runs: list[Path], monkeypatch: pytest.MonkeyPatch, examples: int) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    texts = {name: (runs[0] / name).read_text() for name in FILES[:3]}
    documents = {name: yaml.safe_load(text) for name, text in texts.items()}
    extra = {"environment.json": [("metric",), ("data", "name"), ("notes",)], "status.json": [("host",), ("pid",)]}
    places = [(name, key) for name, each in documents.items() for key in [*dotted_keys(each), *extra.get(name, [])]]

    def check(changes: list[tuple[tuple[str, tuple[str, ...]], Any]], command: tuple[str, ...]) -> None:
        changed = dict(documents)
        for (name, key), value in changes:
            changed[name] = put(changed[name], key, value)
        for name, document in changed.items():
            (runs[0] / name).write_text(json.dumps(document))
        commands_end_well(runs, [command])

    changes = st.lists(st.tuples(st.sampled_from(places), ANY_JSON), min_size=1, max_size=3)
    fuzz(check, examples, changes, st.sampled_from(COMMANDS))


SPLICES = (
    *(b"\n", b"\r", b"\r\n", b",", b",,,", b'"', b'""', b"\x00", b"\xff", b"\xef\xbb\xbf", b"-", b"+", b" ", b"\t"),
    *(b"9" * 30, b"1e999", b"1e308", b"-1e308", b"nan", b"inf", b"-inf", b"1_0", "١٢".encode(), b"0x1f", b"1.", b".5"),
    *(
        b"[",
        b"{",
        b"}",
        b"]",
        b": ",
        b"- ",
        b"&a ",
        b"*a",
        b"<<: *a",
        b"!!python/object:os.system ",
        b"!!binary ",
        b"? ",
    ),
    *(b"\x1b[31m", b"[red]", b"[/]", "\u202e".encode(), b"null", b"true", b"{}", b"[]", b"1:2:3", b"2020-01-01", b"~"),
    *(b'"shape":[4]', b'"shape":[0]', b"4294967296", b"18446744073709551616", b"F16", b"BOOL", b"[0,4]", b"\x01\x00"),
)
OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(["flip", "delete", "insert", "cut", "double"]),
        st.floats(0, 1, exclude_max=True),
        st.integers(0, 255),
        st.sampled_from(SPLICES),
    ),
    min_size=1,
    max_size=6,
)


def mutated(content: bytes, operations: list[tuple[str, float, int, bytes]]) -> bytes:
    for kind, where, number, splice in operations:
        at = int(where * len(content))
        if kind == "flip":
            content = content[:at] + bytes([number]) + content[at + 1 :]
        elif kind == "delete":
            content = content[:at] + content[at + 1 + number % 9 :]
        elif kind == "insert":
            content = content[:at] + splice + content[at + number % 3 :]
        elif kind == "cut" and number < 60:
            content = content[:at]
        elif kind == "double":
            content = content[:at] + content[at : at + number] * 2 + content[at + number :]
    return content


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("examples", [20, pytest.param(3000, marks=pytest.mark.slow)])
def test_damaged_bytes(runs: list[Path], name: str, examples: int) -> None:
    path = runs[0] / name
    whole = path.read_bytes()

    def check(operations: list[tuple[str, float, int, bytes]], command: tuple[str, ...]) -> None:
        path.write_bytes(mutated(whole, operations))
        commands_end_well(runs, [command])

    fuzz(check, examples, OPERATIONS, st.sampled_from(COMMANDS))


@pytest.mark.parametrize("text", HOSTILE)
def test_text_is_neither_obeyed_nor_taken_as_markup(
    make_run: Callable[..., Run], recipe: Any, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    if text == "\x00" and sys.version_info < (3, 11):
        pytest.skip("the csv module of Python 3.10 writes no NUL")
    monkeypatch.setenv("NEQ_TRACEBACK", "1")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "400")
    name = text.encode("utf-8", "replace").decode()  # safetensors takes no surrogates
    metric = text if "\ud800" not in text and text not in ("", "a\nb", "\r") else "metric"
    run = make_run("run", recipe(), sizes={name: 3, "fc": 2}, frozen={name: [[1], [1]]}, metrics=[{metric: 1.0}] * 3)
    environment = json.loads((run.path / "environment.json").read_text())
    environment.update(recipe_name=text or "x", metric=metric, notes=[text], device=text, data={text: text})
    (run.path / "environment.json").write_text(json.dumps(environment))
    (run.path / "status.json").write_text(json.dumps({"state": "failed", "reason": f"because {text}"}))
    odd = recipe(policy={"kind": "neq"}) | {"policy": {"kind": text, text: text}, "model": {"name": text}}
    (run.path / "recipe.yaml").write_text(json.dumps(odd))
    printed = STYLE.sub("", commands_end_well([run.path], [("inspect", "RUN"), ("compare", "RUN")]))
    if text.isprintable() and text.isascii() and text.strip():
        assert f"because {text}" in printed
        assert f" {metric} " in printed  # the metric's name stands at the start of a line of the summary


def read_in_limits(folder: Path, bombs: dict[str, dict[str, Any]]) -> Iterator[tuple[str, float, str]]:
    """Yield (bomb, seconds, message) of reading each in a process that cannot have much more memory than at first."""
    (folder / "bombs.json").write_text(json.dumps(bombs))
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", READER, str(folder)], capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr[-3000:]
    for line in result.stdout.splitlines():
        yield tuple(json.loads(line))


READER = r"""
import io, json, os, resource, shutil, sys, time
from contextlib import redirect_stdout, redirect_stderr
from pathlib import Path
from neq_cli.cli import main
from neq_cli.runs.views.tables import comparison as comparison_tables
from neq_cli.runs.views.tables import inspection as inspection_view
from neq_cli.runs.compare import inspection
from neq_cli.runs.store import neurons as reading_neurons
folder = Path(sys.argv[1])
pages = int(Path("/proc/self/statm").read_text().split()[0]) if Path("/proc").exists() else 2**19
resource.setrlimit(resource.RLIMIT_AS, (pages * 4096 + 2**30,) * 2)
os.environ["NEQ_TRACEBACK"] = "1"
for name, files in json.loads((folder / "bombs.json").read_text()).items():
    shutil.copytree(folder / "run", folder / "bomb")
    for file, (start, piece, times, end) in files.items():
        with (folder / "bomb" / file).open("wb") as written:
            written.write(start.encode("latin-1"))
            if piece == "\0":
                written.truncate(len(start) + times)
                written.seek(0, 2)
            else:
                written.write(piece.encode("latin-1") * times)
            written.write(end.encode("latin-1"))
    for command in ("inspect",):
        out, err, began = io.StringIO(), io.StringIO(), time.process_time()
        with redirect_stdout(out), redirect_stderr(err):
            try:
                main([command, str(folder / "bomb")])
            except SystemExit as ended:
                message = err.getvalue() if ended.code else ""
        print(json.dumps([f"{name}: {command}", time.process_time() - began, message]), flush=True)
    shutil.rmtree(folder / "bomb")
"""


def bombs(run: Run) -> dict[str, dict[str, tuple[str, str, int, str]]]:
    """Return files as (start, piece, how often, end)."""
    recipe = RunFiles(run.path).recipe.read_text()
    metrics = RunFiles(run.path).metrics.read_text()
    layers = RunFiles(run.path).layers.read_text()
    columns = metrics.split("\n")[0]
    ones = ",1" * columns.count(",")
    first = layers.split("\n")[0]
    many = ",".join(f"k{i}: 1" for i in range(3000))
    long = "".join(f"? {'z' * 900}{i}\n: *x\n" for i in range(10))
    schema = '{"__metadata__":{"schema":"1"}'
    neurons = "neurons/epoch_0003.safetensors"
    header = 2**22 - 20

    def entry(name: str, shape: str, end: int) -> str:
        return f',"{name}":{{"dtype":"F32","shape":{shape},"data_offsets":[0,{end}]}}'

    def tensors(start: str, piece: str, times: int, end: str) -> tuple[str, str, int, str]:
        length = len(start) + len(piece) * times + len(end)
        return length.to_bytes(8, "little").decode("latin-1") + start, piece, times, end

    return {
        "yaml: list nested": {"recipe.yaml": ("", "[", 60_000, "")},
        "yaml: map nested": {"recipe.yaml": ("", "? ", 30_000, "")},
        "yaml: aliases of a long text": {"recipe.yaml": (recipe + f"a: &a {'x' * 20_000}\nb: [", "*a,", 12_000, "]\n")},
        "yaml: a long key above many": {"recipe.yaml": (recipe + "k" * 900 + ":\n", "  a: 1\n", 5_000, "")},
        "yaml: many keys under long keys": {
            "recipe.yaml": (f"{recipe}x: &x {{{many}}}\n", "", 0, long)
        },
        "yaml: base 60": {"recipe.yaml": (recipe + "a: 1", ":1", 30_000, "\n")},
        "yaml: base 60 fraction": {"recipe.yaml": (recipe + "a: 1", ":1", 30_000, ":1.5\n")},
        "yaml: digits": {"recipe.yaml": (recipe + "a: 1", "1", 60_000, "\n")},
        "yaml: keys of one hash": {
            "recipe.yaml": ("a: {", "", 0, ",".join(f"{(2**61 - 1) * i}: 1" for i in range(2000)) + "}\n" + recipe)
        },
        "yaml: anchors": {"recipe.yaml": (recipe + "a: [", "&a x,", 10_000, "]\n")},
        "yaml: tags": {"recipe.yaml": (recipe + "a: ", "!!set ", 1, "{" + "b," * 25_000 + "}\n")},
        "yaml: quotes": {"recipe.yaml": (recipe + "a: '", "''", 30_000, "")},
        "yaml: folds": {"recipe.yaml": (recipe + "a: >\n", "  x\n", 15_000, "")},
        "yaml: comments": {"recipe.yaml": (recipe, "#\n", 30_000, "")},
        "yaml: documents": {"recipe.yaml": (recipe, "---\n", 15_000, "")},
        "yaml: zeros": {"recipe.yaml": ("", "\0", 2**30, "")},
        "json: nested": {"environment.json": ("", "[", 500_000, "")},
        "json: nested objects": {"status.json": ("", '{"a":', 200_000, "")},
        "json: many": {"environment.json": ("[[", "[],", 300_000, "[]]]")},
        "json: digits": {"environment.json": ('{"a":', "1", 1_000_000, "}")},
        "json: a long note": {"environment.json": ('{"notes":["', "[red]", 200_000, '"]}')},
        "json: many notes": {"environment.json": ('{"notes":[1', ",1", 90_000, "]}")},
        "json: a long name": {"environment.json": ('{"recipe_name":"', "x", 1_000_000, '"}')},
        "json: a long device": {"environment.json": ('{"device":"', "\\u202e", 170_000, '"}')},
        "csv: columns": {"metrics.csv": (columns, ",", 30_000, "\n")},
        "csv: a line": {"metrics.csv": (columns, ",", 2**20, "\n")},
        "csv: quotes never closed": {"metrics.csv": (columns + '\n"', "x\n", 2**20, "")},
        "csv: rows": {"metrics.csv": (columns, "", 0, "".join(f"\n{i}{ones}" for i in range(1, 100_000)) + "\n")},
        "csv: empty rows": {"metrics.csv": (columns, "\n", 2**20, "")},
        "csv: no line end": {"metrics.csv": (columns + "\n", "1,", 2**20, "")},
        "csv: zeros": {"metrics.csv": (columns + "\n", "\0", 2**29 - 2**10, "\n")},
        "csv: many layers": {"layers.csv": (layers, "3,x,Linear,1,0,,,1,1\n", 2**18, "")},
        "csv: layers of epochs gone": {"layers.csv": (f"{first}\n", "1,x,Linear,1,0,,,1,1\n", 2**18, "")},
        "csv: a long name": {"layers.csv": (f"{first}\n", "", 0, f"3,{'[b]' * 20_000},Linear,1,0,,,1,1\n")},
        "csv: too large": {"layers.csv": (layers, "\0", 600 * 2**20, "")},
        "tensors: claims all": {neurons: ("\xff" * 7 + "\x7f{", "}", 1, "")},
        "tensors: a large header": {neurons: tensors("{", " ", 2**25, "}")},
        "tensors: nested": {neurons: tensors('{"__metadata__":', "[", header, "")},
        "tensors: many": {
            neurons: tensors(schema, "", 0, "".join(entry(f"l{i}/phi", "[0]", 0) for i in range(30_000)) + "}")
        },
        "tensors: same place": {
            neurons: tensors(schema, "", 0, "".join(entry(f"l{i}/phi", "[1]", 4) for i in range(30_000)) + "}\0\0\0\0")
        },
        "tensors: product": {
            neurons: tensors(schema + entry("a/phi", "[4294967296,4294967296]", 0), "", 0, "}")
        },
        "tensors: a name": {
            neurons: tensors(schema + ',"', "a", 2**21, entry("/phi", "[0]", 0)[2:] + "}")
        },
        "tensors: schema": {neurons: tensors('{"__metadata__":{"schema":"', "\\u001b", 2**19, '"}}')},
        "tensors: too large": {neurons: ("\0", "\0", 65 * 2**20, "")},
    }  # fmt: skip


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits memory as Linux does")
def test_bombs_go_off_soon_and_in_little_memory(make_run: Callable[..., Run], recipe: Any, tmp_path: Path) -> None:
    made = bombs(make_run("run", recipe(), frozen=FROZEN))
    seen = set()
    for bomb, seconds, message in read_in_limits(tmp_path, made):
        name = bomb.rpartition(": ")[0]
        assert seconds < 10, bomb
        assert message.replace("\n", "", 1).isprintable(), (bomb, message)
        assert len(message) < 1000, bomb
        if message:
            seen.add(name)
            assert message.endswith("\n")
            assert next(iter(made[name])) in message
    harmless = {
        *("json: a long note", "json: many notes", "json: a long name", "json: a long device"),
        *("yaml: folds", "yaml: comments", "yaml: tags", "yaml: a long key above many"),
    }
    assert seen >= set(made) - harmless


def special(kind: str) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        path.unlink()
        if kind == "pipe":
            os.mkfifo(path)
        elif kind == "device":
            path.symlink_to("/dev/zero")
        elif kind == "folder":
            path.mkdir()
        elif kind == "loop":
            path.symlink_to(path.name)
        else:
            path.symlink_to("nowhere")

    return make


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "loop", "nowhere"])
def test_what_is_no_file_is_refused(runs: list[Path], name: str, kind: str) -> None:
    special(kind)(runs[0] / name)
    code, _, err = output_of(["inspect", str(runs[0])])
    assert code == (0 if name in FILES[1:3] and kind in ("loop", "nowhere") else 2)
    assert err.count("\n") == (code != 0)


def test_a_directory_that_is_a_loop(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    for arguments in (["inspect", "loop"], ["compare", "loop"], ["inspect", "x" * 5000], ["inspect", "a\0b"]):
        code, _, err = output_of([arguments[0], str(tmp_path / arguments[1])])
        assert (code, err.count("\n")) == (2, 1)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *(("1_0", None), ("١٢", None), (" 1", None), ("1e999", None), ("1e101", None), ("0x10", None), ("1e", None)),
        *(
            ("infinity", None),
            ("NaN", None),
            ("--1", None),
            ("1e+5", 1e5),
            ("-.5", None),
            ("-0.5", -0.5),
            ("inf", 9e999),
        ),
        *(("1e-320", 1e-320), ("12345678901234567890", 12345678901234567890.0), ("9" * 200, None), ("1.", 1.0)),
    ],
)
def test_numbers_are_those_that_are_written(runs: list[Path], text: str, value: float | None) -> None:
    path = runs[0] / "metrics.csv"
    path.write_text(path.read_text().replace("\n2,0.1,", f"\n2,{text},"))
    code, _, err = output_of(["inspect", str(runs[0])])
    assert code == (2 if value is None else 0)
    if value is None:
        assert "metrics.csv:3: lr: " in err
    else:
        assert read_run(runs[0]).rows[1]["lr"] == value


def test_a_row_torn_within_quotes_is_left_out(make_run: Callable[..., Run]) -> None:
    run = make_run(sizes={'line\n"break"': 3}, epochs=3)
    layers = run.path / "layers.csv"
    whole = layers.read_bytes()
    assert whole.count(b"\n") == 1 + 2 * 3
    layers.write_bytes(whole[: whole.rindex(b"\n", 0, -1) + 1])
    assert [row.neurons for row in run.layers(2)] == [3]
    assert run.layers(3) == ()


def test_nothing_is_imported_or_unpickled(runs: list[Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    trap = f"open({str(tmp_path / 'sprung')!r}, 'w')\ndef make(*_, **__): pass\n"
    for name in ("evil.py", "sitecustomize.py", "conftest.py", "neq_cli.py", "torch.py", "yaml.py"):
        (runs[0] / name).write_text(trap)
    (runs[0] / "dispatch.json").write_text("!!python/object/apply:os.system ['touch sprung']")
    recipe = yaml.safe_load((runs[0] / "recipe.yaml").read_text())
    for section in ("model", "data", "policy"):
        recipe[section] = {"entrypoint": "evil:make"}
    (runs[0] / "recipe.yaml").write_text(yaml.safe_dump(recipe | {"task": {"entrypoint": "evil:make"}}))
    monkeypatch.chdir(runs[0])
    printed = commands_end_well(runs)
    assert "evil:make" in printed
    assert "evil" not in sys.modules
    assert not (tmp_path / "sprung").exists()
    shutil.rmtree(runs[0] / "neurons")
    commands_end_well(runs)
