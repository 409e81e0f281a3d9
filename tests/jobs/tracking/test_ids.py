"""What a run directory keeps of its trackers, written and read back; what somebody else put there is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from neq_cli.errors import RunDirectoryError
from neq_cli.jobs.tracking.ids import Kept, read_ids, write_ids


def test_ids_are_kept(tmp_path: Path) -> None:
    kept = {"wandb": Kept("0a1b", 3), "mlflow": Kept("c-_d")}
    assert read_ids(tmp_path / "ids.json") == {}
    write_ids(tmp_path / "ids.json", kept)
    assert read_ids(tmp_path / "ids.json") == kept


@pytest.mark.parametrize(
    "entry",
    [None, "a", {}, {"id": "a"}, {"id": "../a", "epoch": 1}, {"id": "a" * 65, "epoch": 1}, {"id": "", "epoch": 1}]
    + [{"id": "a", "epoch": epoch} for epoch in (-1, 1.5, True, "1", 2**60)],
)
def test_what_is_no_id_is_refused_in_a_line(tmp_path: Path, entry: Any) -> None:
    path = tmp_path / "ids.json"
    path.write_text(json.dumps({"wandb": entry}))
    with pytest.raises(RunDirectoryError, match=r"ids.json: 'wandb': no (id|epoch); the file is damaged") as error:
        read_ids(path)
    assert "\n" not in str(error.value)
