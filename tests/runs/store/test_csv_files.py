"""Tables that grow and are cut, against a plain reading of the same bytes."""

from __future__ import annotations

import csv
import io
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from neq_cli.runs.store.csv_files import append_rows, beginning, cut

NAMES = st.text(st.characters(codec="utf-8", exclude_characters="\r\0"), max_size=8)  # Python 3.10 writes no NUL


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(names=st.lists(NAMES, max_size=4), epochs=st.integers(0, 4), wanted=st.integers(1, 5), data=st.data())
def test_the_beginning_of_a_torn_table(
    tmp_path: Path, names: list[str], epochs: int, wanted: int, data: st.DataObject
) -> None:
    """Torn after any byte, it holds the rows whose last byte is there."""
    header = b"epoch,layer\n"
    rows = [(epoch, name) for epoch in range(1, epochs + 1) for name in names]
    whole, ends = header, [len(header)]
    for epoch, name in rows:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerow([epoch, name])
        whole += text.getvalue().encode()
        ends.append(len(whole))
    size = data.draw(st.integers(0, len(whole)))
    (tmp_path / "table").write_bytes(whole[:size])
    found = beginning(tmp_path / "table", wanted)
    complete = [row for row, end in zip(rows, ends[1:], strict=True) if end <= size and row[0] <= wanted]
    present = size >= len(header)
    assert found.columns == (("epoch", "layer") if present else ())
    assert found.size == (ends[len(complete)] if present else 0)
    counts = [sum(row[0] == epoch for row in complete) for epoch in range(1, epochs + 1)]
    assert found.rows == [count for count in counts if count]


@pytest.mark.parametrize(
    "line",
    [b"", b"2", b"3,x", b"0,x", b"-1,x", b"1.0,x", b"2,x,y", b"\xff,x", b"2,\xff", b"2,a\rb", b"2," + b"x" * 2**17],
)
def test_a_damaged_row_ends_it(tmp_path: Path, line: bytes) -> None:
    start = b"epoch,layer\n1,a\n"
    (tmp_path / "table").write_bytes(start + line + b"\n2,b\n")
    found = beginning(tmp_path / "table", 9)
    assert (found.rows, found.size) == ([1], len(start))


def test_a_row_torn_after_a_line_break_in_its_name_is_not_whole(tmp_path: Path) -> None:
    (tmp_path / "table").write_bytes(b'epoch,layer\n1,a\n1,"b\n')
    found = beginning(tmp_path / "table", 9)
    assert (found.rows, found.size) == ([1], len(b"epoch,layer\n1,a\n"))


@pytest.mark.parametrize("epoch", [b"0", b"2", b"x"])
def test_epochs_begin_with_one(tmp_path: Path, epoch: bytes) -> None:
    (tmp_path / "table").write_bytes(b"epoch,layer\n" + epoch + b",a\n")
    assert beginning(tmp_path / "table", 9).rows == []


def test_cutting(tmp_path: Path) -> None:
    path, other = tmp_path / "table", tmp_path / "other"
    cut(path, 0)
    assert not path.exists()
    append_rows(path, [("epoch", "layer"), ("1", 'a,"b"\nc')])
    assert path.read_bytes() == b'epoch,layer\n1,"a,""b""\nc"\n'
    os.link(path, other)
    cut(path, 12)
    append_rows(path, [("1", "d")])
    assert (path.read_bytes(), other.read_bytes()) == (b"epoch,layer\n1,d\n", b'epoch,layer\n1,"a,""b""\nc"\n')
    cut(path, 99)
    assert path.read_bytes() == b"epoch,layer\n1,d\n"
    path.unlink()
    path.symlink_to(other)
    with pytest.raises(OSError, match="symbolic links"):
        cut(path, 1)
    with pytest.raises(OSError, match="symbolic links"):
        append_rows(path, [("2", "e")])
    assert other.read_bytes().endswith(b'c"\n')
