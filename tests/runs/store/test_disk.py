"""Writing that leaves whole files and goes through no link."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from neq_cli.errors import RunDirectoryError
from neq_cli.runs.store.disk import atomic_write, check_own, write_and_sync


def test_a_partial_file_that_is_a_link_is_not_written_through(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_bytes(b"mine")
    for content in (b"new", lambda path: path.write_bytes(b"new")):
        (tmp_path / ".file.partial").symlink_to(outside)
        atomic_write(tmp_path / "file", content)
        assert (tmp_path / "file").read_bytes() == b"new"
        assert outside.read_bytes() == b"mine"
        assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "outside"]
        (tmp_path / "file").unlink()


def test_a_link_in_the_place_of_the_file_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "outside").write_bytes(b"mine")
    (tmp_path / "file").symlink_to(tmp_path / "outside")
    atomic_write(tmp_path / "file", b"new")
    assert ((tmp_path / "file").is_symlink(), (tmp_path / "file").read_bytes()) == (False, b"new")
    assert (tmp_path / "outside").read_bytes() == b"mine"


def test_a_partial_file_that_a_link_replaces_meanwhile_fails(tmp_path: Path) -> None:
    (tmp_path / "outside").write_bytes(b"mine")
    with pytest.raises(OSError, match="symbolic links"):
        atomic_write(tmp_path / "file", lambda path: path.symlink_to(tmp_path / "outside"))
    assert [path.name for path in tmp_path.iterdir()] == ["outside"]


def test_rights_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        atomic_write(tmp_path / "file", b"new")
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640


def test_a_disk_that_takes_a_little_at_a_time_gets_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, content: real(descriptor, bytes(content)[:3]))
    write_and_sync(os.open(tmp_path / "file", os.O_WRONLY | os.O_CREAT), b"0123456789")
    assert (tmp_path / "file").read_bytes() == b"0123456789"


def test_only_own_files_and_folders_pass(tmp_path: Path) -> None:
    file, folder, link, fifo = (tmp_path / name for name in ("file", "folder", "link", "fifo"))
    file.touch()
    folder.mkdir()
    link.symlink_to(file)
    os.mkfifo(fifo)
    check_own(tmp_path / "missing")
    check_own(file)
    check_own(folder, folder=True)
    for path, what in ((link, "a link"), (fifo, "not a regular file"), (folder, "not a regular file")):
        with pytest.raises(RunDirectoryError) as caught:
            check_own(path)
        mend = "put a regular file in its place, or remove it"
        assert str(caught.value) == f"{path}: {what}, where neq writes; {mend}"
    for path in (file, link):
        with pytest.raises(RunDirectoryError, match="put a folder in its place"):
            check_own(path, folder=True)
