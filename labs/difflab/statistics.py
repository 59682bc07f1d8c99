"""Student's t distribution, for confidence intervals without a statistics library."""

from __future__ import annotations

import math

__all__ = ["t_quantile"]


def t_quantile(degrees_of_freedom: int, probability: float = 0.975) -> float:
    """The value that a t-distributed variable stays below with this probability.

    A 95 % interval is estimate ± t_quantile(degrees of freedom) · standard error: 2.5 % are left out on either side.

    Args:
        degrees_of_freedom: numbers measured minus coefficients fitted, at least 1.
        probability: from 0.5 up, below 1.

    Raises:
        ValueError: for other arguments.
    """
    if degrees_of_freedom < 1 or degrees_of_freedom != int(degrees_of_freedom):
        raise ValueError(f"degrees_of_freedom must be a whole number from 1 up, got {degrees_of_freedom}")
    if not 0.5 <= probability < 1:
        raise ValueError(f"probability must lie in [0.5, 1), got {probability}")
    low, high = 0.0, math.pi / 2
    for _ in range(100):  # bisection, in the angle whose tangent is t / sqrt(degrees of freedom)
        middle = (low + high) / 2
        if 0.5 + _within(middle, int(degrees_of_freedom)) / 2 < probability:
            low = middle
        else:
            high = middle
    return math.sqrt(degrees_of_freedom) * math.tan((low + high) / 2)


def _within(angle: float, degrees_of_freedom: int) -> float:
    """P(|t| < sqrt(n) tan(angle)), a finite sum (Abramowitz & Stegun 1964, 26.7.3 and 26.7.4)."""
    odd = degrees_of_freedom % 2
    sine, cosine = math.sin(angle), math.cos(angle)
    term, total = (cosine if odd else 1.0), 0.0
    for power in range(2 + odd, degrees_of_freedom + 1, 2):
        total += term
        term *= cosine**2 * (power - 1) / power
    return 2 / math.pi * (angle + sine * total) if odd else sine * total
