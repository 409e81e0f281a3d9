"""What `neq bench` measures, and how it is told on the command line; no torch, so that a mistake shows at once."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import get_args

from neq_cli.errors import NeqError, did_you_mean
from neq_cli.recipe.values import BackwardMode

MODES: tuple[str, ...] = get_args(BackwardMode)
ORDERS = ("random", "front")


@dataclass(frozen=True)
class BenchOptions:
    """Every mode with every order and share of frozen neurons, ``rounds`` times; ``layers``: the share to detail."""

    fractions: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 0.9, 1.0)
    modes: tuple[str, ...] = ("exact", "truncated")
    orders: tuple[str, ...] = ORDERS
    rounds: int = 6  # the fewest that give an interval of 95 %
    layers: float = 0.5


def parse_options(fractions: str, modes: str, orders: str, rounds: int, layers: float | None) -> BenchOptions:
    """Return the options that comma-separated texts spell; without ``layers`` the share nearest to a half is detailed.

    Raises NeqError, one line, for what is no share, mode or order, or a share to detail that is not measured.
    """
    shares = _unique(_share(text) for text in _items("--fractions", fractions))
    if layers is None:
        layers = min(shares, key=lambda share: abs(share - BenchOptions.layers))
    if layers not in shares:
        measured = ", ".join(f"{share:g}" for share in shares)
        raise NeqError(f"neq bench: --layers {layers:g} is not measured; choose one of {measured} or add it")
    return BenchOptions(
        fractions=shares,
        modes=_unique(_word("--modes", text, MODES) for text in _items("--modes", modes)),
        orders=_unique(_word("--orders", text, ORDERS) for text in _items("--orders", orders)),
        rounds=rounds,
        layers=layers,
    )


def _items(option: str, text: str) -> list[str]:
    items = [item.strip() for item in text.split(",")]
    if not all(items):
        raise NeqError(f"neq bench: {option} {text!r} has an empty place; separate values by one comma")
    return items


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise NeqError(f"neq bench: --fractions: {text!r} is not a share from 0 to 1")
    return share


def _word(option: str, text: str, known: tuple[str, ...]) -> str:
    if text not in known:
        hint = did_you_mean(text, known) or f"; use {', '.join(known)}"
        raise NeqError(f"neq bench: {option}: no {text!r}{hint}")
    return text


def _unique(values: Iterable[float | str]) -> tuple:  # type: ignore[type-arg]
    return tuple(dict.fromkeys(values))
