"""Is Student's t what the tables say?"""

import math

import pytest

from difflab.statistics import t_quantile


@pytest.mark.parametrize(
    "degrees_of_freedom, value",
    [(1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (5, 2.5706), (10, 2.2281), (30, 2.0423), (120, 1.9799)],
)
def test_two_sided_95_percent(degrees_of_freedom, value):
    assert t_quantile(degrees_of_freedom) == pytest.approx(value, abs=1e-4)


def test_closed_forms():
    for p in (0.6, 0.9, 0.99):
        assert t_quantile(1, p) == pytest.approx(math.tan(math.pi * (p - 0.5)))
        assert t_quantile(2, p) == pytest.approx((2 * p - 1) * math.sqrt(2 / (4 * p * (1 - p))))
    assert t_quantile(7, 0.5) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("arguments", [(0,), (2.5,), (3, 0.4), (3, 1.0)])
def test_bad_arguments(arguments):
    with pytest.raises(ValueError):
        t_quantile(*arguments)
