"""What `neq bench` may be told."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from neq_cli.errors import NeqError
from neq_cli.training.bench.options import BenchOptions, parse_options


def parse(
    fractions: str = "0,1", modes: str = "exact", orders: str = "front", layers: float | None = None
) -> BenchOptions:
    return parse_options(fractions, modes, orders, 3, layers)


def test_lists_are_read_in_order_and_once() -> None:
    assert parse("0.9, 0.25,0.9", "truncated,exact,dense", "front,random") == BenchOptions(
        (0.9, 0.25), ("truncated", "exact", "dense"), ("front", "random"), 3, layers=0.25
    )


@pytest.mark.parametrize(
    ("fractions", "layers", "detailed"),
    [("0,0.25,0.5,1", None, 0.5), ("0.1,0.6", None, 0.6), ("1", None, 1.0), ("0,0.5,1", 1.0, 1.0)],
)
def test_the_share_to_detail(fractions: str, layers: float | None, detailed: float) -> None:
    assert parse(fractions, layers=layers).layers == detailed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"fractions": "1.5"}, "neq bench: --fractions: '1.5' is not a share from 0 to 1"),
        ({"fractions": "half"}, "neq bench: --fractions: 'half' is not a share from 0 to 1"),
        ({"fractions": "nan"}, "neq bench: --fractions: 'nan' is not a share from 0 to 1"),
        ({"fractions": "0,,1"}, "neq bench: --fractions '0,,1' has an empty place; separate values by one comma"),
        ({"modes": "exakt"}, "neq bench: --modes: no 'exakt'; did you mean 'exact'?"),
        ({"orders": "back"}, "neq bench: --orders: no 'back'; use random, front"),
        ({"layers": 0.5}, "neq bench: --layers 0.5 is not measured; choose one of 0, 1 or add it"),
    ],
)
def test_mistakes(arguments: dict[str, str], message: str) -> None:
    with pytest.raises(NeqError) as error:
        parse(**arguments)  # type: ignore[arg-type]
    assert str(error.value) == message


def test_no_torch_is_imported() -> None:
    code = "import sys\nimport neq_cli.training.bench.options\nprint('torch' in sys.modules)"
    folder = Path(__file__).parents[3]
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
