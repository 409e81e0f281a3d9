"""Folding shows every layer exactly once, within its capacity, and as fine as fits."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from neq_cli.runs.views.live.layers import fold


def labels(names: list[str], capacity: int) -> list[str]:
    return [group.label for group in fold(tuple(names), capacity)]


RESNET = [
    "conv1",
    "bn1",
    *(f"layer{s}.{b}.{part}" for s in (1, 2) for b in (0, 1, 2) for part in ("conv1", "bn1")),
    "fc",
]


def test_what_fits_is_not_folded() -> None:
    assert labels(RESNET, len(RESNET)) == RESNET


def test_blocks_come_before_stages() -> None:
    blocks = ["conv1", "bn1", "layer1.0", "layer1.1", "layer1.2", "layer2.0", "layer2.1", "layer2.2", "fc"]
    assert labels(RESNET, 14) == blocks
    assert labels(RESNET, 9) == blocks


def test_numbered_blocks_are_joined_in_ranges() -> None:
    assert labels(RESNET, 8) == ["conv1", "bn1", "layer1.0", "layer1.1-2", "layer2.0", "layer2.1-2", "fc"]
    assert labels(RESNET, 5) == ["conv1", "bn1", "layer1.0-2", "layer2.0-2", "fc"]
    assert labels(RESNET, 4) == ["conv1", "bn1", "layer1-2", "fc"]


def test_a_flat_model_is_cut_in_equal_ranges() -> None:
    flat = [f"features.{index}" for index in range(300)]
    assert labels(flat, 20) == [f"features.{start}-{start + 14}" for start in range(0, 300, 15)]


def test_names_without_prefix_or_number_are_joined_in_order() -> None:
    assert labels(["stem", "body", "neck", "head"], 2) == ["stem..body", "neck..head"]


def test_nothing_fits_into_nothing() -> None:
    assert labels(RESNET, 0) == []
    assert labels([], 5) == []


part = st.sampled_from(["layer1", "layer2", "0", "1", "10", "conv", "bn1", "blocks", "", "07"])


@given(st.lists(st.lists(part, min_size=1, max_size=4).map(".".join), min_size=1, max_size=60, unique=True), st.data())
def test_every_layer_is_in_exactly_one_group(names: list[str], data: st.DataObject) -> None:
    capacity = data.draw(st.integers(1, len(names) + 2))
    groups = fold(tuple(names), capacity)
    assert sorted(index for group in groups for index in group.members) == list(range(len(names)))
    assert len(groups) <= capacity
    assert len({group.label for group in groups}) == len(groups)


def test_groups_stand_in_forward_order() -> None:
    block = ["conv1", "bn1", "conv2", "bn2", "head"]
    assert labels(block, 5) == block
    assert labels(block, 3) == ["conv1-2", "bn1-2", "head"]
