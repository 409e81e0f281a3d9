"""How far two computations of one number may lie apart by rounding alone, whatever the processor.

A processor, a library and a number of threads decide in which order and in which blocks numbers are added up, and
which operations are fused. None of that changes how often a term is rounded at most, so that bounds from this count
hold everywhere, and a difference beyond them is a fault. Where nothing of it can differ, tests compare bits. Counts and
shares that Python adds up need none: ``pytest.approx`` allows 1e-6, which is 10^10 roundings in double precision.
"""

from __future__ import annotations

import math

import torch

GROWTH = 4.0**7
"""By how much the small nets of these tests make a relative error larger, at most: seven layers deep, by four each.

A layer's factor is sum |w x| / |sum w x| over the outputs of a neuron: what cancels in its sums. In double precision
this leaves 1e-9 for a thousand roundings, a thousandth of what one rounding in single precision does.
"""


def unit(dtype: torch.dtype) -> float:
    """Return u, the largest relative error of one operation that rounds to nearest."""
    return torch.finfo(dtype).eps / 2


def gamma(roundings: int, dtype: torch.dtype = torch.float64) -> float:
    """Return n u / (1 - n u): the relative error that n roundings, one after another, come to at most."""
    error = roundings * unit(dtype)
    assert error < 1, f"{roundings} roundings of {dtype} may leave nothing"
    return error / (1 - error)


def apart(roundings: int, dtype: torch.dtype = torch.float64, magnitude: float = 1.0) -> float:
    """Return how far two computed values of one sum may lie apart: 2 gamma_n sum |terms|.

    ``roundings``: of any term on its way into the result, at most. A sum of n products in any order: n. ``magnitude``:
    the sum of the terms' absolute values. Twice, since each of the two errs. (Higham, Accuracy and Stability of
    Numerical Algorithms, 2nd edition, lemma 3.1 and section 4.2.)
    """
    return 2 * gamma(roundings, dtype) * magnitude


def apart_behind_layers(roundings: int, dtype: torch.dtype = torch.float64, magnitude: float = 1.0) -> float:
    """Return ``apart`` for values behind several layers: what each rounds, those behind it make larger."""
    return apart(roundings, dtype, magnitude * GROWTH)


def apart_after_steps(steps: int, roundings: int, dtype: torch.dtype = torch.float64, magnitude: float = 1.0) -> float:
    """Return how far trained weights may lie apart after so many steps of ``roundings`` each, forward and backward.

    Where training does not diverge, a step carries an error on without making it larger, since no eigenvalue of
    1 - lr * Hessian lies beyond 1; so errors add up. Momentum of 0.9 repeats each 1 / (1 - 0.9) = 10 times.
    """
    return apart_behind_layers(10 * steps * roundings, dtype, magnitude)


def phi_apart(roundings: int, values: int, dtype: torch.dtype = torch.float64, growth: float = GROWTH) -> float:
    """Return how far two computed cosines of outputs may lie apart, when summed in double precision.

    ``roundings``: behind each of the outputs; ``values``: outputs of one neuron. An output vector that is off by the
    relative error e turns by asin(e) at most; a cosine changes by no more than the angle, to which both vectors add.
    The product errs by gamma_n |a| |b|, the two lengths by gamma_n / 2 each. All of it twice, as in ``apart``.
    """
    turned = 2 * math.asin(min(1.0, gamma(roundings, dtype) * growth))
    return 2 * (turned + 2 * gamma(values + 4))
